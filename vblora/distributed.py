"""Distributed training: parameters sharded by FSDP2 (DTensors), and the process group.

DTensors are recognised by their methods, so ``torch.distributed.tensor`` is only imported where it is used.
"""

import os
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    return hasattr(tensor, "full_tensor")


def gather(tensor: Tensor) -> Tensor:
    """Gathers a DTensor for our operators, which take plain tensors; returns a plain tensor unchanged. A collective call.

    Like FSDP's gradients, the gradient is the mean over the processes.
    """
    if is_sharded(tensor):
        from torch.distributed.tensor import Partial

        mesh = tensor.device_mesh
        full: Tensor = tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim)
        if full.requires_grad:
            full.register_hook(lambda gradient: gradient / mesh.size())
        return full
    return tensor


def gather_to_cpu(tensor: Tensor) -> Tensor:
    """The full tensor, detached and on the CPU. A collective call if it is sharded."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if is_sharded(tensor) else tensor).cpu()


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Moves ``tensor`` to the device of ``other`` and shards it like ``other``. Every process passes the full tensor."""
    tensor = tensor.to(other.device)
    if is_sharded(other):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
    return tensor


def reshard(model: nn.Module) -> None:
    """Makes a model's parameters the sharded ones; FSDP2 leaves the gathered ones in place after some forwards."""
    for module in model.modules():
        reshard_module = getattr(module, "reshard", None)
        if callable(reshard_module):
            reshard_module()


def rank() -> int:
    return torch.distributed.get_rank() if _in_group() else 0


def processes() -> int:
    """The number of processes; before the process group exists, the one that the launcher set in ``WORLD_SIZE``."""
    return torch.distributed.get_world_size() if _in_group() else int(os.environ.get("WORLD_SIZE") or 1)


def _in_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
