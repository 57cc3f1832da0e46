"""Builds the CUDA kernels for the CPU, with CMake, and hands out what was built."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import importlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import vblora  # noqa: F401 (its operators)

ROOT = Path(__file__).parents[2]
ORDERS = ("ascending", "descending", "random")


def cuda_include() -> list[Path]:
    """Folders with NVIDIA's headers: a CUDA toolkit's, or else those of its packages from PyPI."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.insert(1, str(Path(nvcc).resolve().parents[1]))
    folders = [Path(home, "include") for home in homes if home]
    if packages := importlib.util.find_spec("nvidia"):
        for package in packages.submodule_search_locations or ():
            folders += sorted(Path(package).glob("cu[0-9]*/include"), reverse=True)  # all in one folder since CUDA 13
    for folder in folders:
        if (folder / "cuda_runtime.h").exists() and (folder / "cuda_fp16.h").exists():
            return [folder, folder / "cccl"]
    raise FileNotFoundError(
        f"NVIDIA's headers (cuda_runtime.h, cuda_fp16.h) are in none of {', '.join(map(str, folders))}. "
        "Install a CUDA toolkit, or: pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"
    )


def _tool(name: str, folder: str) -> str:
    try:
        return str(Path(getattr(importlib.import_module(name), folder), name))
    except ImportError:
        if path := shutil.which(name):
            return path
        raise FileNotFoundError(f"building the emulated kernels needs {name}: pip install {name}") from None


def _run(*command: str) -> None:
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{process.stdout}")


@functools.cache
def build(target: str, root: Path = ROOT) -> Path:
    """Build one target of tests/emulation/CMakeLists.txt from the sources under `root`, as far as they have changed."""
    folder = root / "build" / "emulation"
    cmake, ninja = _tool("cmake", "CMAKE_BIN_DIR"), _tool("ninja", "BIN_DIR")
    includes = ";".join(map(str, cuda_include()))
    options = [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}", "-DVBLORA_CPU_ONLY=1"]
    configure = [
        cmake,
        "-S",
        str(root),
        "-B",
        str(folder),
        "-G",
        "Ninja",
        *options,
        f"-DVBLORA_CUDA_INCLUDE={includes}",
    ]
    stamp = folder / "configured-with.txt"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # other test processes wait, and find it done
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != "\n".join(configure):
            _run(*configure, "--fresh")
            stamp.write_text("\n".join(configure))
        _run(cmake, "--build", str(folder), "--target", target)
    (built,) = (path for path in (folder / "tests" / "emulation").glob(f"{target}*") if path.suffix in ("", ".so"))
    return built


@functools.cache
def load_operators(root: Path = ROOT) -> ctypes.CDLL:
    """Make ``torch.ops.vblora_emulated`` (once in a process: torch keeps the first registration)."""
    library = build("vblora_emulated", root)
    torch.ops.load_library(library)
    for name in (
        "admixture",
        "admixture_backward",
        "compose",
        "draw_logits_",
    ):  # what tensors without data are told is the same for all
        torch.library.register_fake(f"vblora_emulated::{name}", getattr(torch.ops.vblora, name))
    functions = ctypes.CDLL(str(library))  # the same library again, for what is not an operator
    functions.vblora_emulation_set.argtypes = (ctypes.c_int, ctypes.c_uint64, ctypes.c_int)
    functions.vblora_emulation_launches.restype = ctypes.c_char_p
    return functions


class Operators:
    """`torch.ops.vblora_emulated`, each call in one of ORDERS; built when the first operator is asked for."""

    def __init__(self, order: str):
        self.order = order

    def __getattr__(self, name: str) -> Callable:
        load_operators()
        operator = getattr(torch.ops.vblora_emulated, name)

        @functools.wraps(operator)
        def run(*arguments, **named):
            with thread_order(self.order, seed=random.getrandbits(32)):
                return operator(*arguments, **named)

        return run


@contextlib.contextmanager
def thread_order(order: str, seed: int = 0, workers: int = 0) -> Iterator[None]:
    """In which order threads and blocks run where nothing makes them wait; how many blocks at once (0: all cores)."""
    functions = load_operators()
    functions.vblora_emulation_set(ORDERS.index(order), seed, workers)
    try:
        yield
    finally:
        functions.vblora_emulation_set(0, 0, 0)


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int


def parse_launches(lines: str) -> list[Launch]:
    found = map(json.loads, lines.splitlines())
    return [Launch(f["kernel"], tuple(f["grid"]), tuple(f["block"]), f["shared_bytes"]) for f in found]


def launches() -> list[Launch]:
    """The kernels that were launched since this was last called."""
    functions = load_operators()
    lines = functions.vblora_emulation_launches().decode()
    functions.vblora_emulation_forget_launches()
    return parse_launches(lines)
