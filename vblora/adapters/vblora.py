"""VB-LoRA: every sub-vector of every factor is a mixture of vectors from one bank (arXiv 2405.15179)."""

import itertools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .. import ops, streams
from ..bank import VectorBank
from ..checks import check_count, check_not_negative, check_positive, check_seed
from ..config import VBLoRAConfig
from ..config.vblora import check_start
from ..distributed import gather
from ..errors import VBLoRAWarning
from .base import Adapter, Factors, Target, is_plain, living_adapters
from .recomputed import Mixtures
from .rows import in_backward, rows_of
from .state import as_float, as_integer
from .subvectors import as_factors, check_widths, rows_of_factors
from .vblora_rows import Deployed, Trained, check_noop, draw_rows, draw_seed, initial_scales

BANK = "bank.vectors"  # the name of the bank's parameter in an adapter


class VBLoRAAdapter(Adapter):
    """One VB-LoRA adapter of one model: a bank, and one row of logits per sub-vector of all layers.

    Rows are in the order of the targets. For each target come the rows of A, rank by rank, then those of B: ``r`` ranks of
    ``in_features / b`` and of ``out_features / b`` sub-vectors, rounded up. So each rank of a factor is contiguous; the part of
    its last sub-vector beyond the width is cut off.

    A row holds the M largest of its h initial logits in descending order, and the bank vector of each. A logit that was never
    among its row's top k has no gradient and no optimizer state, so it keeps its initial value, and the largest of these is the
    next to be selected. So training equals dense training until a row has used up its M candidates.

    Args:
        targets: the layers.
        bank: the vector bank ``V``, ``(h, b)``. Several adapters may share one.
        r: rank of the update.
        topk: k, the number of bank vectors mixed into a sub-vector (eq. 3.3: top-k, softmax over them, weighted sum).
        num_candidates: M. None, or at least h, means the paper's dense form.
        init_logits_std: standard deviation of the initial logits, which are normal.
        init: ``"paper"``, or ``"noop"``, whose first update is exactly 0 while bank and logits still get gradients. ``"noop"``
            needs a bank of pairs (``VectorBank(..., pairs=True)``); each row of B starts with one pair at equal weights.
        scaling: multiplies the update; 1 in the paper. Its square root multiplies the bank.
        train_scales: also train a scale for each sub-vector, which starts at 1 for A and 0 for B.
        pad: allow targets whose widths ``b`` does not divide.
        seed: of the initial logits, which are the same on every device. None draws one from torch's generator.
        rows: rows from a file, instead of a draw.
        device, dtype: of the logits; by default the bank's.

    Attributes:
        logits: parameter ``(S, M)``; None in a deployed adapter.
        scales: parameter ``(S,)``, the number that multiplies each sub-vector; None without ``train_scales`` and in a deployed
            adapter.
        indices, weights: buffers ``(S, k)`` of a deployed adapter, otherwise None.
        candidates: buffer ``(S, M)``, the bank vector of each logit; None if M = h and the columns are the bank in order.
        exhausted: buffer ``(S,)``, the rows that may differ from dense training; None if M = h.
        seed: the seed that drew the logits, or None if it is unknown.

    Raises:
        ValueError: a number is out of range, ``init`` is unknown, or ``b`` does not divide a target's width and ``pad`` is False.
        TypeError: an argument has the wrong type.
    """

    RATES: ClassVar = {
        "default": {"bank": 3e-3, "logits": 0.5, "scales": 0.1},  # of scales: with a bank that was drawn up to 0.05
        "language": {"bank": 1.2e-2, "logits": 0.4, "scales": 0.2},
        "paper": {"bank": 1e-3, "logits": 1e-2},  # its appendix A.1: for 20 to 160 epochs on GLUE
    }
    FALLS: ClassVar = {"bank": 1.0, "scales": 1.0}  # the bank's to 1.7e-3 at 4,096, where the paper's is 1e-3

    logits: nn.Parameter | None
    scales: nn.Parameter | None
    candidates: Tensor | None
    exhausted: Tensor | None
    indices: Tensor | None
    weights: Tensor | None

    def __init__(
        self,
        targets: Sequence[Target],
        bank: VectorBank,
        *,
        r: int = 4,
        topk: int = 2,
        num_candidates: int | None = 128,
        init_logits_std: float = 0.1,
        init: str = "paper",
        scaling: float = 1.0,
        train_scales: bool = False,
        pad: bool = False,
        seed: int | None = None,
        rows: Trained | Deployed | None = None,
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
        if num_candidates is not None:
            check_count("num_candidates", num_candidates)
            if num_candidates < topk:
                raise ValueError(f"`num_candidates` is {num_candidates}, but must be at least `topk`, {topk}.")
        if seed is not None:
            check_seed("seed", seed)
        check_widths(self.targets, bank.vector_length, pad)
        check_start(init, train_scales)
        self.r = r
        self.topk = topk
        self.init_logits_std = check_not_negative("init_logits_std", init_logits_std)
        self.scaling = check_positive("scaling", scaling)
        self.init = init
        self.bank = bank
        bank.adapters += 1
        if init == "noop" and rows is None:
            check_noop(bank, topk, num_candidates)
        self._rows = rows_of_factors(self.targets, r, bank.vector_length)
        self._starts = [0, *itertools.accumulate(self._rows)][::2]
        self._recomputes = False  # whether a backward ever recomputed a layer
        self._mixtures: Mixtures | None = None  # of the last forward, for the layers that its backward recomputes
        self._sum: int | None = None  # of a deployed adapter's indices, as they were loaded
        if rows is None:
            dense = num_candidates is None or num_candidates >= bank.num_vectors
            rows = draw_rows(
                self._rows,
                bank.num_vectors,
                None if dense else num_candidates,
                seed=draw_seed() if seed is None else seed,
                std=init_logits_std,
                init=init,
                device=bank.vectors.device if device is None else device,
                dtype=bank.vectors.dtype if dtype is None else dtype,
            )
            if train_scales:
                rows = rows._replace(scales=initial_scales(self._rows, rows.logits))
        trained = rows if isinstance(rows, Trained) else None
        deployed = rows if isinstance(rows, Deployed) else None
        self.seed = trained and trained.seed
        self.register_parameter("logits", trained and nn.Parameter(trained.logits))
        scales = trained and trained.scales
        self.register_parameter("scales", None if scales is None else nn.Parameter(scales))
        self.register_buffer("candidates", trained and trained.candidates)
        self.register_buffer("exhausted", trained and trained.exhausted)
        self.register_buffer("indices", deployed and deployed.indices)
        self.register_buffer("weights", deployed and deployed.weights)
        self.note_integers()

    takes_bank = True

    @classmethod
    def from_config(
        cls,
        config: VBLoRAConfig,
        targets: Sequence[Target],
        *,
        bank: VectorBank | str | os.PathLike[str] | None = None,
        rows: Trained | Deployed | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """A new adapter for ``targets``.

        Args:
            bank: a bank to share, or the path of its file, instead of a new bank on ``device``. The logits go to its device.
            rows: rows from a file, instead of a draw.

        Raises:
            ValueError: the size of ``bank`` differs from the config's.
            FileNotFoundError: the file of the bank does not exist.
        """
        return cls(
            targets,
            _bank_for(config, bank, device),
            r=config.r,
            topk=config.topk,
            num_candidates=config.num_candidates,
            init_logits_std=config.init_logits_std,
            init=config.init,
            scaling=config.scaling,
            train_scales=config.train_scales,
            pad=config.pad,
            seed=config.seed,
            rows=rows,
        )

    @classmethod
    def check_targets(cls, config: VBLoRAConfig, targets: tuple[Target, ...]) -> None:
        check_widths(targets, config.vector_length, config.pad)

    @classmethod
    def warn_if_untrainable(cls, config: VBLoRAConfig) -> None:
        warn_of_one_vector(config.topk, config.train_scales, stacklevel=4)

    @property
    def num_subvectors(self) -> int:
        """S, the number of sub-vectors of all factors."""
        return sum(self._rows)

    @property
    def rows(self) -> Trained | Deployed:
        """The rows that the sub-vectors are mixed from."""
        if self.logits is None:
            return self._deployed()
        return Trained(self.logits, self.candidates, self.exhausted, self.seed, self.scales)

    def _deployed(self) -> Deployed:
        assert self.indices is not None and self.weights is not None  # one of the two forms
        if self.topk != self.indices.shape[1]:
            raise ValueError(
                f"`topk` is {self.topk}, but must stay {self.indices.shape[1]}: this adapter is deployed, so it holds that many "
                'indices and weights of each row. To change it, load the file of form="resume".'
            )
        return Deployed(self.indices, self.weights)

    @torch.no_grad()
    def initial(self, num_candidates: int | None = None) -> Trained:
        """The initial rows, drawn again; with ``num_candidates``, the largest logits of each row in descending order.

        Raises:
            ValueError: the adapter has no logits or no seed.
        """
        if self.logits is None or self.seed is None:
            raise ValueError(
                "the adapter's initial logits are unknown: it was loaded from a file that holds no seed (deployed, or PEFT's)."
            )
        if num_candidates is None and self.candidates is not None:
            num_candidates = self.logits.shape[1]
        return draw_rows(
            self._rows,
            self.bank.num_vectors,
            num_candidates,
            seed=self.seed,
            std=self.init_logits_std,
            init=self.init,
            device=self.logits.device,
            dtype=self.logits.dtype,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the logits again from their seed, and resets the scales. The bank stays as it is: other adapters may share it."""
        initial = self.initial()
        for current, value in ((self.logits, initial.logits), (self.candidates, initial.candidates)):
            if current is not None and value is not None:
                current.copy_(value)
        if self.exhausted is not None:
            self.exhausted.zero_()
        if self.scales is not None:
            self.scales.copy_(initial_scales(self._rows, self.scales))

    def others_of_bank(self) -> list["VBLoRAAdapter"]:
        """The other adapters over the same bank, in any model."""
        if self.bank.adapters < 2:
            return []
        living = (adapter for adapter in living_adapters() if isinstance(adapter, VBLoRAAdapter))
        return [adapter for adapter in living if getattr(adapter, "bank", None) is self.bank and adapter is not self]

    @property
    def _integers(self) -> Tensor | None:
        """What tells which bank vectors a row is of: the candidates, or a deployed adapter's indices."""
        return self.candidates if self.indices is None else self.indices

    def note_integers(self) -> None:
        """Remembers that the candidates, or the indices, are right as they are now."""
        self._noted = _version_of(self._integers)
        if self.indices is not None:  # nothing could draw them again
            self._sum = _sum_of(self.indices)

    def _check_integers(self) -> None:
        """Warns if something wrote into the candidates or indices: averages that also take integers, such as timm's ModelEmaV2,
        round them.

        A write moves the version counter, so this looks at them once after each, and at those of a copy.
        """
        own = self._integers
        if torch.compiler.is_compiling() or own is None or _version_of(own) in (None, self._noted):
            return
        if ops.is_recorded() or streams.capturing(own.device):
            return
        self._noted = _version_of(own)
        if self.indices is not None:
            changed = self._sum is not None and self._sum != _sum_of(own)
        elif self.seed is not None and self.logits is not None and self.logits.dtype == torch.float32:
            drawn = self.initial().candidates
            changed = drawn is None or drawn.shape != own.shape or not torch.equal(drawn, own)
        else:
            changed = _no_candidates(own, None, self.bank.num_vectors) is not None
        if changed:
            what = "candidates`, so its logits choose" if self.indices is None else "indices`, so its weights are of"
            warnings.warn(
                f"something has written other values into the adapter's `{what} other bank vectors "
                "than in training. Perhaps it is an average of models that takes integers, too, such as timm's ModelEmaV2: "
                "average only floating-point tensors, as torch.optim.swa_utils.AveragedModel does. Or a PreTrainedModel was "
                "loaded from a checkpoint without the adapter: have its `_init_weights` call `reset_parameters` of the bank and "
                "the adapter.",
                VBLoRAWarning,
                stacklevel=2,
            )

    def compose(self, dtype: torch.dtype, span: range | None = None) -> list[Factors]:
        self._check_integers()
        rows, targets = self._rows, self.targets
        start, count = 0, self.num_subvectors
        if span is not None:
            rows, targets = rows[2 * span.start : 2 * span.stop], targets[span.start : span.stop]
            start, count = self._starts[span.start], sum(rows)

        def part(tensor: Tensor) -> Tensor:
            return tensor if span is None else rows_of(tensor, start, count)

        bank = scaled(gather(self.bank.vectors), self.scaling)
        if self.logits is None:
            deployed = self._deployed()
            subvectors = torch.ops.vblora.compose(bank, part(deployed.indices), part(deployed.weights), dtype)
            parts = ops.in_parts(subvectors, rows, self.r)
        else:
            logits = part(gather(self.logits))
            # A row is exhausted once its k-th selected logit is no larger than its last candidate's: from then on, dense training
            # might have selected a bank vector that is no candidate. Weight decay scales all logits, the last one included, so
            # the comparison stays valid. With k = 1, logits get no gradient, so nothing else is ever selected.
            training = logits.requires_grad and torch.is_grad_enabled() and not ops.is_recorded()
            counted = self.exhausted if training and self.topk > 1 else None
            exhausted = None if counted is None else part(counted)
            candidates = None if self.candidates is None else part(self.candidates)
            if self.scales is not None:
                scales = part(gather(self.scales))
                subvectors = ops.scaled_admixture(logits, bank, candidates, exhausted, scales, self.topk, dtype)
                return as_factors(ops.in_parts(subvectors, rows, self.r), targets)
            parts, columns, weights = ops.admixture_in_parts(
                logits, bank, candidates, exhausted, self.topk, dtype, rows, self.r
            )
            if span is None:
                self._mixtures = None  # before the next ones take memory
                sources = self.logits, self.bank.vectors
                kept = training and self._recomputes and not torch.compiler.is_compiling()
                if kept and all(source.is_cpu and is_plain(source) for source in sources):
                    self._mixtures = Mixtures(
                        parts, rows, columns, weights, candidates, *sources, math.sqrt(self.scaling)
                    )
        return as_factors(parts, targets)

    def factors_of(self, index: int, dtype: torch.dtype) -> Factors:
        if not in_backward() or not torch.is_grad_enabled():
            return super().factors_of(index, dtype)
        self._recomputes = True
        mixtures, vectors = self._mixtures, self.bank.vectors
        if mixtures is None or not mixtures.are_of(dtype, self.logits, vectors):
            return super().factors_of(index, dtype)
        return as_factors(mixtures.factors(index), self.targets[index : index + 1])[0]

    def invalidate(self) -> None:
        super().invalidate()
        self._mixtures = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        known = _version_of(self._integers) == self._noted
        super()._apply(fn, recurse)
        if known:
            self._noted = _version_of(self._integers)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_mixtures": None, "_noted": None}

    def current_config(self, config: VBLoRAConfig) -> VBLoRAConfig:
        return replace(config, topk=self.topk, scaling=self.scaling)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        own = {"logits": self.logits, "scales": self.scales}
        groups = {name: [] if parameter is None else [parameter] for name, parameter in own.items()}
        return {"bank": [self.bank.vectors], **groups}

    def stored_tensors(self) -> list[Tensor]:
        return [self.bank.vectors]

    def stored_mixture_size(self) -> int:
        # k weights and k indices per sub-vector, with indices in the smallest integer type that fits.
        index = 0.25 if self.bank.num_vectors <= 256 else 0.5 if self.bank.num_vectors <= 32768 else 1.0
        return round(self.num_subvectors * self.topk * (1 + index))

    def settings(self) -> list[int]:
        return [self.seed is not None, self.seed or 0, self.topk, as_integer(self.scaling)]

    def set_settings(self, settings: Sequence[int]) -> None:
        *_, self.topk, scaling = settings
        self.scaling = as_float(scaling)

    def set_extra_state(self, state: Tensor) -> None:
        # The seed belongs to the logits, which are loaded whatever layers they are of.
        if not state.is_floating_point():
            known, seed = state[:2].tolist()
            self.seed = seed if known else None
        super().set_extra_state(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Loads logits, candidates and seed, which belong together, also if the state dict lacks some of them."""
        logits, candidates, extra = (state_dict.get(prefix + name) for name in ("logits", "candidates", "_extra_state"))
        indices = state_dict.get(prefix + "indices")
        if indices is not None and indices.is_floating_point():
            args[-1].append(
                f"`{prefix}indices` are floating-point numbers, so they are not what an adapter has. Perhaps they are an "
                "average of several state dicts: average only the tensors that are floating-point."
            )
            return
        own = self.candidates
        same = False
        if candidates is not None and own is not None and not (own.is_meta or candidates.is_meta):
            same = torch.equal(candidates.to(own), own)
        if not same and (reason := _no_candidates(candidates, extra, self.bank.num_vectors)):
            args[-1].append(  # the list of errors
                f"`{prefix}candidates` {reason}, so they are not what an adapter has. Perhaps they are an average of several "
                "state dicts: average those of adapters with the same `seed`, and only the tensors that are floating-point."
            )
            return
        if extra is not None and same and self.seed is not None:
            # This seed is right. An average of state dicts may have rounded the other one.
            state_dict[f"{prefix}_extra_state"] = torch.cat([self.get_extra_state()[:2], extra[2:].cpu()])
        if candidates is None:
            if logits is not None and self.candidates is not None and not self._may_have_drawn(logits):
                _warn_of_another_draw(prefix)
        elif extra is None and not same:
            self.seed = None  # it has not drawn these
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.note_integers()

    def _may_have_drawn(self, logits: Tensor) -> bool:
        """Whether logits of the same shape may come from the same draw: then they are equal where neither was trained."""
        own = self.logits
        if own is None or not is_plain(own) or own.shape != logits.shape:
            return True
        return bool((logits.to(own) == own).float().mean() > 0.01)

    def extra_repr(self) -> str:
        candidates = "" if self.candidates is None else f", num_candidates={self.candidates.shape[1]}"
        scales = "" if self.scales is None else ", train_scales=True"
        return (
            f"num_subvectors={self.num_subvectors}, r={self.r}, topk={self.topk}{candidates}{scales}, "
            f"targets={len(self.targets)}"
        )


def _version_of(tensor: Tensor | None) -> tuple[int, int] | None:
    """Identifies a tensor and its values: another one has another identity, and a write moves the version. None if unknown."""
    return None if tensor is None or not is_plain(tensor) else (id(tensor), tensor._version)


def _sum_of(indices: Tensor) -> int | None:
    """Changes if values are rounded down. None if there are no values."""
    return int(indices.sum(dtype=torch.int64)) if is_plain(indices) and not indices.is_meta else None


def _no_candidates(candidates: Tensor | None, extra: Tensor | None, num_vectors: int) -> str | None:
    """Why these cannot be the candidates of a state dict; None if they can."""
    if candidates is None or candidates.is_meta or not candidates.numel():
        return None
    if candidates.is_floating_point() or (extra is not None and extra.is_floating_point()):
        return "or their seed are floating-point numbers"
    ordered = candidates.sort(1).values
    if ordered.min() < 0 or ordered.max() >= num_vectors:
        return f"hold {int(ordered.max())}, but there are only bank vectors 0 to {num_vectors - 1}"
    if ordered.shape[1] > 1 and (ordered[:, 1:] == ordered[:, :-1]).any():
        return "hold a bank vector twice in one row"
    return None


def warn_of_one_vector(topk: int, train_scales: bool, stacklevel: int) -> None:
    """Warns if the logits cannot train."""
    if topk == 1 and not train_scales:
        warnings.warn(
            "`topk` is 1: the weight of a single bank vector is always 1, so the logits get no gradient and never train. "
            "Each sub-vector keeps its initial bank vector. Set `topk` to 2 so that training can choose.",
            VBLoRAWarning,
            stacklevel=stacklevel,
        )


def _warn_of_another_draw(prefix: str) -> None:
    warnings.warn(
        f"the state dict has `{prefix}logits`, but lacks `{prefix}candidates`, the bank vectors that they stand for. This model "
        "seems to have drawn others, so the logits would choose other bank vectors than in training. Write adapters with "
        "vblora.save or vblora.adapter_state_dict; or set the same `seed` in the config of both models.",
        VBLoRAWarning,
        stacklevel=3,
    )


def _bank_for(
    config: VBLoRAConfig, bank: VectorBank | str | os.PathLike[str] | None, device: torch.device | str | None
) -> VectorBank:
    size = (config.num_vectors, config.vector_length)
    if bank is None:
        return VectorBank(*size, config.init_vector_bank_bound, pairs=config.init == "noop", device=device)
    if not isinstance(bank, VectorBank):
        bank = VectorBank.from_file(bank, device=device)
    if (bank.num_vectors, bank.vector_length) != size:
        raise ValueError(
            f"`bank` has {bank.num_vectors} vectors of length {bank.vector_length}, "
            f"but `config` has `num_vectors`={size[0]} and `vector_length`={size[1]}. Make them equal."
        )
    return bank


def scaled(bank: Tensor, scaling: float) -> Tensor:
    """``bank`` times the square root of ``scaling``, which multiplies both factors and so scales their product by ``scaling``."""
    return bank if scaling == 1.0 else bank * math.sqrt(scaling)
