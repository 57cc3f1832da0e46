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
    # Only during a backward, where the work queued on this stream precedes the rest of the backward on every stream.
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return tensor.narrow(0, start, count)
    return _Rows.apply(tensor, start, count)  # type: ignore[no-untyped-call]


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
        parameter = _accumulated_parameter(ctx.next_functions[0][0])
        if parameter is None:
            full = grad.new_zeros(ctx.shape)
            full.narrow(0, ctx.start, ctx.count).copy_(grad)
            return full, None, None
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
        parameter.grad.narrow(0, ctx.start, ctx.count).add_(grad)
        return None, None, None  # DDP's hook on the parameter still runs


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
