"""The operators, ``torch.ops.vblora.*``: loading them, their shapes (for tracing), their gradients.

The schemas are in ``csrc/registration.cpp``, what the operators compute is spelled out in :mod:`vblora.reference`.
"""

import torch
from torch import Tensor

from . import _C  # registers the operators and their kernels

build_info = _C.build_info

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _check(holds: bool, op: str, name: str, message: str) -> None:
    torch._check(holds, lambda: f"vblora::{op}: `{name}` {message}")


def _check_matrix(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    _check(tensor.device == device, op, name, f"is on {tensor.device}, but must be on {device}.")
    _check(tensor.dim() == 2, op, name, f"must have 2 dimensions, but has shape {tuple(tensor.shape)}.")


def _check_floating(op: str, name: str, dtype: torch.dtype) -> None:
    _check(dtype in _FLOATING, op, name, f"is {dtype}; allowed are float32, float64, bfloat16 and float16.")


def _check_candidates(op: str, candidates: Tensor, rows: int, columns: int, device: torch.device) -> None:
    _check_matrix(op, "candidates", candidates, device)
    same = candidates.shape[0] == rows and candidates.shape[1] == columns
    _check(same, op, "candidates", f"has shape {tuple(candidates.shape)}, but must be {(rows, columns)}.")
    allowed = candidates.dtype in (torch.int16, torch.int32)
    _check(allowed, op, "candidates", f"is {candidates.dtype}; allowed are int16 and int32.")


def _weight_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("vblora::admixture")
def _(logits: Tensor, bank: Tensor, candidates: Tensor | None, k: int, out_dtype: torch.dtype | None = None):
    _check_matrix("admixture", "logits", logits, logits.device)
    _check_matrix("admixture", "bank", bank, logits.device)
    _check_floating("admixture", "logits", logits.dtype)
    _check(
        bank.dtype == logits.dtype, "admixture", "bank", f"is {bank.dtype}, but must be {logits.dtype} as logits is."
    )
    out_dtype = out_dtype or bank.dtype
    _check_floating("admixture", "out_dtype", out_dtype)
    rows, columns = logits.shape
    if candidates is not None:
        _check_candidates("admixture", candidates, rows, columns, logits.device)
    else:
        square = columns == bank.shape[0]
        _check(square, "admixture", "logits", f"has {columns} columns, but the bank has {bank.shape[0]} vectors.")
    _check(1 <= k <= columns, "admixture", "k", f"is {k}, but must be between 1 and {columns}.")
    return (
        logits.new_empty((rows, bank.shape[1]), dtype=out_dtype),
        logits.new_empty((rows, k), dtype=torch.int32),
        logits.new_empty((rows, k), dtype=_weight_dtype(logits.dtype)),
    )


@torch.library.register_fake("vblora::admixture_backward")
def _(
    grad_subvectors: Tensor | None,
    grad_weights: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    bank: Tensor,
    candidates: Tensor | None,
    num_candidates: int,
    need_logits: bool,
    need_bank: bool,
):
    device = indices.device
    given = {"grad_subvectors": grad_subvectors, "grad_weights": grad_weights}
    for name, tensor in {"indices": indices, "weights": weights, "bank": bank, **given}.items():
        if tensor is not None:
            _check_matrix("admixture_backward", name, tensor, device)
    if candidates is not None:
        _check_candidates("admixture_backward", candidates, indices.shape[0], num_candidates, device)
    return (
        bank.new_empty((indices.shape[0], num_candidates) if need_logits else (0,)),
        bank.new_empty(bank.shape if need_bank else (0,)),
    )


@torch.library.register_fake("vblora::compose")
def _(bank: Tensor, indices: Tensor, weights: Tensor, out_dtype: torch.dtype | None = None):
    for name, tensor in {"bank": bank, "indices": indices, "weights": weights}.items():
        _check_matrix("compose", name, tensor, bank.device)
    _check_floating("compose", "bank", bank.dtype)
    same = indices.shape == weights.shape
    _check(same, "compose", "weights", f"has shape {tuple(weights.shape)}, but must be {tuple(indices.shape)}.")
    out_dtype = out_dtype or bank.dtype
    _check_floating("compose", "out_dtype", out_dtype)
    return bank.new_empty((indices.shape[0], bank.shape[1]), dtype=out_dtype)


def _save_for_backward(ctx, inputs, output) -> None:
    logits, bank, candidates, _, _ = inputs
    _, indices, weights = output
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)
    ctx.num_candidates = logits.shape[1]
    ctx.save_for_backward(indices, weights, bank, candidates)


def _backward(ctx, grad_subvectors, _grad_indices, grad_weights):
    if grad_subvectors is None and grad_weights is None:
        return None, None, None, None, None
    indices, weights, bank, candidates = ctx.saved_tensors
    need_logits, need_bank = ctx.needs_input_grad[:2]
    grad_logits, grad_bank = torch.ops.vblora.admixture_backward(
        grad_subvectors, grad_weights, indices, weights, bank, candidates, ctx.num_candidates, need_logits, need_bank
    )
    return grad_logits if need_logits else None, grad_bank if need_bank else None, None, None, None


def _no_second_backward(ctx, *grads):
    raise RuntimeError("vblora::admixture cannot be differentiated twice; call backward without create_graph.")


def _no_compose_backward(ctx, *grads):
    raise RuntimeError("vblora::compose is the inference form and has no gradient; train with vblora::admixture.")


torch.library.register_autograd("vblora::admixture", _backward, setup_context=_save_for_backward)
torch.library.register_autograd("vblora::admixture_backward", _no_second_backward)
torch.library.register_autograd("vblora::compose", _no_compose_backward)
