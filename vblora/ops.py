"""The operators, ``torch.ops.vblora.*``: this module loads them and registers their fake kernels and gradients.

``csrc/registration.cpp`` has the schemas; :mod:`vblora.reference` defines what each operator computes.
"""

import itertools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import (
    native,  # noqa: F401  # registers the operators and their kernels
    reference,
)
from .arguments import (
    accumulation_dtype,
    check_add_updates,
    check_admixture,
    check_admixture_backward,
    check_admixture_parts,
    check_compose,
    check_draw_logits,
    check_draw_uniform,
)


def _admixture(
    logits: Tensor, bank: Tensor, candidates: Tensor | None, k: int, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    check_admixture(logits, bank, candidates, k, out_dtype)
    rows = logits.shape[0]
    return (
        logits.new_empty((rows, bank.shape[1]), dtype=out_dtype or bank.dtype),
        logits.new_empty((rows, k), dtype=torch.int32),
        logits.new_empty((rows, k), dtype=accumulation_dtype(logits.dtype)),
    )


def _admixture_parts(
    logits: Tensor,
    bank: Tensor,
    candidates: Tensor | None,
    exhausted: Tensor | None,
    k: int,
    out_dtype: torch.dtype | None,
    sizes: list[int],
    ranks: int,
) -> tuple[list[Tensor], Tensor, Tensor]:
    subvectors, indices, weights = _admixture(logits, bank, candidates, k, out_dtype)
    check_admixture_parts(logits, exhausted, sizes, ranks)
    shapes = [(ranks, size * bank.shape[1] // ranks) for size in sizes]
    return [subvectors.new_empty(shape) for shape in shapes], indices, weights


def _admixture_backward(
    grad_subvectors: Tensor | None,
    grad_weights: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    bank: Tensor,
    candidates: Tensor | None,
    num_candidates: int,
    need_logits: bool,
    need_bank: bool,
) -> tuple[Tensor, Tensor]:
    check_admixture_backward(grad_subvectors, grad_weights, indices, weights, bank, candidates, num_candidates)
    return _gradients(indices, bank, num_candidates, need_logits, need_bank)


def _admixture_backward_parts(
    grad_parts: list[Tensor],
    begins: list[int],
    indices: Tensor,
    weights: Tensor,
    bank: Tensor,
    candidates: Tensor | None,
    num_candidates: int,
    need_logits: bool,
    need_bank: bool,
) -> tuple[Tensor, Tensor]:
    return _gradients(indices, bank, num_candidates, need_logits, need_bank)


def _gradients(
    indices: Tensor, bank: Tensor, num_candidates: int, need_logits: bool, need_bank: bool
) -> tuple[Tensor, Tensor]:
    return (
        bank.new_empty((indices.shape[0], num_candidates) if need_logits else (0,)),
        bank.new_empty(bank.shape if need_bank else (0,)),
    )


def _compose(bank: Tensor, indices: Tensor, weights: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    check_compose(bank, indices, weights, out_dtype)
    return bank.new_empty((indices.shape[0], bank.shape[1]), dtype=out_dtype or bank.dtype)


def _add_updates(y: Tensor, x: Tensor, A: Tensor, B: Tensor, adapters: Tensor | None = None) -> None:
    check_add_updates(y, x, A, B, adapters)


def _low_rank_backward(
    grad_y: Tensor, x: Tensor, A: Tensor, B: Tensor, grad_x: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return A.new_empty(A.shape), B.new_empty(B.shape)


def _draw_logits(logits: Tensor, candidates: Tensor | None, num_vectors: int, seed: int, std: float) -> None:
    check_draw_logits(logits, candidates, num_vectors, std)


def _draw_uniform(values: Tensor, seed: int, stream: int, bound: float) -> None:
    check_draw_uniform(values, stream, bound)


_FAKES: dict[str, Callable[..., Any]] = {
    "admixture": _admixture,
    "admixture_parts": _admixture_parts,
    "admixture_backward": _admixture_backward,
    "admixture_backward_parts": _admixture_backward_parts,
    "compose": _compose,
    "add_updates_": _add_updates,
    "low_rank_backward": _low_rank_backward,
    "draw_logits_": _draw_logits,
    "draw_uniform_": _draw_uniform,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"vblora::{_name}", _fake)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, bank, candidates, _, _ = inputs
    _, indices, weights = output
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)
    ctx.num_candidates = logits.shape[1]
    ctx.save_for_backward(indices, weights, bank, candidates)


def _backward(
    ctx: Any, grad_subvectors: Tensor | None, _grad_indices: None, grad_weights: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_subvectors is None and grad_weights is None:
        return None, None, None, None, None
    indices, weights, bank, candidates = ctx.saved_tensors
    need_logits, need_bank = ctx.needs_input_grad[:2]
    grad_logits, grad_bank = torch.ops.vblora.admixture_backward(
        grad_subvectors, grad_weights, indices, weights, bank, candidates, ctx.num_candidates, need_logits, need_bank
    )
    return grad_logits if need_logits else None, grad_bank if need_bank else None, None, None, None


def _no_second_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError("vblora::admixture cannot be differentiated twice; call backward without create_graph.")


def _save_for_compose_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    bank, indices, weights, _ = inputs
    ctx.save_for_backward(bank, indices, weights)


def _compose_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    bank, indices, weights = ctx.saved_tensors
    need_bank, _, need_weights = ctx.needs_input_grad[:3]
    grad_bank = grad_weights = None
    indices = indices.long()
    inside = (indices >= 0) & (indices < len(bank))  # others contribute nothing
    if need_bank:  # as if the k vectors of a row were its only candidates
        columns = torch.arange(indices.shape[1], dtype=torch.int32, device=indices.device).expand_as(indices)
        candidates = torch.where(inside, indices, -1).int()
        _, grad_bank = torch.ops.vblora.admixture_backward(
            grad, None, columns, weights, bank, candidates, indices.shape[1], False, True
        )
    if need_weights:
        vectors = bank[torch.where(inside, indices, 0)].to(weights.dtype)
        grad_weights = torch.bmm(vectors, grad.to(weights.dtype)[:, :, None]).squeeze(2) * inside
    return grad_bank, None, grad_weights, None


class _InParts(torch.autograd.Function):
    """The admixture in parts; its backward reads each part's gradient in place."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        bank: Tensor,
        candidates: Tensor | None,
        exhausted: Tensor | None,
        k: int,
        out_dtype: torch.dtype,
        sizes: list[int],
        ranks: int,
    ) -> tuple[Tensor, ...]:
        parts, indices, weights = torch.ops.vblora.admixture_parts(
            logits, bank, candidates, exhausted, k, out_dtype, sizes, ranks
        )
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.num_candidates = logits.shape[1]
        ctx.begins = [0, *itertools.accumulate(sizes)]
        ctx.save_for_backward(indices, weights, bank, candidates)
        return indices, weights, *parts  # an output is saved with its history, so a second backward raises

    @staticmethod
    def backward(
        ctx: Any, _grad_indices: None, _grad_weights: Tensor | None, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        given = [(begin, grad) for begin, grad in zip(ctx.begins, grads, strict=False) if grad is not None]
        if not given:
            return (None,) * 8
        indices, weights, bank, candidates = ctx.saved_tensors
        need_logits, need_bank = ctx.needs_input_grad[:2]
        begins, parts = zip(*given, strict=True)
        grad_logits, grad_bank = torch.ops.vblora.admixture_backward_parts(
            parts, begins, indices, weights, bank, candidates, ctx.num_candidates, need_logits, need_bank
        )
        return grad_logits if need_logits else None, grad_bank if need_bank else None, *(None,) * 6


# Private: torch has no public way to ask. Without it, torch.func raises at our operators and autograd functions.
_functorch_is_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation runs, which our operators have no rules for.

    Forward mode would take their results for constants. Use plain PyTorch then.
    """
    if torch.compiler.is_compiling():
        return False
    return _functorch_is_active() or forward_ad._current_level >= 0


def is_recorded() -> bool:
    """Whether a transform (:func:`is_transformed`) or ``torch.jit.trace`` follows what runs.

    Then write to no tensor from outside, and call the same operators with and without gradients: a trace is checked without.
    """
    return not torch.compiler.is_compiling() and (is_transformed() or torch._C._is_tracing())


def admixture_in_parts(
    logits: Tensor,
    bank: Tensor,
    candidates: Tensor | None,
    exhausted: Tensor | None,
    k: int,
    out_dtype: torch.dtype,
    sizes: list[int],
    ranks: int,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Composes the sub-vectors ``(S, b)`` and splits them into runs of ``sizes`` rows, each a matrix of ``ranks`` rows. Returns
    these with the operator's indices and weights.

    Sets ``exhausted`` ``(S,)`` to True for rows whose k-th selected logit is not above their last one.

    In eager mode, backward never concatenates the parts' gradients, which saves writing and reading 40 MB for Llama-2-7B's 448
    factors. In graphs, this is ``admixture`` followed by a split. Within a transform, it is the plain PyTorch reference.
    """
    if is_recorded():
        admixture = reference.admixture if is_transformed() else torch.ops.vblora.admixture
        subvectors, indices, weights = admixture(logits, bank, candidates, k, out_dtype)
        return in_parts(subvectors, sizes, ranks), indices, weights
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        indices, weights, *parts = _InParts.apply(  # type: ignore[no-untyped-call]
            logits, bank, candidates, exhausted, k, out_dtype, sizes, ranks
        )
        return tuple(parts), indices, weights
    subvectors, indices, weights = torch.ops.vblora.admixture(logits, bank, candidates, k, out_dtype)
    _note_exhausted(exhausted, logits, indices)
    return in_parts(subvectors, sizes, ranks), indices, weights


def scaled_admixture(
    logits: Tensor,
    bank: Tensor,
    candidates: Tensor | None,
    exhausted: Tensor | None,
    scales: Tensor,
    k: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """The sub-vectors ``(S, b)``, each times its element of ``scales`` ``(S,)``. Sets ``exhausted`` as above.

    The scale goes into the weights, as a deploy form stores them, so both give the same bits.
    """
    if is_transformed():
        subvectors, _, _ = reference.admixture(logits, bank, candidates, k)
        return (subvectors * scales[:, None]).to(out_dtype)
    # This call is for the weights. One column of the bank makes it cheap.
    _, columns, weights = torch.ops.vblora.admixture(logits, bank.detach()[:, :1], candidates, k)
    _note_exhausted(exhausted, logits, columns)
    indices = columns if candidates is None else candidates.gather(1, columns.long())
    return torch.ops.vblora.compose(bank, indices, weights * scales[:, None], out_dtype)


def _note_exhausted(exhausted: Tensor | None, logits: Tensor, columns: Tensor) -> None:
    if exhausted is not None:
        logits = logits.detach()
        selected = logits.gather(1, columns[:, -1:].long())
        exhausted.logical_or_((selected <= logits[:, -1:]).squeeze(1))


def in_parts(subvectors: Tensor, sizes: list[int], ranks: int) -> tuple[Tensor, ...]:
    """Splits ``(S, b)`` into views of ``sizes`` rows, each a matrix of ``ranks`` rows.

    One split has one concatenation as its backward; each slice would have a tensor of zeros as large as the input."""
    return tuple(part.view(ranks, -1) for part in subvectors.split_with_sizes(sizes))


torch.library.register_autograd("vblora::admixture", _backward, setup_context=_save_for_backward)
torch.library.register_autograd("vblora::admixture_backward", _no_second_backward)
torch.library.register_autograd("vblora::admixture_backward_parts", _no_second_backward)
torch.library.register_autograd("vblora::compose", _compose_backward, setup_context=_save_for_compose_backward)
