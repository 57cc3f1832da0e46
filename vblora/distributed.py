"""Several processes: parameters of which each holds a part (FSDP2's DTensors), and draws that all must make alike.

Sharded tensors are told by their methods, so that ``torch.distributed.tensor`` is imported by those who use it.
"""

import os

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def gather(tensor: Tensor) -> Tensor:
    """All of a tensor, for our operators, which take no DTensor; a plain one is returned as it is. All processes take part.

    Its gradient is the mean of what the processes make of it, each on data of its own, as FSDP's are.
    """
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    mesh = tensor.device_mesh
    full = tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda gradient: gradient / mesh.size())
    return full


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached and on the CPU. All processes take part."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if is_sharded(tensor) else tensor).cpu()


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """``tensor``, which every process has all of, on the device of ``model`` and sharded as that is."""
    tensor = tensor.to(model.device)
    if not is_sharded(model):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Puts the sharded parameters back, in whose place FSDP2 leaves the gathered ones after some forwards."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def rank() -> int:
    return torch.distributed.get_rank() if _in_group() else 0


def processes() -> int:
    """How many train together, as far as can be told: a launcher says it before there is a process group."""
    return torch.distributed.get_world_size() if _in_group() else int(os.environ.get("WORLD_SIZE") or 1)


def _in_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
