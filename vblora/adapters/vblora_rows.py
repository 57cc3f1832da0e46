"""The rows of a VB-LoRA adapter, one per sub-vector: logits or mixtures, and how the first ones are drawn."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..bank import VectorBank
from ..distributed import processes


class Trained(NamedTuple):
    """The rows of logits of a trainable adapter, one row per sub-vector.

    Attributes:
        logits: ``(S, M)``.
        candidates: ``(S, M)``, the bank vector of each logit; None if M is h and the columns are all bank vectors in order.
        exhausted: ``(S,)``, the rows that have used up their candidates; None without candidates or without a seed.
        seed: the seed that drew the initial logits, or None if it is unknown.
        scales: ``(S,)``, the number that multiplies each sub-vector; None for ones.
    """

    logits: Tensor
    candidates: Tensor | None = None
    exhausted: Tensor | None = None
    seed: int | None = None
    scales: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Trained":
        """The same rows with ``function`` applied to each tensor."""
        return Trained._make(function(part) if isinstance(part, Tensor) else part for part in self)


class Deployed(NamedTuple):
    """The mixtures of an adapter for inference only: k bank vectors per sub-vector, best first.

    Attributes:
        indices: ``(S, k)``, the bank vectors.
        weights: ``(S, k)``. With scales, their products, which may be negative and need not sum to 1.
    """

    indices: Tensor
    weights: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Deployed":
        """The same mixtures with ``function`` applied to each tensor."""
        return Deployed(function(self.indices), function(self.weights))


def draw_rows(
    sizes: list[int],
    num_vectors: int,
    num_candidates: int | None,
    *,
    seed: int,
    std: float,
    init: str = "paper",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Trained:
    """Draws initial rows: all ``num_vectors`` logits in order, or the ``num_candidates`` largest in descending order.

    With ``init="noop"``, both vectors of a pair have the same logit in the rows of B, so the top two are a vector and its
    negative.

    Args:
        sizes: number of rows of each factor, from :func:`rows_of_factors`.
    """
    rows = sum(sizes)

    def draw(vectors: int, columns: int | None) -> tuple[Tensor, Tensor | None]:
        logits = torch.empty(rows, vectors if columns is None else columns, device=device, dtype=dtype)
        candidates = None
        if columns is not None:
            candidates = torch.empty(logits.shape, device=device, dtype=candidate_dtype(num_vectors))
        torch.ops.vblora.draw_logits_(logits, candidates, vectors, seed, std)
        return logits, candidates

    logits, candidates = draw(num_vectors, num_candidates)
    if init == "noop":
        of_b = rows_of_b(sizes, device)
        of_pairs, pairs = draw(num_vectors // 2, None if num_candidates is None else num_candidates // 2)
        logits = torch.where(of_b[:, None], of_pairs.repeat_interleave(2, 1), logits)
        if candidates is not None and pairs is not None:
            vectors = 2 * pairs.repeat_interleave(2, 1)
            vectors[:, 1::2] += 1
            candidates = torch.where(of_b[:, None], vectors, candidates)
    exhausted = None if candidates is None else torch.zeros(rows, device=device, dtype=torch.bool)
    return Trained(logits, candidates, exhausted, seed)


def rows_of_b(sizes: list[int], device: torch.device | str | None = None) -> Tensor:
    """Of each row, whether it is one of B."""
    counts = torch.tensor(sizes, device=device)
    return torch.repeat_interleave(torch.arange(len(sizes), device=device) % 2 == 1, counts, output_size=sum(sizes))


def initial_scales(sizes: list[int], like: Tensor) -> Tensor:
    """1 for the rows of A and 0 for those of B, with the dtype and on the device of ``like``."""
    return 1 - rows_of_b(sizes, like.device).to(like.dtype)


def check_noop(bank: VectorBank, topk: int, num_candidates: int | None) -> None:
    """Refuses arguments with which the first update would not be exactly 0."""
    needs = '`init` is "noop", which needs'
    if topk != 2:
        raise ValueError(f"{needs} `topk`=2 (a vector and its negative), not {topk}.")
    if num_candidates is not None and num_candidates % 2 and num_candidates < bank.num_vectors:
        raise ValueError(f"{needs} an even `num_candidates`, not {num_candidates}.")
    if not bank.is_of_pairs():
        raise ValueError(
            f"{needs} a bank of pairs, each vector 2i + 1 the negative of 2i, and `bank` is none. Create it with pairs=True."
        )


def draw_seed() -> int:
    """A seed from torch's generator.

    Raises:
        ValueError: several processes train together. Each has its own generator, so they would draw different candidates, while
            DDP makes their logits equal.
    """
    if processes() > 1:
        raise ValueError(
            f"`seed` is None, but {processes()} processes train together and must draw the same logits. "
            "Set `seed` in the config."
        )
    return int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cpu"))


def candidate_dtype(num_vectors: int) -> torch.dtype:
    """The smallest dtype that holds every index of the bank."""
    return torch.int16 if num_vectors <= 2**15 else torch.int32
