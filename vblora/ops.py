"""The operators, ``torch.ops.vblora.*``: loading them, their shapes (for tracing), their gradients.

The schemas are in ``csrc/registration.cpp``, what the operators compute is spelled out in :mod:`vblora.reference`.
"""

import itertools
import math

import torch
from torch import Tensor

from . import _C  # registers the operators and their kernels

build_info = _C.build_info


def empty_cache() -> None:
    """Gives back to the system the memory that is kept on the CPU for the next large sub-vectors and gradients: up to eight
    blocks, of the last ones' sizes. (As ``torch.cuda.empty_cache`` does for CUDA.)"""
    _C.empty_cache()


_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CANDIDATES = (torch.int16, torch.int32)
_INDICES = (torch.uint8, torch.int16, torch.int32, torch.int64)


class _Arguments:
    """Checks of an operator's arguments while tracing: those of ``csrc/checks.cpp`` that an adapter could run into."""

    def __init__(self, op: str, device: torch.device) -> None:
        self.op = op
        self.device = device

    def check(self, holds: bool, name: str, message: str) -> None:
        torch._check(holds, lambda: f"vblora::{self.op}: `{name}` {message}")

    def matrix(self, name: str, tensor: Tensor) -> None:
        self.check(tensor.device == self.device, name, f"is on {tensor.device}, but must be on {self.device}.")
        self.check(tensor.dim() == 2, name, f"must have 2 dimensions, but has shape {tuple(tensor.shape)}.")

    def sizes(self, name: str, tensor: Tensor, rows: int, columns: int) -> None:
        self.matrix(name, tensor)
        wrong = f"has shape {tuple(tensor.shape)}, but must be {(rows, columns)}."
        self.check(tensor.shape[0] == rows, name, wrong)
        self.check(tensor.shape[1] == columns, name, wrong)

    def dtype(self, name: str, dtype: torch.dtype, *allowed: torch.dtype) -> None:
        self.check(dtype in allowed, name, f"is {dtype}; allowed: {', '.join(map(str, allowed))}.")

    def columns(self, name: str, columns: int, candidates: Tensor | None, rows: int, vectors: int) -> None:
        if candidates is not None:
            self.sizes("candidates", candidates, rows, columns)
            self.dtype("candidates", candidates.dtype, *_CANDIDATES)
        else:
            self.check(columns == vectors, name, f"means {columns} columns, but the bank has {vectors} vectors.")


def _weight_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("vblora::admixture")
def _(logits: Tensor, bank: Tensor, candidates: Tensor | None, k: int, out_dtype: torch.dtype | None = None):
    arguments = _Arguments("admixture", logits.device)
    arguments.matrix("logits", logits)
    arguments.matrix("bank", bank)
    arguments.dtype("logits", logits.dtype, *_FLOATING)
    arguments.dtype("bank", bank.dtype, logits.dtype)
    out_dtype = out_dtype or bank.dtype
    arguments.dtype("out_dtype", out_dtype, *_FLOATING)
    rows, columns = logits.shape
    arguments.columns("logits", columns, candidates, rows, bank.shape[0])
    arguments.check(k >= 1, "k", f"is {k}, but must be at least 1.")
    arguments.check(k <= columns, "k", f"is {k}, but must be at most {columns}, the columns of logits.")
    return (
        logits.new_empty((rows, bank.shape[1]), dtype=out_dtype),
        logits.new_empty((rows, k), dtype=torch.int32),
        logits.new_empty((rows, k), dtype=_weight_dtype(logits.dtype)),
    )


@torch.library.register_fake("vblora::admixture_parts")
def _(
    logits: Tensor,
    bank: Tensor,
    candidates: Tensor | None,
    k: int,
    out_dtype: torch.dtype | None,
    sizes: list[int],
    ranks: int,
):
    subvectors, indices, weights = torch.ops.vblora.admixture(logits, bank, candidates, k, out_dtype)
    arguments = _Arguments("admixture_parts", logits.device)
    arguments.check(ranks >= 1, "ranks", f"is {ranks}, but must be at least 1.")
    left = rows = logits.shape[0]
    for size in sizes:
        allowed = f"must hold multiples of `ranks`, {ranks}, that add up to the {rows} rows of logits."
        arguments.check(0 <= size <= left and size % ranks == 0, "sizes", f"holds {size}, but {allowed}")
        left -= size
    arguments.check(left == 0, "sizes", f"leaves out {left} of the {rows} rows of logits.")
    shapes = [(ranks, size * bank.shape[1] // ranks) for size in sizes]
    exhausted = logits.new_empty(logits.shape[:1], dtype=torch.bool)
    return [subvectors.new_empty(shape) for shape in shapes], indices, weights, exhausted


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
    arguments = _Arguments("admixture_backward", indices.device)
    arguments.matrix("indices", indices)
    arguments.dtype("indices", indices.dtype, torch.int32)
    arguments.matrix("bank", bank)
    arguments.dtype("bank", bank.dtype, *_FLOATING)
    rows, k = indices.shape
    vectors, length = bank.shape
    arguments.sizes("weights", weights, rows, k)
    arguments.dtype("weights", weights.dtype, _weight_dtype(bank.dtype))
    given = grad_subvectors is not None or grad_weights is not None
    arguments.check(given, "grad_subvectors", "and `grad_weights` are both None; give one.")
    if grad_subvectors is not None:
        arguments.sizes("grad_subvectors", grad_subvectors, rows, length)
        arguments.dtype("grad_subvectors", grad_subvectors.dtype, *_FLOATING)
    if grad_weights is not None:
        arguments.sizes("grad_weights", grad_weights, rows, k)
        arguments.dtype("grad_weights", grad_weights.dtype, weights.dtype)
    arguments.columns("num_candidates", num_candidates, candidates, rows, vectors)
    arguments.check(k <= num_candidates, "num_candidates", f"is {num_candidates}, but must be at least {k}.")
    return (
        bank.new_empty((rows, num_candidates) if need_logits else (0,)),
        bank.new_empty((vectors, length) if need_bank else (0,)),
    )


@torch.library.register_fake("vblora::admixture_backward_parts")
def _(
    grad_parts: list[Tensor],
    begins: list[int],
    indices: Tensor,
    weights: Tensor,
    bank: Tensor,
    candidates: Tensor | None,
    num_candidates: int,
    need_logits: bool,
    need_bank: bool,
):
    return (
        bank.new_empty((indices.shape[0], num_candidates) if need_logits else (0,)),
        bank.new_empty(bank.shape if need_bank else (0,)),
    )


@torch.library.register_fake("vblora::compose")
def _(bank: Tensor, indices: Tensor, weights: Tensor, out_dtype: torch.dtype | None = None):
    arguments = _Arguments("compose", bank.device)
    arguments.matrix("bank", bank)
    arguments.dtype("bank", bank.dtype, *_FLOATING)
    arguments.matrix("indices", indices)
    arguments.dtype("indices", indices.dtype, *_INDICES)
    arguments.sizes("weights", weights, *indices.shape)
    arguments.dtype("weights", weights.dtype, _weight_dtype(bank.dtype))
    out_dtype = out_dtype or bank.dtype
    arguments.dtype("out_dtype", out_dtype, *_FLOATING)
    return bank.new_empty((indices.shape[0], bank.shape[1]), dtype=out_dtype)


@torch.library.register_fake("vblora::draw_logits_")
def _(logits: Tensor, candidates: Tensor | None, num_vectors: int, seed: int, std: float) -> None:
    arguments = _Arguments("draw_logits_", logits.device)
    arguments.matrix("logits", logits)
    arguments.dtype("logits", logits.dtype, *_FLOATING)
    rows, columns = logits.shape
    arguments.check(num_vectors >= 0, "num_vectors", f"is {num_vectors}, but must not be negative.")
    most = torch.iinfo(torch.int32).max
    arguments.check(num_vectors <= most, "num_vectors", f"is {num_vectors}, but must be at most {most}.")
    if candidates is not None:
        arguments.sizes("candidates", candidates, rows, columns)
        arguments.dtype("candidates", candidates.dtype, *_CANDIDATES)
        fits = candidates.dtype != torch.int16 or num_vectors <= torch.iinfo(torch.int16).max + 1
        arguments.check(fits, "candidates", f"is int16, too small for {num_vectors} vectors; make it int32.")
        arguments.check(columns <= num_vectors, "logits", f"has {columns} columns for {num_vectors} vectors.")
    else:
        arguments.check(columns == num_vectors, "logits", f"has {columns} columns for {num_vectors} vectors.")
    arguments.check(0 <= std < math.inf, "std", f"is {std}, but must be finite and not negative.")


@torch.library.register_fake("vblora::draw_uniform_")
def _(values: Tensor, seed: int, stream: int, bound: float) -> None:
    arguments = _Arguments("draw_uniform_", values.device)
    arguments.matrix("values", values)
    arguments.dtype("values", values.dtype, *_FLOATING)
    arguments.check(0 <= stream < 2**32, "stream", f"is {stream}, but must be between 0 and 2^32 - 1.")
    arguments.check(0 <= bound < math.inf, "bound", f"is {bound}, but must be finite and not negative.")


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


class _InParts(torch.autograd.Function):
    """The admixture in parts, whose backward takes the parts' gradients where they are."""

    @staticmethod
    def forward(ctx, logits, bank, candidates, k, out_dtype, sizes, ranks):
        parts, indices, weights, exhausted = torch.ops.vblora.admixture_parts(
            logits, bank, candidates, k, out_dtype, sizes, ranks
        )
        ctx.mark_non_differentiable(exhausted)
        ctx.set_materialize_grads(False)
        ctx.num_candidates = logits.shape[1]
        ctx.begins = [0, *itertools.accumulate(sizes)]
        ctx.save_for_backward(indices, weights, bank, candidates)
        return exhausted, weights, *parts  # weights: saved with its history, so that a second backward is refused

    @staticmethod
    def backward(ctx, _grad_exhausted, _grad_weights, *grads):
        given = [(begin, grad) for begin, grad in zip(ctx.begins, grads, strict=False) if grad is not None]
        if not given:
            return (None,) * 7
        indices, weights, bank, candidates = ctx.saved_tensors
        need_logits, need_bank = ctx.needs_input_grad[:2]
        begins, parts = zip(*given, strict=True)
        grad_logits, grad_bank = torch.ops.vblora.admixture_backward_parts(
            parts, begins, indices, weights, bank, candidates, ctx.num_candidates, need_logits, need_bank
        )
        return grad_logits if need_logits else None, grad_bank if need_bank else None, *(None,) * 5


def admixture_in_parts(
    logits: Tensor,
    bank: Tensor,
    candidates: Tensor | None,
    exhausted: Tensor | None,
    k: int,
    out_dtype: torch.dtype,
    sizes: list[int],
    ranks: int,
) -> tuple[Tensor, ...]:
    """``admixture``'s sub-vectors ``(S, b)`` as runs of ``sizes`` rows, each run a matrix of ``ranks`` rows.

    In ``exhausted`` ``(S,)`` those rows are marked whose k-th selected logit is no longer above their last one.

    On the CPU the parts' gradients are never put together: for Llama-2-7B's 448 factors that is 40 MB that need not be written
    and read. Other devices, and graphs, have the operator and a split.
    """
    if logits.is_cpu and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        now, _, *parts = _InParts.apply(logits, bank, candidates, k, out_dtype, sizes, ranks)
        if exhausted is not None:
            exhausted.logical_or_(now)
        return tuple(parts)
    subvectors, indices, _ = torch.ops.vblora.admixture(logits, bank, candidates, k, out_dtype)
    if exhausted is not None:
        logits = logits.detach()
        selected = logits.gather(1, indices[:, -1:].long())
        exhausted.logical_or_((selected <= logits[:, -1:]).squeeze(1))
    return in_parts(subvectors, sizes, ranks)


def in_parts(subvectors: Tensor, sizes: list[int], ranks: int) -> tuple[Tensor, ...]:
    """Runs of ``sizes`` rows of ``(S, b)``, each as a matrix of ``ranks`` rows: views that one split made, whose backward is one
    concatenation, where that of a slice is a whole tensor of zeros."""
    return tuple(part.view(ranks, -1) for part in subvectors.split_with_sizes(sizes))


torch.library.register_autograd("vblora::admixture", _backward, setup_context=_save_for_backward)
torch.library.register_autograd("vblora::admixture_backward", _no_second_backward)
torch.library.register_autograd("vblora::admixture_backward_parts", _no_second_backward)
torch.library.register_autograd("vblora::compose", _no_compose_backward)
