"""Builds the CUDA kernels for the CPU, with CMake, and hands out what was built."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import importlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import vblora  # noqa: F401 (its operators)
from tests.machine_code import toolkit

ROOT = Path(__file__).parents[2]
ORDERS = ("ascending", "descending", "random")


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
    includes = f"{toolkit.include()};{toolkit.include() / 'cccl'}"
    options = [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}", "-DVBLORA_CPU_ONLY=1"]
    options.append(f"-DVBLORA_CUDA_INCLUDE={includes}")
    configure = [cmake, "-S", str(root), "-B", str(folder), "-G", "Ninja", *options]
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
    for name in (
        *("admixture", "admixture_parts", "admixture_backward", "admixture_backward_parts"),
        *("compose", "add_updates_", "draw_logits_", "draw_uniform_"),
    ):
        # Schemas, and what tensors without data are told, are the same for all backends.
        operator = getattr(torch.ops.vblora, name)
        torch.library.define(f"vblora_emulated::{name}", str(operator.default._schema).removeprefix(f"vblora::{name}"))
        torch.library.register_fake(f"vblora_emulated::{name}", operator)
    torch.ops.load_library(library)
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


@contextlib.contextmanager
def in_place_of_the_cpu_kernels() -> Iterator[None]:
    """``torch.ops.vblora`` runs the emulated kernels of what a training step composes, so that a model trains with them."""
    load_operators()
    ours, names = torch.ops.vblora, ("admixture", "admixture_parts", "admixture_backward", "admixture_backward_parts")
    operators = {name: getattr(ours, name) for name in names}
    try:
        for name in names:
            setattr(ours, name, getattr(torch.ops.vblora_emulated, name))
        yield
    finally:
        for name, operator in operators.items():
            setattr(ours, name, operator)


def fail_next_launch(error: int, driver: int = 13000) -> None:
    """Make the next launch fail with this ``cudaError_t``, under a driver of this version (12080: CUDA 12.8)."""
    load_operators().vblora_emulation_fail_next_launch(error, driver)


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
