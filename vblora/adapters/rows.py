"""Some rows of a parameter, whose gradient covers only those rows where possible."""

from typing import Any

import torch
from torch import Tensor


def rows_of(tensor: Tensor, start: int, count: int) -> Tensor:
    """``tensor.narrow(0, start, count)``.

    The gradient of ``narrow`` is as large as ``tensor``, with zeros in the other rows. Under re-entrant activation checkpointing
    each recomputed layer runs its own backward, so each would write and add a full gradient. Here it adds only its rows to the
    existing gradient.
    """
    if not in_backward() or not tensor.requires_grad:
        return tensor.narrow(0, start, count)
    return _Rows.apply(tensor, start, count)  # type: ignore[no-untyped-call]


def in_backward() -> bool:
    """Whether a backward is running, where the work queued on this stream precedes the rest of it on every stream."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, start: int, count: int) -> Tensor:
        ctx.shape, ctx.start, ctx.count = tensor.shape, start, count
        ctx.set_materialize_grads(False)
        return tensor.narrow(0, start, count)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        total, returned = accumulated_gradient(ctx.next_functions[0][0], ctx.shape, grad)
        total.narrow(0, ctx.start, ctx.count).add_(grad)
        return returned, None, None


def accumulated_gradient(
    node: torch.autograd.graph.Node | None, shape: torch.Size, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The tensor that a backward adds to, for an input whose gradients go to ``node``, and what it returns for that input.

    If the input is a parameter whose ``grad`` accumulates, the tensor is that ``grad``, and None is returned: hooks on the
    parameter, such as DDP's, still run. Otherwise it is a new tensor of zeros.
    """
    parameter = _accumulated_parameter(node)
    if parameter is None:
        new = like.new_zeros(shape)
        return new, new
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
    return parameter.grad, None


def _accumulated_parameter(node: torch.autograd.graph.Node | None) -> Tensor | None:
    """The parameter whose ``grad`` accumulates the gradients of ``node``; None if there is none, or if a hook needs to see the
    gradient."""
    parameter: Tensor | None = getattr(node, "variable", None)
    if node is None or parameter is None or torch.is_grad_enabled():  # not a leaf; or a gradient of higher order
        return None
    if parameter._backward_hooks:
        return None
    if parameter.grad is not None and parameter.grad.layout != torch.strided:
        return None
    try:
        return parameter if torch._C._will_engine_execute_node(node) else None
    except RuntimeError:  # torch.autograd.grad, which returns the gradient instead
        return None
