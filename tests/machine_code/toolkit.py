"""NVIDIA's compiler, headers and disassembler: from a CUDA toolkit, or else from their packages on PyPI, which the test extra
names. None of them needs a GPU.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What cmake/cuda.cmake compiles for, if nothing else is asked for, by the oldest architecture with the same PTX. nvcc's front end
# takes most of the time and runs once for each PTX here: the machine code is that of a build for each architecture of its own.
PTX = {75: (75,), 80: (80, 86, 89, 90), 100: (100, 120)}
ARCHITECTURES = tuple(arch for same in PTX.values() for arch in same)
# What results depend on, and so what is compiled here is compiled with too; as in CMakeLists.txt.
FLAGS = ("-std=c++20", "-O3", "--fmad=false")


def _homes() -> list[Path]:
    homes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    if nvcc := shutil.which("nvcc"):
        homes.append(Path(nvcc).resolve().parents[1])
    homes.append(Path("/usr/local/cuda"))
    if packages := importlib.util.find_spec("nvidia"):
        for package in packages.submodule_search_locations or ():
            homes += sorted(Path(package).glob("cu[0-9]*"), reverse=True)  # all in one folder since CUDA 13
    return homes


@functools.cache
def tool(name: str) -> Path:
    """`nvcc` or `nvdisasm`."""
    homes = _homes()
    for home in homes:
        if (path := home / "bin" / name).exists():
            return path
    raise FileNotFoundError(
        f"{name} is in none of {', '.join(str(home / 'bin') for home in homes)}. "
        "Install a CUDA toolkit, or what the test extra names: pip install 'vblora[test]'"
    )


@functools.cache
def include() -> Path:
    """NVIDIA's headers, for other compilers than nvcc, which knows where its own are."""
    for home in _homes():
        if (home / "include" / "cuda_occupancy.h").exists():
            return home / "include"
    raise FileNotFoundError(
        f"cuda_occupancy.h is in no `include` folder of {', '.join(map(str, _homes()))}. "
        "Install a CUDA toolkit, or what the test extra names: pip install 'vblora[test]'"
    )


def run(*command: object) -> str:
    process = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{process.stdout}")
    return process.stdout


@functools.cache
def version() -> str:
    return re.search(r"release ([\d.]+)", run(tool("nvcc"), "--version")).group(1)


@functools.cache
def architectures() -> tuple[int, ...]:
    known = set(map(int, re.findall(r"compute_(\d+)$", run(tool("nvcc"), "--list-gpu-arch"), re.MULTILINE)))
    return tuple(arch for arch in ARCHITECTURES if arch in known)


@dataclass(frozen=True)
class Kernel:
    """What the assembler says of a kernel, compiled for one architecture."""

    name: str  # of the function template, as in the source
    instance: str  # with its arguments
    arch: int
    registers: int
    stack: int
    spills: int
    shared: int  # static

    def __str__(self) -> str:
        return f"{self.instance} for sm_{self.arch}"


@dataclass(frozen=True)
class Compiled:
    kernels: tuple[Kernel, ...]
    warnings: tuple[str, ...]
    objects: Path  # a folder with one .cubin an architecture


def sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cuh")) + sorted((ROOT / "csrc").glob("*.h"))


def translation_units() -> list[str]:
    """The kernels' names: each .cu has a .cuh beside it that compiles without torch."""
    return sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))


@functools.cache
def compile_kernels(unit: str) -> Compiled:
    """All kernels that `launch_*` of this .cuh can launch, for all architectures; what was compiled before is kept."""
    digest = hashlib.sha256()
    for path in (*sources(), Path(__file__)):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(f"{tool('nvcc')} {version()} {architectures()}".encode())
    folder = ROOT / "build" / "machine-code" / f"{unit}-{digest.hexdigest()[:16]}"
    log = folder / "log.txt"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{unit}.lock", "w") as lock:  # other test processes wait, and find it done
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists():
            _compile(unit, folder, log)
    return Compiled(_parse(log.read_text()), tuple(re.findall(r".*warning.*", log.read_text())), folder)


def _compile(unit: str, folder: Path, log: Path) -> None:
    for old in folder.parent.glob(f"{unit}-*"):
        shutil.rmtree(old)
    folder.mkdir(parents=True)
    source = folder / f"{unit}.cu"
    source.write_text(f'#include "cuda/{unit}.cuh"\nauto* launcher = &vblora::cuda::launch_{unit};\n')
    targets = []
    for ptx, same in PTX.items():
        if codes := ",".join(f"sm_{arch}" for arch in same if arch in architectures()):
            targets.append(f"-gencode=arch=compute_{ptx},code=[{codes}]")
    output = run(
        tool("nvcc"), *FLAGS, *targets, "--threads", os.cpu_count() or 1, "-Xptxas", "-v",
        "-Xcompiler", "-Wall,-Wextra", "-I", ROOT / "csrc", "--keep", "--keep-dir", folder,
        "-c", source, "-o", folder / f"{unit}.o",
    )  # fmt: skip
    for path in folder.iterdir():
        if path.suffix != ".cubin" and path != source:
            path.unlink()
    log.write_text(output)


def _parse(log: str) -> tuple[Kernel, ...]:
    pattern = re.compile(
        r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<arch>\d+)a?'\n(?:ptxas info.*\n)?"
        r"\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
        r"ptxas info\s*: Used (?P<registers>\d+) registers(?P<rest>.*)"
    )
    found = list(pattern.finditer(log))
    assert len(found) == log.count("Compiling entry function"), "the assembler's output looks otherwise than expected"
    return tuple(
        Kernel(
            name=instance.split("<")[0],
            instance=instance,
            arch=int(match["arch"]),
            registers=int(match["registers"]),
            stack=int(match["stack"]),
            spills=int(match["stores"]) + int(match["loads"]),
            shared=int((re.search(r"(\d+) bytes smem", match["rest"]) or [0, 0])[1]),
        )
        for match, instance in zip(found, _instances([match["symbol"] for match in found]), strict=True)
    )


def _instances(symbols: list[str]) -> list[str]:
    """`admixture_kernel<float, 2>` of a symbol in an object file."""
    names = run("c++filt", *symbols).splitlines() if symbols else []
    return [re.sub(r"vblora::(cuda::)?|^void |\(.*", "", name.replace("(anonymous namespace)::", "")) for name in names]


@functools.cache
def disassemble(unit: str, arch: int) -> dict[str, str]:
    """The machine code of each kernel: its instance, as `Kernel` has it, and the lines of SASS."""
    (cubin,) = compile_kernels(unit).objects.glob(f"*_{arch}.cubin")
    parts = re.split(r"^\.text\.(\w+):\n", run(tool("nvdisasm"), "-c", cubin), flags=re.MULTILINE)
    return dict(zip(_instances(parts[1::2]), parts[2::2], strict=True))
