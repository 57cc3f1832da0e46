"""A frozen linear layer and its update as one step of autograd.

The update is added to the base layer's output in place, and its gradient of x to the base layer's. Beside the weight and the
factors, autograd saves x once and ``x Aᵀ``.
"""

import threading
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import ops
from ..adapters.base import Factors

_unsafe_view = torch.ops.aten._unsafe_view.default
_FEW = 512  # products of a row and a factor: 128 rows of rank 4
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def can_fuse(layer: nn.Module, x: Tensor, factors: Factors) -> bool:
    """Whether :func:`linear` may stand for a call of the frozen ``layer`` and an update of its output.

    Not if something else needs to see the call: a hook, a graph or a function transform. And not without gradients, where this
    saves nothing.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    own = vars(layer)
    weight, bias = own["_parameters"].get("weight"), own["_parameters"].get("bias")
    return (
        type(weight) is nn.Parameter
        and not weight.requires_grad
        and (bias is None or (type(bias) is nn.Parameter and not bias.requires_grad))
        and type(x) in (Tensor, nn.Parameter)
        and x.dim() > 1
        and not x.is_nested
        and not x.is_inference()
        and x.device == weight.device
        and (x.dtype == weight.dtype == factors.A.dtype or _autocasts(x, weight, factors.A.dtype))
        and factors.d is None
        and factors.e is None
        and type(layer).forward is nn.Linear.forward
        and "forward" not in own
        and layer._compiled_call_impl is None
        and not any(map(own.__getitem__, _HOOKS))
        and not _has_any_global_hook()
        and not ops.is_recorded()
    )


def _autocasts(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether autocast makes the layer compute in ``dtype``."""
    return (
        torch.is_autocast_enabled(x.device.type)
        and torch.get_autocast_dtype(x.device.type) == dtype
        and x.is_floating_point()
        and torch.float64 not in (x.dtype, weight.dtype)  # which autocast does not cast
    )


def linear(layer: nn.Linear, x: Tensor, factors: Factors) -> Tensor:
    """``layer(x)`` plus the update, in the factors' dtype."""
    y: Tensor = _Linear.apply(x, layer.weight, layer.bias, factors.A, factors.B)  # type: ignore[no-untyped-call]
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        need_x, _, _, need_A, need_B = ctx.needs_input_grad
        cast = _cast(x, A.dtype)
        rows = cast.reshape(-1, x.shape[-1])
        weight = weight.to(A.dtype)  # as autocast does for each call, too, saving the copy
        y = F.linear(rows, weight, None if bias is None else bias.to(A.dtype))
        if torch._C._len_torch_dispatch_stack() > 0:  # a mode may keep outputs: that of selective checkpointing does
            y = y.clone()
        if _are_few(rows, A):
            hidden = torch.ops.vblora.low_rank_add_.default(y, rows, A, B)
        else:
            hidden = rows @ A.T
            y.addmm_(hidden, B)
        ctx.x_dtype = x.dtype
        ctx.save_for_backward(
            cast if need_A or need_B else None, weight if need_x else None, A, B, hidden if need_B else None
        )
        # Not a view, which could not be modified in place.
        return y if x.dim() == 2 else _unsafe_view(y, (*x.shape[:-1], y.shape[1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, _, _, need_A, need_B = ctx.needs_input_grad
        x, weight, A, B, hidden = ctx.saved_tensors
        shape = (*grad.shape[:-1], A.shape[1])
        grad = grad.reshape(-1, grad.shape[-1])
        rows = None if x is None else x.reshape(-1, A.shape[1])
        if torch.is_grad_enabled() and rows is not None:  # a derivative of this backward
            if ctx.x_dtype != A.dtype:
                raise RuntimeError(
                    f"an adapted layer that autocast ran in {A.dtype} cannot be differentiated twice, because its input of "
                    f"{ctx.x_dtype} is not saved. Leave out create_graph, or run the forward without autocast."
                )
            hidden = rows @ A.T
        elif rows is not None and need_A and need_B and _are_few(rows, A):
            grad_x = grad @ weight if need_x else None
            grad_A, grad_B = torch.ops.vblora.low_rank_backward.default(grad, rows, hidden, A, B, grad_x)
            return None if grad_x is None else grad_x.view(shape).to(ctx.x_dtype), None, None, grad_A, grad_B
        elif hidden is not None:
            hidden = hidden.to(A.dtype)
        grad_x = grad_A = None
        grad_B = hidden.T @ grad if need_B else None
        if need_x or need_A:
            grad_hidden = grad @ B.T
            if need_A:
                grad_A = grad_hidden.T @ rows
            if need_x:
                grad_x = (grad @ weight).addmm_(grad_hidden, A).view(shape).to(ctx.x_dtype)
        return grad_x, None, None, grad_A, grad_B


def _are_few(rows: Tensor, A: Tensor) -> bool:
    """Whether to take our operators for the products with factors, which are then faster than torch's.

    In float32 they are, too, but there an output keeps its bits when gradients are turned off."""
    return rows.is_cpu and rows.dtype == torch.bfloat16 and rows.shape[0] * A.shape[0] <= _FEW


class _Last(threading.local):
    """The last tensor that this thread cast, its version, and the copy, which is dropped with the tensor."""

    entry: tuple[weakref.ref[Tensor], int, Tensor] | None = None


_last = _Last()


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``. Layers that get the same tensor, such as query, key and value, share the copy.

    Only of what autograd has computed: you can refill a tensor of your own without a trace, through ``.data`` or NumPy's array.
    """
    if x.dtype == dtype:
        return x
    if x.is_leaf:
        return x.to(dtype)
    if _last.entry is not None:
        of, version, copy = _last.entry
        if of() is x and version == x._version and copy.dtype == dtype:
            return copy
    copy = x.to(dtype)
    _last.entry = weakref.ref(x, _forget), x._version, copy
    return copy


def _forget(of: weakref.ref[Tensor]) -> None:
    if _last.entry is not None and _last.entry[0] is of:
        _last.entry = None
