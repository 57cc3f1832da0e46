"""VB-LoRA: every sub-vector of every factor is a mixture from one vector bank (arXiv 2405.15179)."""

import itertools
import math

import torch
from torch import Tensor, nn

from .. import ops  # noqa: F401  (registers torch.ops.vblora)
from ..bank import VectorBank, check_count
from .base import Adapter, Factors, Target


class VBLoRAAdapter(Adapter):
    """One VB-LoRA adapter of one model: a bank and a row of logits a sub-vector, whatever the number of layers.

    Rows stand in the order of the targets, for each first those of its A, rank by rank, then those of its B: the ``r`` ranks
    of ``in_features / b`` and of ``out_features / b`` sub-vectors. A rank of either factor is thus contiguous.

    Args:
        targets: the layers.
        bank: the vector bank ``V``, ``(h, b)``. The adapter owns it, unless several adapters were given the same one.
        r: rank of the update.
        topk: k, bank vectors mixed into a sub-vector (eq. 2: top-k, softmax over them, weighted sum).
        init_logits_std: logits start normal with this standard deviation.
        device, dtype: of the logits; the bank's unless told otherwise.

    Attributes:
        logits: ``(S, h)`` parameter.
        candidates: ``(S, M)`` bank vectors that the columns of the logits stand for, or None: all of them in order.

    Raises:
        ValueError: ``r`` or ``topk`` out of range, or a target whose width ``b`` does not divide.
    """

    candidates: Tensor | None

    def __init__(
        self,
        targets: list[Target],
        bank: VectorBank,
        *,
        r: int = 4,
        topk: int = 2,
        init_logits_std: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(targets)
        if not isinstance(bank, VectorBank):
            raise TypeError(f"`bank` is a {type(bank).__name__}, but must be a vblora.VectorBank.")
        check_count("r", r)
        check_count("topk", topk)
        if topk > bank.num_vectors:
            raise ValueError(f"`topk` is {topk}, but must be at most `num_vectors`, {bank.num_vectors}.")
        check_widths(self.targets, bank.vector_length)
        self.r = r
        self.topk = topk
        self.init_logits_std = init_logits_std
        self.bank = bank
        # Rows of each factor in turn: A and B of the first target, of the second, ...
        self._rows = [
            r * width // bank.vector_length for t in self.targets for width in (t.in_features, t.out_features)
        ]
        self._starts = [0, *itertools.accumulate(self._rows)][::2]
        device = bank.vectors.device if device is None else device
        dtype = bank.vectors.dtype if dtype is None else dtype
        self.logits = nn.Parameter(torch.empty(sum(self._rows), bank.num_vectors, device=device, dtype=dtype))
        self.register_buffer("candidates", None)
        self.reset_parameters()

    @property
    def num_subvectors(self) -> int:
        """S, the sub-vectors of all factors."""
        return self.logits.shape[0]

    def reset_parameters(self) -> None:
        """Draws the logits anew, as the paper does. The bank, which may be shared, is left alone."""
        nn.init.normal_(self.logits, std=self.init_logits_std)

    def compose(self, dtype: torch.dtype, index: int | None = None) -> list[Factors]:
        logits, candidates, rows = self.logits, self.candidates, self._rows
        if index is not None:
            rows = rows[2 * index : 2 * index + 2]
            logits = logits.narrow(0, self._starts[index], sum(rows))
            candidates = candidates.narrow(0, self._starts[index], sum(rows)) if candidates is not None else None
        subvectors, _, _ = torch.ops.vblora.admixture(logits, self.bank.vectors, candidates, self.topk, dtype)
        # One split for all: its backward is one concatenation, that of a slice is a whole tensor of zeros.
        parts = subvectors.split_with_sizes(rows)
        return [Factors(a.view(self.r, -1), b.view(self.r, -1)) for a, b in zip(parts[::2], parts[1::2], strict=True)]

    def extra_repr(self) -> str:
        return f"num_subvectors={self.num_subvectors}, r={self.r}, topk={self.topk}, targets={len(self.targets)}"


def check_widths(targets: tuple[Target, ...], vector_length: int) -> None:
    """Refuses a ``vector_length`` that does not divide every width, naming the layers and the lengths that would."""
    odd = [t for t in targets if t.in_features % vector_length or t.out_features % vector_length]
    if not odd:
        return
    common = math.gcd(*(width for t in targets for width in (t.in_features, t.out_features)))
    layers = ", ".join(f"{t.name} ({t.in_features} -> {t.out_features})" for t in odd[:5])
    more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
    lengths = ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)
    raise ValueError(
        f"`vector_length` is {vector_length}, but must divide `in_features` and `out_features` of each target. "
        f"It does not for: {layers}{more}. Lengths that would do: {lengths}."
    )
