"""The arithmetic of an update, the same for every method: ``y + (((x Aᵀ) ∘ d) B) ∘ e``."""

import torch
from torch import Tensor

from .adapters.base import Factors


def add_product(y: Tensor, hidden: Tensor, factors: Factors) -> Tensor:
    """``y`` ``(*, out_features)`` with the update whose ``x Aᵀ`` is ``hidden`` ``(*, r)``, in ``y``'s dtype.

    ``d`` scales what is ``(*, r)`` and ``e`` what is ``(*, out_features)``: B may be a view of a larger one, and neither it nor a
    scaled one is copied.
    """
    _, B, d, e = factors
    if d is not None:
        hidden = hidden * d
    if (y.device, y.dtype) != (hidden.device, hidden.dtype):
        update = hidden @ B
        return y + (update if e is None else update * e).to(y.device, y.dtype)
    if e is not None:
        return torch.addcmul(y, hidden @ B, e)
    if y.dim() == 3 and y.shape[0] == 1 and not torch.is_grad_enabled():  # a token's decoding: three calls less
        return torch.baddbmm(y, hidden, B[None])
    # The sum is formed while the product is: a pass over `y` less than a product and a sum take.
    return torch.addmm(y.reshape(-1, y.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), B).view(y.shape)
