"""CUDA streams and graphs. All queries to torch are here, so that tests can replace them without a GPU."""

import torch
from torch import Tensor


def capturing(device: torch.device | None = None) -> bool:
    """Whether a CUDA graph is being captured on ``device``, by default the current one."""
    if (device is not None and device.type != "cuda") or not torch.cuda.is_initialized():  # on the CPU layers ask often
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def current(device: torch.device) -> torch.cuda.Stream | None:
    """The current stream of ``device``; None for the CPU."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return None
    return torch.cuda.current_stream(device)


def mark_used(tensor: Tensor, stream: torch.cuda.Stream) -> None:
    """Prevents reuse of the memory of ``tensor``, once freed, until ``stream`` has finished what is queued now."""
    tensor.record_stream(stream)
