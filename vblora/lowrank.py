"""The arithmetic of an update, the same for every method: ``y + (((x Aᵀ) ∘ d) B) ∘ e``."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .adapters.base import Factors


def add_product(y: Tensor, hidden: Tensor, factors: Factors) -> Tensor:
    """``y`` ``(*, out_features)`` with the update whose ``x Aᵀ`` is ``hidden`` ``(*, r)``, in ``y``'s dtype.

    ``d`` scales what is ``(*, r)`` and ``e`` what is ``(*, out_features)``: B may be a view of a larger one, and neither it nor a
    scaled one is copied.
    """
    _, B, d, e = factors
    if d is not None:
        hidden = hidden * d
    if e is not None:
        return y + _ScaledProduct.apply(hidden, B, e).to(y.device, y.dtype)
    if (y.device, y.dtype) != (hidden.device, hidden.dtype):
        return y + (hidden @ B).to(y.device, y.dtype)
    # The sum is formed while the product is: a pass over `y` less than a product and a sum take.
    return torch.addmm(y.reshape(-1, y.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), B).view(y.shape)


class _ScaledProduct(torch.autograd.Function):
    """``(hidden B) ∘ e``, which keeps nothing as large as its result until backward.

    What the gradients of B and of e take is ``hiddenᵀ grad``, ``(r, out_features)``: no larger than B.
    """

    @staticmethod
    def forward(hidden: Tensor, B: Tensor, e: Tensor) -> Tensor:
        return (hidden @ B).mul_(e)

    @staticmethod
    def setup_context(ctx, inputs, _output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        hidden, B, e = ctx.saved_tensors
        for_hidden, for_B, for_e = ctx.needs_input_grad
        grad_hidden = (grad * e) @ B.T if for_hidden else None
        if not (for_B or for_e):
            return grad_hidden, None, None
        together = hidden.reshape(-1, hidden.shape[-1]).T @ grad.reshape(-1, grad.shape[-1])
        return grad_hidden, together * e if for_B else None, (together * B).sum(0) if for_e else None
