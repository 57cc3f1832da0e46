"""The native build, for the GPU at hand only; and beside it the kernels alone, as a program without torch."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from . import ROOT
from .phase import Phase, last_line

PROGRAM = "problems"  # in the work folder; its sources are tests/emulation's, which run on the CPU there
IMPORT = "import vblora; info = vblora.build_info(); print('CUDA', info['cuda'], info['cuda_architectures'], info['compiler'])"
LLAMA = "rows=39040 vectors=2048 length=256 k=2 columns=128 candidates=i16 out=bf16 repeat=50"


def run(phase: Phase) -> None:
    library = built_library(phase)
    if not phase.on_gpu:
        if library is None:
            phase.row("libvblora.so", "there is none in vblora/: build it first (CONTRIBUTING.md)", ok=False)
        else:
            result, ok = imported()
            phase.row("libvblora.so that is used", result, ok=ok)
        phase.skip("build for the GPU at hand", "there is no GPU")
        return
    if library is not None:
        result, ok = imported()
        phase.row("libvblora.so that was built before", result, ok=ok)
        if not ok:
            library.unlink()

    arch = capability()
    builds = {
        "libvblora.so": Build(build_library(phase, arch), phase.folder / "library.log"),
        "program without torch": Build(build_program(phase, arch), phase.folder / "program.log"),
    }
    while builds and phase.left() > 0:
        time.sleep(0.1)
        for name in [name for name, build in builds.items() if build.process.poll() is not None]:
            if report(phase, name, builds.pop(name), arch) and name == "libvblora.so" and built_library(phase) is None:
                use_library(phase)
    for name in builds:
        phase.row(f"{name} builds", "not done in time", ok=False)
    if built_library(phase) is None and (phase.folder / PROGRAM).exists():
        for op in ("admixture", "compose", "admixture_backward"):
            with phase.attempt(op):
                time_without_torch(phase, op)


def built_library(phase: Phase) -> Path | None:
    """The one that phases import."""
    return next((phase.folder / "site" / "vblora").glob("libvblora.so"), None)


def time_without_torch(phase: Phase, op: str) -> None:
    command = [str(phase.folder / PROGRAM), op, *LLAMA.split()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=20)
    phase.row(f"{op} of Llama-2-7B without torch", last_line(ran.stdout + ran.stderr), ok=ran.returncode == 0)


class Build:
    """Commands that run one after the other, in the background, until one fails."""

    def __init__(self, commands: list[list[str]], log: Path) -> None:
        self.log = log
        self.start = time.monotonic()
        script = " && ".join(["set -x", *map(shlex.join, commands)])
        environment = os.environ | {"CUDA_HOME": str(nvcc().parents[1])}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                ["bash", "-c", script], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )


def report(phase: Phase, name: str, build: Build, arch: str) -> bool:
    printed = build.log.read_text(encoding="utf-8", errors="replace")
    print(printed, flush=True)
    ok = build.process.returncode == 0
    seconds = time.monotonic() - build.start
    errors = re.findall(r"^(?!\+ ).*(?:error|fatal) *:.*|^CMake Error.*", printed, re.MULTILINE)
    result = f"{seconds:.0f} s for {arch}" if ok else (last_line(errors[0]) if errors else last_line(printed))
    phase.row(f"{name} builds", result, ok=ok, seconds=seconds)
    return ok


def use_library(phase: Phase) -> None:
    (built,) = (phase.folder / "native").glob("libvblora.so")
    target = phase.folder / "site" / "vblora" / built.name
    target.write_bytes(built.read_bytes())
    result, ok = imported()
    phase.row("libvblora.so that was built here", result, ok=ok)


def imported() -> tuple[str, bool]:
    process = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    return last_line(process.stdout if process.returncode == 0 else process.stderr), process.returncode == 0


def capability() -> str:
    """As TORCH_CUDA_ARCH_LIST has it: "9.0"."""
    try:
        import torch

        return "{}.{}".format(*torch.cuda.get_device_capability())
    except Exception as error:  # a torch that does not see the GPU: the program without torch may still tell something
        print(f"torch cannot say what the GPU is: {error}", flush=True)
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def nvcc() -> Path:
    from tests.machine_code import toolkit

    return toolkit.tool("nvcc")


def build_library(phase: Phase, arch: str) -> list[list[str]]:
    """CMake alone, since setuptools may be older than pyproject.toml asks for."""
    folder = phase.folder / "native"
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DVBLORA_CUDA_ARCH_LIST={arch}", "-DVBLORA_FORCE_CUDA=1"]
    return [configure, ["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1)]]


def build_program(phase: Phase, arch: str) -> list[list[str]]:
    number = arch.replace(".", "")
    target = f"-gencode=arch=compute_{number},code=sm_{number}"
    folder = ROOT / "tests" / "emulation"
    sources = [str(folder / "kernels.cpp"), str(folder / "problems.cpp")]
    # One file holds all kernels: without split-compile, one core would compile them.
    flags = ["-std=c++20", "-O3", "--fmad=false", "-lineinfo", "--split-compile=0", target]
    includes = ["-I", str(ROOT / "csrc"), "-I", str(folder)]
    return [[str(nvcc()), *flags, *includes, "-x", "cu", *sources, "-o", str(phase.folder / PROGRAM)]]
