"""Inputs of the operators at an adapter's size, and which bank vectors its rows choose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

VECTORS, LENGTH, K, CANDIDATES = 2048, 256, 2, 128  # h, b, k, M of the adapters that docs/cuda.md speaks of
LLAMA_ROWS = 39_040  # S: all linear layers of Llama-2-7B, r=4
CHOICES = ("uniform", "Zipf", "one vector")


@dataclass
class Inputs:
    logits: Tensor
    bank: Tensor
    candidates: Tensor | None
    grad_subvectors: Tensor
    indices: Tensor  # of the backward: columns
    weights: Tensor
    vectors: Tensor  # what those columns stand for

    @property
    def columns(self) -> int:
        return self.logits.shape[1]

    def to(self, device: str) -> Inputs:
        return Inputs(**{name: None if x is None else x.to(device) for name, x in vars(self).items()})

    def admixture(self) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self.grad_subvectors.dtype
        return torch.ops.vblora.admixture(self.logits, self.bank, self.candidates, K, dtype)

    def admixture_backward(self, need_logits: bool = True, need_bank: bool = True) -> tuple[Tensor, Tensor]:
        given = self.grad_subvectors, None, self.indices, self.weights, self.bank, self.candidates, self.columns
        return torch.ops.vblora.admixture_backward(*given, need_logits, need_bank)

    def compose(self) -> Tensor:
        return torch.ops.vblora.compose(self.bank, self.vectors, self.weights, self.grad_subvectors.dtype)


def make(rows: int, *, dense: bool, dtype: torch.dtype, choice: str, device: str, seed: int) -> Inputs:
    """`dtype`: of sub-vectors and their gradients; parameters are float32. `choice`: of the bank vectors that the backward
    meets."""
    random = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device)

    vectors = chosen(rows, choice, random, device)
    columns = VECTORS if dense else CANDIDATES
    candidates = None
    indices = vectors
    if not dense:
        candidates = torch.rand(rows, VECTORS, generator=random, device=device).argsort(1)[:, :columns]
        # Somewhere in the row, as a forward finds them.
        indices = torch.rand(rows, columns, generator=random, device=device).argsort(1)[:, :K]
        candidates = candidates.scatter(1, indices, vectors).to(torch.int16)
    return Inputs(
        logits=normal(rows, columns),
        bank=normal(VECTORS, LENGTH),
        candidates=candidates,
        grad_subvectors=normal(rows, LENGTH).to(dtype),
        indices=indices.to(torch.int32),
        weights=normal(rows, K).softmax(1),
        vectors=vectors.to(torch.int16),
    )


def chosen(rows: int, choice: str, random: torch.Generator, device: str) -> Tensor:
    """(rows, K) bank vectors, those of a row distinct."""
    ranks = torch.arange(1, VECTORS + 1, device=device, dtype=torch.float32)
    shares = 1 / ranks if choice == "Zipf" else torch.ones_like(ranks)
    drawn = torch.multinomial(shares, rows * K, replacement=True, generator=random).view(rows, K)
    if choice == "one vector":
        drawn[:, 0] = 7
    drawn[:, 1] = torch.where(drawn[:, 1] == drawn[:, 0], (drawn[:, 1] + 1) % VECTORS, drawn[:, 1])
    return drawn


def popular_from(rows: int, k: int = K, vectors: int = VECTORS) -> int:
    """The most entries of a vector that CUDA adds up in the CPU's order, of up to 2048 vectors (docs/cuda.md)."""
    return max(64, min(128, 2 * rows * k // vectors))
