"""A run of rows of a trained tensor, and a gradient that is not all of its rows where that can be avoided."""

import torch
from torch import Tensor


def rows_of(tensor: Tensor, start: int, count: int) -> Tensor:
    """``tensor.narrow(0, start, count)``.

    The gradient of a ``narrow`` is a tensor of zeros as large as ``tensor``. A layer that re-entrant activation checkpointing
    recomputes runs a backward of its own, so each layer would write one and add it up. Here, a layer that is recomputed adds
    its rows to the gradient that is there.
    """
    # Only while a backward is under way: there, what is queued on this stream precedes the rest of it, on every stream.
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return tensor.narrow(0, start, count)
    return _Rows.apply(tensor, start, count)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, start: int, count: int) -> Tensor:
        ctx.shape, ctx.start, ctx.count = tensor.shape, start, count
        ctx.set_materialize_grads(False)
        return tensor.narrow(0, start, count)

    @staticmethod
    def backward(ctx, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        parameter = _accumulates(ctx.next_functions[0][0])
        if parameter is None:
            whole = grad.new_zeros(ctx.shape)
            whole.narrow(0, ctx.start, ctx.count).copy_(grad)
            return whole, None, None
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
        parameter.grad.narrow(0, ctx.start, ctx.count).add_(grad)
        return None, None, None  # DDP's hook, which waits for the parameter, is called all the same


def _accumulates(node: torch.autograd.graph.Node | None) -> Tensor | None:
    """The parameter to whose ``grad`` a gradient for ``node`` would be added in place; None if it goes elsewhere, or if somebody
    looks at what is added."""
    parameter = getattr(node, "variable", None)
    if parameter is None or torch.is_grad_enabled():  # computed from others; or a gradient with a history
        return None
    if parameter._backward_hooks:
        return None
    if parameter.grad is not None and parameter.grad.layout != torch.strided:
        return None
    try:
        return parameter if torch._C._will_engine_execute_node(node) else None
    except RuntimeError:  # torch.autograd.grad, which returns the gradient instead
        return None
