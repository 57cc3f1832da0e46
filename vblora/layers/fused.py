"""A frozen linear layer and its update as one step of autograd.

The update is added to the base layer's output in place, and its gradient of x to the base layer's. Autograd saves x once and
``x Aᵀ``; the weight and the factors are kept without it.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import streams
from ..adapters.base import Factors
from . import updates

_unsafe_view = torch.ops.aten._unsafe_view.default
_add_updates = torch.ops.vblora.add_updates_.default
_low_rank_backward = torch.ops.vblora.low_rank_backward.default


def can_fuse(layer: nn.Module, x: Tensor, factors: Factors) -> bool:
    """Whether :func:`linear` may stand for a call of the frozen ``layer`` and an update of its output.

    Not if something else needs to see the call: a hook on the layer, or :func:`updates.is_seen`, which is for you to ask.
    Autograd cannot save a tensor of inference mode, so with such an x only :func:`updates.added` may.
    """
    parameters = updates.linear_parameters(layer)
    if parameters is None:
        return False
    weight, bias = parameters
    return (
        not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and type(x) in (Tensor, nn.Parameter)
        and x.dim() > 1
        and not x.is_nested
        and x.device == weight.device
        and (x.dtype == weight.dtype == factors.A.dtype or _autocasts(x, weight, factors.A.dtype))
        and factors.d is None
        and factors.e is None
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
    if not torch.is_grad_enabled():
        return _forward(x, layer.weight, layer.bias, factors.A, factors.B).y
    y: Tensor = _Linear.apply(x, layer.weight, layer.bias, factors.A, factors.B)  # type: ignore[no-untyped-call]
    return y


class _Forward(NamedTuple):
    y: Tensor
    x: Tensor  # as it was multiplied, cast or not
    weight: Tensor  # likewise
    hidden: Tensor | None  # x Aᵀ, if torch's products computed it


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> _Forward:
    dtype = A.dtype
    cast = _cast(x, dtype)
    if weight.dtype != dtype:
        weight = weight.to(dtype)  # as autocast does for each call, too, saving the copy
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    # With a bias, torch would make a view, which could not be modified in place.
    rows = cast if bias is None else cast.reshape(-1, x.shape[-1])
    y = F.linear(rows, weight, bias)
    if torch._C._len_torch_dispatch_stack() > 0:  # a mode may keep outputs: that of selective checkpointing does
        y = y.clone()
    hidden = None
    if takes_operators(cast, A):
        _add_updates(y, rows, A, B)
    else:
        hidden = F.linear(rows.reshape(-1, A.shape[1]), A)
        y.view(-1, B.shape[1]).addmm_(hidden, B)
    return _Forward(y if y.dim() == x.dim() else _unsafe_view(y, (*x.shape[:-1], y.shape[1])), cast, weight, hidden)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        need_x, _, _, need_A, need_B = ctx.needs_input_grad
        y, cast, used, hidden = _forward(x, weight, bias, A, B)
        ctx.x_dtype = x.dtype
        if need_x or need_A or need_B:
            # A cast copy takes memory of its own, which checkpointing may drop.
            keeps_weight = need_x and used is weight and not weight.is_inference()
            _keep(ctx, A, B, weight if keeps_weight else None)
            ctx.save_for_backward(
                cast if need_A or need_B else None,
                hidden if need_B else None,
                used if need_x and not keeps_weight else None,
            )
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, _, _, need_A, need_B = ctx.needs_input_grad
        x, hidden, copy = ctx.saved_tensors
        A, B, own = _kept(ctx)
        weight = copy if own is None else own
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
        rows: Any = None if x is None else x.reshape(-1, A.shape[1])
        if torch.is_grad_enabled() and rows is not None:  # a derivative of this backward
            if ctx.x_dtype != A.dtype:
                raise RuntimeError(
                    f"an adapted layer that autocast ran in {A.dtype} cannot be differentiated twice, because its input of "
                    f"{ctx.x_dtype} is not saved. Leave out create_graph, or run the forward without autocast."
                )
            hidden = None
        if hidden is None and rows is not None:
            hidden = F.linear(rows, A)
        grad_x = grad_A = None
        grad_B = hidden.T @ grad if need_B else None
        if need_x or need_A:
            grad_hidden = F.linear(grad, B)
            if need_A:
                grad_A = grad_hidden.T @ rows
            if need_x:
                grad_x = (grad @ weight).addmm_(grad_hidden, A).view(shape)
                if grad_x.dtype != ctx.x_dtype:
                    grad_x = grad_x.to(ctx.x_dtype)
        return grad_x, None, None, grad_A, grad_B


# Private: torch has no public way to ask whether backward retains the graph. Without this, tensors are kept as long as the graph.
_retains_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _keep(ctx: Any, A: Tensor, B: Tensor, weight: Tensor | None) -> None:
    """Saves inputs that outlive the forward anyway: the factors, and the frozen weight.

    ``save_for_backward`` hands each tensor to the hooks on saved tensors. Those of activation checkpointing then take 5 to 10 µs
    for each tensor of each layer, in Python, and those of ``save_on_cpu`` would copy the weight.
    """
    ctx.kept = A, B, weight
    ctx.versions = A._version, B._version, 0 if weight is None else weight._version


def _kept(ctx: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """What was kept. As with saved tensors, it must not have changed, and is released unless the graph is retained."""
    kept: tuple[Tensor, Tensor, Tensor | None] | None = ctx.kept
    if kept is None:
        raise RuntimeError(
            "backward runs a second time through an adapted layer, whose tensors the first time has released. Pass "
            "retain_graph=True to the first backward."
        )
    for name, tensor, version in zip(("factor A", "factor B", "frozen weight"), kept, ctx.versions, strict=True):
        if tensor is not None and tensor._version != version:
            raise RuntimeError(
                f"the {name} of an adapted layer, of shape {tuple(tensor.shape)}, which is needed for gradient computation, has "
                f"been modified by an inplace operation: it is at version {tensor._version}; expected version {version}. Run "
                "backward before you change it and before the optimizer steps."
            )
    if not _retains_graph():
        ctx.kept = None
    return kept


class _Last(threading.local):
    """The last tensor that this thread cast, its version, the stream, and the copy, which is dropped with the tensor."""

    entry: tuple[weakref.ref[Tensor], int, torch.cuda.Stream | None, Tensor] | None = None


_last = _Last()


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``. Layers that get the same tensor, such as query, key and value, share the copy, on one CUDA stream: another
    one would not wait for it.

    Only of what autograd has computed: you can refill a tensor of your own without a trace, through ``.data`` or NumPy's array.
    """
    if x.dtype == dtype:
        return x
    if x.is_leaf:
        return x.to(dtype)
    stream = streams.current(x.device)
    if _last.entry is not None:
        of, version, cast_on, copy = _last.entry
        if of() is x and version == x._version and cast_on == stream and copy.dtype == dtype:
            return copy
    copy = x.to(dtype)
    _last.entry = weakref.ref(x, _forget), x._version, stream, copy
    return copy


def _forget(of: weakref.ref[Tensor]) -> None:
    if _last.entry is not None and _last.entry[0] is of:
        _last.entry = None
