"""Several processes on this machine, as ``torch.distributed`` has them."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing


def run_in_processes(function: Callable, folder: Path, *arguments, count: int = 2) -> list:
    """What ``function(*arguments)`` returned in each of ``count`` processes of one group, over gloo.

    Args:
        function: of a module, so that another process finds it.
        folder: empty; where processes meet, and leave what was returned.
    """
    torch.multiprocessing.spawn(_work, (count, str(folder), function, arguments), nprocs=count)
    return [torch.load(folder / f"returned-{rank}.pt", weights_only=False) for rank in range(count)]


def _work(rank: int, count: int, folder: str, function: Callable, arguments: tuple) -> None:
    # As a launcher says it; who meets through a file does not look at address and port.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    gc.freeze()  # as tests/conftest.py does
    store = torch.distributed.FileStore(f"{folder}/store", count)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=count)
    try:
        torch.save(function(*arguments), f"{folder}/returned-{rank}.pt")
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
