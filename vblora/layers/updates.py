"""Adds updates in inference by one operator, which sums in float32 and leaves rows without an adapter alone."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import ops

_add_updates = torch.ops.vblora.add_updates_.default
_FEW = 8192  # positions times the square of the rank, on the CPU: 512 of rank 4, 32 of rank 16
_MOST_ON_GPU = 512, 16  # positions and rank: a GPU's matrix units do larger products


def is_seen() -> bool:
    """Whether something needs to see each call of a module: a graph, a transform of ``torch.func``, a trace or a global hook."""
    return torch.compiler.is_compiling() or ops.is_recorded() or _has_any_global_hook()


def is_plain() -> bool:
    """Whether this is inference in which nothing needs to see each call: neither :func:`is_seen` nor a dispatch mode."""
    return not (torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() or is_seen())


def has_hooks(own: dict[str, Any]) -> bool:
    """Whether a module with these attributes has hooks that see its call."""
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def linear_parameters(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None] | None:
    """Weight and bias of an ``nn.Linear`` whose call computes ``F.linear`` and does nothing else; None for other layers.

    Whether :func:`is_seen` is for you to ask.
    """
    own = layer.__dict__
    weight, bias = own["_parameters"].get("weight"), own["_parameters"].get("bias")
    if (
        type(weight) is nn.Parameter
        and (bias is None or type(bias) is nn.Parameter)
        and type(layer).forward is nn.Linear.forward
        and "forward" not in own
        and layer._compiled_call_impl is None
        and not has_hooks(own)
    ):
        return weight, bias
    return None


def are_few(x: Tensor, A: Tensor) -> bool:
    """Whether our operators take less time than torch's products for the update of ``x`` on the CPU."""
    return x.is_cpu and x.numel() * A.size(0) ** 2 <= _FEW * x.size(-1)


def can_add(y: Tensor, x: Tensor, A: Tensor, *, few: bool = False) -> bool:
    """Whether :func:`added` takes these tensors in plain inference, and is the fastest way.

    Args:
        few: whether only few positions are worth it on the CPU, too.
    """
    if type(x) is not Tensor or type(y) is not Tensor or y.dtype != A.dtype or x.is_nested:
        return False
    if y.is_cpu:
        return x.is_cpu and A.is_cpu and (not few or are_few(x, A))
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
