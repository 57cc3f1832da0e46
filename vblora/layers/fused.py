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
from . import updates

_unsafe_view = torch.ops.aten._unsafe_view.default
_add_updates = torch.ops.vblora.add_updates_.default
_low_rank_backward = torch.ops.vblora.low_rank_backward.default


def can_fuse(layer: nn.Module, x: Tensor, factors: Factors) -> bool:
    """Whether :func:`linear` may stand for a call of the frozen ``layer`` and an update of its output.

    Not if something else needs to see the call: a hook, a graph or a function transform. Autograd cannot save a tensor of
    inference mode, so with such an x only :func:`updates.added` may.
    """
    if torch.compiler.is_compiling():
        return False
    own = layer.__dict__
    parameters = own["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias")
    return (
        type(weight) is nn.Parameter
        and not weight.requires_grad
        and (bias is None or (type(bias) is nn.Parameter and not bias.requires_grad))
        and type(x) in (Tensor, nn.Parameter)
        and x.dim() > 1
        and not x.is_nested
        and x.device == weight.device
        and (x.dtype == weight.dtype == factors.A.dtype or _autocasts(x, weight, factors.A.dtype))
        and factors.d is None
        and factors.e is None
        and type(layer).forward is nn.Linear.forward
        and "forward" not in own
        and layer._compiled_call_impl is None
        and not updates.has_hooks(own)
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


def takes_operators(x: Tensor, A: Tensor) -> bool:
    """Whether our operators compute the update of ``x`` in training.

    In bfloat16 alone. In float32, torch's products take little longer, and layers that cannot be fused round as they do.
    """
    return A.dtype == torch.bfloat16 and updates.are_few(x, A)


def linear(layer: nn.Linear, x: Tensor, factors: Factors) -> Tensor:
    """``layer(x)`` plus the update, in the factors' dtype."""
    y: Tensor = _Linear.apply(x, layer.weight, layer.bias, factors.A, factors.B)  # type: ignore[no-untyped-call]
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        need_x, _, _, need_A, need_B = ctx.needs_input_grad
        dtype = A.dtype
        cast = x if x.dtype == dtype else _cast(x, dtype)
        if weight.dtype != dtype:
            weight = weight.to(dtype)  # as autocast does for each call, too, saving the copy
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        few = takes_operators(cast, A)
        direct = bias is None and few  # with a bias, torch makes a view, which could not be modified in place
        rows = cast if direct else cast.reshape(-1, x.shape[-1])
        y = F.linear(rows, weight, bias)
        if torch._C._len_torch_dispatch_stack() > 0:  # a mode may keep outputs: that of selective checkpointing does
            y = y.clone()
        hidden = None
        if few:
            _add_updates(y, rows, A, B)
        else:
            hidden = rows @ A.T
            y.addmm_(hidden, B)
        ctx.x_dtype = x.dtype
        ctx.save_for_backward(
            cast if need_A or need_B else None, weight if need_x else None, A, B, hidden if need_B else None
        )
        return y if y.dim() == x.dim() else _unsafe_view(y, (*x.shape[:-1], y.shape[1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, _, _, need_A, need_B = ctx.needs_input_grad
        x, weight, A, B, hidden = ctx.saved_tensors
        if hidden is None and need_A and need_B and not torch.is_grad_enabled():  # few rows
            grad_x = None
            if need_x:
                grad_x = (grad if grad.is_contiguous() else grad.contiguous()) @ weight
            grad_A, grad_B = _low_rank_backward(grad, x, A, B, grad_x)
            if grad_x is not None and grad_x.dtype != ctx.x_dtype:
                grad_x = grad_x.to(ctx.x_dtype)
            return grad_x, None, None, grad_A, grad_B
        shape = (*grad.shape[:-1], A.shape[1])
        grad = grad.reshape(-1, grad.shape[-1])
        rows = None if x is None else x.reshape(-1, A.shape[1])
        if torch.is_grad_enabled() and rows is not None:  # a derivative of this backward
            if ctx.x_dtype != A.dtype:
                raise RuntimeError(
                    f"an adapted layer that autocast ran in {A.dtype} cannot be differentiated twice, because its input of "
                    f"{ctx.x_dtype} is not saved. Leave out create_graph, or run the forward without autocast."
                )
            hidden = None
        if hidden is None and rows is not None:
            hidden = rows @ A.T
        grad_x = grad_A = None
        grad_B = hidden.T @ grad if need_B else None
        if need_x or need_A:
            grad_hidden = grad @ B.T
            if need_A:
                grad_A = grad_hidden.T @ rows
            if need_x:
                grad_x = (grad @ weight).addmm_(grad_hidden, A).view(shape).to(ctx.x_dtype)
        return grad_x, None, None, grad_A, grad_B


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
