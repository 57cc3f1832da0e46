"""Which machine this is, and what it does at best."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys

import torch

from . import clock
from .phase import Phase, last_line

PACKAGES = (
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "triton",
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "expecttest",
)
PACKAGES += ("setuptools", "cmake", "ninja")
TOOLS = ("nvcc", "ncu", "compute-sanitizer", "g++", "cmake", "ninja")


def run(phase: Phase) -> None:
    driver = printed(
        "nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"
    )
    versions = f"torch {torch.__version__} (CUDA {torch.version.cuda}), Python {platform.python_version()}"
    if phase.on_gpu:
        p = torch.cuda.get_device_properties(0)
        name = f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors, L2 {p.L2_cache_size >> 20} MiB"
        phase.row("machine", f"{name}, driver {driver or '?'}; {versions}")
    else:
        phase.row("machine", f"a CPU, dry run; {versions}")
    phase.row("packages", ", ".join(f"{name} {version(name)}" for name in PACKAGES), detail=True)
    phase.row("tools", ", ".join(f"{name}: {shutil.which(name)}" for name in TOOLS), detail=True)
    phase.row("nvcc", last_line(printed("nvcc", "--version")) or "not on PATH", detail=True)
    phase.row("interpreter", sys.executable, detail=True)

    rate = clock.copy_rate(phase.device, phase.quick)
    phase.row("device copy, read and written", f"{rate / 1e12:.3g} TB/s", bytes_per_second=rate)
    with phase.attempt("L2 read"):
        # The difference of two sizes, so that what each launch costs falls out. Both fit in the L2 of a data centre's GPU.
        sizes = (1 << 16, 1 << 17) if phase.quick else (8 << 20, 24 << 20)
        arrays = [torch.rand(size // 4, device=phase.device) for size in sizes]
        less, more = (clock.replayed([array.sum], phase.device) for array in arrays)
        rate = (sizes[1] - sizes[0]) / max(more - less, 1e-9)
        phase.row(
            "L2 read, by torch.sum", f"at least {rate / 1e12:.3g} TB/s", bytes_per_second=rate, seconds=[less, more]
        )
    with phase.attempt("empty launch"):
        one = torch.zeros(1, device=phase.device)
        seconds = clock.replayed([lambda: one.add_(1)] * 100, phase.device)
        host = clock.issued(lambda: [one.add_(1) for _ in range(100)], phase.device) / 100
        result = f"{clock.microseconds(seconds)} in a graph, {clock.microseconds(host)} for the host to issue"
        phase.row("launch of next to nothing", result, in_graph=seconds, issued=host)
    if phase.on_gpu:
        with phase.attempt("two events"):
            seconds = clock.flushed([lambda: None], phase.device)
            phase.row("two events and nothing between, flushed", clock.microseconds(seconds), seconds=seconds)


def printed(*command: str) -> str:
    """What a program prints, or nothing if it is not there."""
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return process.stdout.strip()


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not there"
