"""CUDA's streams and graphs: the one place that asks torch about them, so that tests can replace it where there is no GPU."""

import torch
from torch import Tensor


def capturing(device: torch.device | None = None) -> bool:
    """Whether work for ``device``, by default the current one, is being captured in a CUDA graph instead of run."""
    if not torch.cuda.is_initialized() or (device is not None and device.type != "cuda"):
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def current(device: torch.device) -> torch.cuda.Stream | None:
    """The stream on which work for ``device`` is queued now; None where there are no streams, as on the CPU."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return None
    return torch.cuda.current_stream(device)


def mark_used(tensor: Tensor, stream: torch.cuda.Stream) -> None:
    """Keeps the memory of ``tensor``, once it is freed, from being used again before ``stream`` has done what is queued now."""
    tensor.record_stream(stream)
