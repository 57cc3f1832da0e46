"""The factors of layers that activation checkpointing recomputes: those that the forward composed, with a backward of their own.

A recomputed layer would compose its rows again, and under re-entrant checkpointing its backward would make a gradient of the
whole bank and add it up. Here it adds what its own rows contribute to the gradients that are there.
"""

import functools
import itertools
from contextlib import nullcontext
from typing import Any, NamedTuple

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
        sizes: the number of rows of each factor.
        logits, vectors: the parameters that all this depends on.
    """

    def __init__(
        self,
        parts: tuple[Tensor, ...],
        columns: Tensor,
        weights: Tensor,
        candidates: Tensor | None,
        bank: Tensor,
        sizes: list[int],
        logits: Tensor,
        vectors: Tensor,
    ) -> None:
        columns = columns.long()
        selected = columns if candidates is None else candidates.gather(1, columns).long()
        of_layers = [of_A + of_B for of_A, of_B in zip(sizes[::2], sizes[1::2], strict=True)]
        self._parts = [part.detach() for part in parts]
        self._layers = [
            _Layer(start, rows_of_A, *tensors)
            for start, rows_of_A, *tensors in zip(
                itertools.accumulate(of_layers, initial=0),
                sizes[::2],
                columns.split(of_layers),
                selected.view(-1).split([size * columns.shape[1] for size in of_layers]),
                weights.detach().split(of_layers),
                strict=False,
            )
        ]
        self.bank, self._logits, self._vectors = bank.detach(), logits, vectors
        self._state = self._current_state()

    def _current_state(self) -> tuple[int, ...]:
        return self._logits._version, self._vectors._version, optimizer_steps()

    @property
    def are_current(self) -> bool:
        """Whether the parameters have not changed since."""
        return self._state == self._current_state()

    def are_of(self, dtype: torch.dtype, logits: Tensor | None, vectors: Tensor) -> bool:
        """Whether these parameters would compose the same factors again."""
        same = logits is self._logits and vectors is self._vectors and self._parts[0].dtype == dtype
        return same and self.are_current

    def factors(self, index: int, bank: Tensor) -> tuple[Tensor, ...]:
        """A and B of a layer. Their gradients go to the logits and to ``bank``."""
        A, B = self._parts[2 * index : 2 * index + 2]
        factors: tuple[Tensor, Tensor] = _Recomputed.apply(  # type: ignore[no-untyped-call]
            self._logits, bank, A, B, self, self._layers[index]
        )
        return factors


class _Layer(NamedTuple):
    """The rows of one layer."""

    start: int
    rows_of_A: int
    columns: Tensor  # (rows, k)
    vectors: Tensor  # (rows * k,)
    weights: Tensor  # (rows, k)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bank: Tensor, A: Tensor, B: Tensor, mixtures: Mixtures, layer: _Layer
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.mixtures, ctx.layer, ctx.shape = mixtures, layer, logits.shape
        return A, B

    @staticmethod
    def backward(ctx: Any, grad_A: Tensor | None, grad_B: Tensor | None) -> tuple[Tensor | None, ...]:
        start, rows_of_A, columns, vectors, weights = ctx.layer
        given = [(begin, grad) for begin, grad in ((0, grad_A), (rows_of_A, grad_B)) if grad is not None]
        if not given:
            return (None,) * 6
        if not ctx.mixtures.are_current:
            raise RuntimeError(
                "the adapter's parameters were modified between a layer's recomputation and its backward. Run backward before "
                "the optimizer steps."
            )
        begins, parts = zip(*given, strict=True)
        need_logits, need_bank = ctx.needs_input_grad[:2]
        bank: Tensor = ctx.mixtures.bank
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
                weights,
                bank.index_select(0, vectors),
                entries,
                columns.shape[1],
                need_logits,
                need_bank,
            )
        grad_logits = grad_bank = None
        if need_logits:
            total, grad_logits = accumulated_gradient(ctx.next_functions[0][0], ctx.shape, of_logits)
            total.narrow(0, start, len(columns)).scatter_add_(1, columns, of_logits.to(total.dtype))
        if need_bank:
            total, grad_bank = accumulated_gradient(ctx.next_functions[1][0], bank.shape, of_vectors)
            total.index_add_(0, vectors, of_vectors.to(total.dtype))
        return grad_logits, grad_bank, *(None,) * 4


@functools.lru_cache(maxsize=64)
def _numbered(rows: int, k: int) -> tuple[Tensor, Tensor]:
    """The numbers of the columns, and of all entries, of a ``(rows, k)`` matrix."""
    columns = torch.arange(k, dtype=torch.int32, device="cpu")
    return columns.repeat(rows, 1), torch.arange(rows * k, dtype=torch.int32, device="cpu").view(rows, k)
