"""The factors of layers that activation checkpointing recomputes: those that the forward composed, with a backward of their own.

A recomputed layer would compose its rows again, and under re-entrant checkpointing its backward would make a gradient of the
whole bank and add it up. Here it adds what its own rows contribute to the gradients that are there.
"""

import functools
import itertools
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
        sizes: the number of rows of each factor.
        columns: ``(S, k)``, the selected columns of the logits.
        weights: ``(S, k)``.
        candidates: the bank vector of each column, or None.
        logits, vectors: the parameters.
        scale: the bank that was mixed is ``vectors * scale``.
    """

    def __init__(
        self,
        parts: tuple[Tensor, ...],
        sizes: list[int],
        columns: Tensor,
        weights: Tensor,
        candidates: Tensor | None,
        logits: Tensor,
        vectors: Tensor,
        scale: float,
    ) -> None:
        self.starts = [0, *itertools.accumulate(sizes)]
        self.columns = columns.long()
        self.selected = self.columns if candidates is None else candidates.gather(1, self.columns).long()
        self.weights, self.logits, self.vectors, self.scale = weights.detach(), logits, vectors, scale
        self._parts = [part.detach() for part in parts]
        self._factors: tuple[Tensor, ...] | None = None
        self._state = self._current_state()

    def _current_state(self) -> tuple[int, ...]:
        return self.logits._version, self.vectors._version, optimizer_steps()

    @property
    def are_current(self) -> bool:
        """Whether the parameters have not changed since."""
        return self._state == self._current_state()

    def are_of(self, dtype: torch.dtype, logits: Tensor | None, vectors: Tensor) -> bool:
        """Whether these parameters would compose the same factors again."""
        same = logits is self.logits and vectors is self.vectors and self._parts[0].dtype == dtype
        return same and self.are_current

    def factors(self, index: int) -> tuple[Tensor, ...]:
        """A and B of a layer. Their gradients go to the parameters."""
        if self._factors is None:
            self._factors = _Recomputed.apply(self.logits, self.vectors, self, *self._parts)  # type: ignore[no-untyped-call]
        return self._factors[2 * index : 2 * index + 2]


class _Recomputed(torch.autograd.Function):
    """Gives the factors of all layers a history. It saves no tensors, so that each recomputation can run its backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, vectors: Tensor, mixtures: Mixtures, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.mixtures = mixtures
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        mixtures: Mixtures = ctx.mixtures
        given = [index for index, grad in enumerate(grads) if grad is not None]
        nothing = (None,) * (3 + len(grads))
        if not given:
            return nothing
        if not mixtures.are_current:
            raise RuntimeError(
                "the adapter's parameters were modified between a layer's recomputation and its backward. Run backward before "
                "the optimizer steps."
            )
        start, end = mixtures.starts[given[0]], mixtures.starts[given[-1] + 1]  # all rows between have zeros
        columns, weights = mixtures.columns[start:end], mixtures.weights[start:end]
        selected = mixtures.selected[start:end].flatten()
        bank = mixtures.vectors.detach().index_select(0, selected)
        need_logits, need_vectors = ctx.needs_input_grad[:2]
        numbers, entries = _numbered(*columns.shape)
        # Below autograd, the operator does not call into Python.
        below = nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd()
        # As if the selected vectors were the whole bank, and the selected logits a row's only ones.
        with below:
            of_logits, of_vectors = torch.ops.vblora.admixture_backward_parts(
                [grads[index] for index in given],
                [mixtures.starts[index] - start for index in given],
                numbers,
                weights,
                bank if mixtures.scale == 1 else bank * mixtures.scale,
                entries,
                columns.shape[1],
                need_logits,
                need_vectors,
            )
        grad_logits = grad_vectors = None
        if need_logits:
            total, grad_logits = accumulated_gradient(ctx.next_functions[0][0], mixtures.logits.shape, of_logits)
            total[start:end].scatter_add_(1, columns, of_logits.to(total.dtype))
        if need_vectors:
            total, grad_vectors = accumulated_gradient(ctx.next_functions[1][0], mixtures.vectors.shape, of_vectors)
            total.index_add_(0, selected, of_vectors.to(total.dtype), alpha=mixtures.scale)
        return grad_logits, grad_vectors, *nothing[2:]


@functools.lru_cache(maxsize=64)
def _numbered(rows: int, k: int) -> tuple[Tensor, Tensor]:
    """The numbers of the columns, and of all entries, of a ``(rows, k)`` matrix."""
    columns = torch.arange(k, dtype=torch.int32, device="cpu")
    return columns.repeat(rows, 1), torch.arange(rows * k, dtype=torch.int32, device="cpu").view(rows, k)
