"""How many threads of a kernel a multiprocessor holds, by NVIDIA's own reckoning (cuda_occupancy.h)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import toolkit
from .toolkit import Kernel

THREADS = 256  # of each block: kThreads in launch.cuh
# What the launchers ask for in dynamic shared memory at most: a SortedRange.
DYNAMIC_SHARED = {"backward_rows_kernel": 28_712}


def calculator(folder: Path) -> Callable[[Kernel], float]:
    """A function from a kernel to the share of a multiprocessor's threads that its blocks can be. Compiles into `folder`."""
    program = folder / "occupancy"
    toolkit.run("g++", "-I", toolkit.include(), "-o", program, Path(__file__).with_suffix(".cpp"))

    def share(kernel: Kernel) -> float:
        numbers = kernel.arch, THREADS, kernel.registers, kernel.shared, DYNAMIC_SHARED.get(kernel.name, 0)
        blocks, most = map(int, toolkit.run("sh", "-c", f"echo {' '.join(map(str, numbers))} | {program}").split())
        return blocks * THREADS / most

    return share
