"""Adds updates in inference by one operator, which sums in float32 and leaves rows without an adapter alone."""

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from .. import ops

_add_updates = torch.ops.vblora.add_updates_.default
_FEW = 32  # positions: beyond, matrix products are as fast for one adapter
_MOST_ON_GPU = 512, 16  # positions and rank: a GPU's matrix units do larger products


def is_plain() -> bool:
    """Whether this is eager inference, in which nothing needs to see each call: no graph, transform, mode or global hook."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or ops.is_recorded()
        or _has_any_global_hook()
    )


def can_add(y: Tensor, x: Tensor, A: Tensor, *, few: bool = False) -> bool:
    """Whether :func:`added` takes these tensors in plain inference, and is the fastest way.

    Args:
        few: whether only few positions are worth it on the CPU, too.
    """
    if type(x) is not Tensor or type(y) is not Tensor or y.dtype != A.dtype or x.is_nested:
        return False
    if y.is_cpu:
        return x.is_cpu and A.is_cpu and not (few and x.numel() > _FEW * x.size(-1))
    positions, rank = _MOST_ON_GPU
    return (
        y.is_cuda
        and y.get_device() == x.get_device() == A.get_device()
        and x.numel() <= positions * x.size(-1)
        and A.size(-2) <= rank
    )


def added(y: Tensor, x: Tensor, A: Tensor, B: Tensor, adapters: Tensor | None, *, in_place: bool) -> Tensor:
    """``y`` plus the updates for ``x``; ``A``, ``B`` and ``adapters`` as in :func:`vblora.reference.add_updates_`."""
    if not in_place:
        y = y.clone()
    _add_updates(y, x if x.dtype == y.dtype else x.to(y.dtype), A, B, adapters)
    return y
