"""The factors of layers that activation checkpointing recomputes: those that the forward composed, with a backward of their own.

A recomputed layer would compose its rows again, and under re-entrant checkpointing its backward would make a gradient of the
whole bank and add it up. Here it adds what its own rows contribute to the gradients that are there.
"""

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .base import optimizer_steps
from .rows import accumulated_gradient


class Mixtures:
    """What a forward composed, for the layers that its backward recomputes.

    Args:
        parts: the sub-vectors of each factor: A and B of the first layer, of the second, ...
        columns: ``(S, k)``, the selected columns of the logits.
        weights: ``(S, k)``.
        bank: the vectors that were mixed, which may be scaled.
        sources: the parameters that all this depends on.
    """

    def __init__(
        self,
        parts: tuple[Tensor, ...],
        columns: Tensor,
        weights: Tensor,
        candidates: Tensor | None,
        bank: Tensor,
        sources: tuple[Tensor, Tensor],
    ) -> None:
        self._parts = [part.detach() for part in parts]
        self._columns = columns.long()
        self._vectors = self._columns if candidates is None else candidates.gather(1, self._columns).long()
        self._weights, self._bank, self._sources = weights.detach(), bank.detach(), sources
        self._state = self._current_state()

    def _current_state(self) -> tuple[int, ...]:
        logits, vectors = self._sources
        return logits._version, vectors._version, logits.data_ptr(), vectors.data_ptr(), optimizer_steps()

    def are_of(self, dtype: torch.dtype, logits: Tensor | None, vectors: Tensor) -> bool:
        """Whether these parameters would compose the same factors again."""
        of_logits, of_vectors = self._sources
        same = logits is of_logits and vectors is of_vectors and self._parts[0].dtype == dtype
        return same and self._state == self._current_state()

    def factors(self, index: int, start: int, rows_of_A: int, bank: Tensor) -> tuple[Tensor, ...]:
        """A and B of layer ``index``, whose rows begin at ``start``. Their gradients go to the logits and to ``bank``."""
        A, B = self._parts[2 * index : 2 * index + 2]
        factors: tuple[Tensor, Tensor] = _Recomputed.apply(  # type: ignore[no-untyped-call]
            self._sources[0], bank, A, B, self, start, rows_of_A
        )
        return factors

    def backward(
        self, rows: slice, begins: tuple[int, ...], parts: tuple[Tensor, ...], need_logits: bool, need_bank: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of the selected logits and bank vectors of some rows; and which columns and vectors these are."""
        if self._state != self._current_state():
            raise RuntimeError(
                "the adapter's parameters were modified between a layer's recomputation and its backward. Run backward before "
                "the optimizer steps."
            )
        columns, vectors = self._columns[rows], self._vectors[rows].flatten()
        # As if the selected vectors were the whole bank, and the selected logits a row's only ones.
        selected, entries = _numbered(*columns.shape)
        below = (
            nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd()
        )  # saves a call into Python
        with below:
            of_logits, of_vectors = torch.ops.vblora.admixture_backward_parts(
                parts,
                begins,
                selected,
                self._weights[rows],
                self._bank[vectors],
                entries,
                columns.shape[1],
                need_logits,
                need_bank,
            )
        return of_logits, of_vectors, columns, vectors


@functools.lru_cache(maxsize=64)
def _numbered(rows: int, k: int) -> tuple[Tensor, Tensor]:
    """The numbers of the columns, and of all entries, of a ``(rows, k)`` matrix."""
    columns = torch.arange(k, dtype=torch.int32, device="cpu")
    return columns.repeat(rows, 1), torch.arange(rows * k, dtype=torch.int32, device="cpu").view(rows, k)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bank: Tensor, A: Tensor, B: Tensor, mixtures: Mixtures, start: int, rows_of_A: int
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.rows = slice(start, start + rows_of_A + B.numel() // bank.shape[1])
        ctx.rows_of_A, ctx.mixtures, ctx.shapes = rows_of_A, mixtures, (logits.shape, bank.shape)
        return A, B

    @staticmethod
    def backward(ctx: Any, grad_A: Tensor | None, grad_B: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [(begin, grad) for begin, grad in ((0, grad_A), (ctx.rows_of_A, grad_B)) if grad is not None]
        if not given:
            return (None,) * 7
        begins, parts = zip(*given, strict=True)
        need_logits, need_bank = ctx.needs_input_grad[:2]
        of_logits, of_vectors, columns, vectors = ctx.mixtures.backward(ctx.rows, begins, parts, need_logits, need_bank)
        grad_logits = grad_bank = None
        if need_logits:
            total, grad_logits = accumulated_gradient(ctx.next_functions[0][0], ctx.shapes[0], of_logits)
            total[ctx.rows].scatter_add_(1, columns, of_logits.to(total.dtype))
        if need_bank:
            total, grad_bank = accumulated_gradient(ctx.next_functions[1][0], ctx.shapes[1], of_vectors)
            total.index_add_(0, vectors, of_vectors.to(total.dtype))
        return grad_logits, grad_bank, *(None,) * 5
