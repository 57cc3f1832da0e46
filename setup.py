"""Runs the native build, which CMakeLists.txt describes, with options from these environment variables:

DEBUG=1                enable asserts, warnings as errors and line info
MAX_JOBS=N             run N compilers at a time
VBLORA_CPU_ONLY=1      build without CUDA
FORCE_CUDA=1           fail if CUDA cannot be built
CUDA_HOME=DIR          CUDA toolkit (default: CUDACXX, nvcc on PATH, /usr/local/cuda)
TORCH_CUDA_ARCH_LIST   compute capabilities, such as "8.0;9.0+PTX"
"""

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError, PlatformError

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 11)


def check_torch() -> None:
    """Raises unless the installed torch has the stable ABI that the sources use."""
    needed = "torch >= {}.{}".format(*OLDEST_TORCH)
    try:
        found = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise PlatformError(f"vblora builds against {needed}, but torch is not installed: pip install torch") from None
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST_TORCH:
        raise PlatformError(
            f"vblora builds against {needed}, but torch {found} is installed: pip install --upgrade torch"
        )


def flag(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "")
    if value not in ("", "0", "1"):
        raise PlatformError(f"{name}={value!r} is neither 1 (on) nor 0 (off): set one of these, or unset {name}")
    return value == "1"


def cmake_options(environ: Mapping[str, str]) -> list[str]:
    debug, cpu_only, force_cuda = (flag(environ, name) for name in ("DEBUG", "VBLORA_CPU_ONLY", "FORCE_CUDA"))
    if cpu_only and force_cuda:
        raise PlatformError("VBLORA_CPU_ONLY=1 and FORCE_CUDA=1 contradict each other: unset one")
    return [
        f"-DCMAKE_BUILD_TYPE={'Debug' if debug else 'Release'}",
        f"-DVBLORA_CPU_ONLY={cpu_only:d}",
        f"-DVBLORA_FORCE_CUDA={force_cuda:d}",
        f"-DVBLORA_CUDA_ARCH_LIST={environ.get('TORCH_CUDA_ARCH_LIST', '')}",
    ]


def jobs(environ: Mapping[str, str]) -> list[str]:
    value = environ.get("MAX_JOBS", "")
    if value and not re.fullmatch("[1-9][0-9]*", value):
        raise PlatformError(
            f"MAX_JOBS={value!r} is not a positive number: set one, or unset MAX_JOBS for one job per core"
        )
    return ["--parallel", value] if value else []


def program(name: str, folder: str) -> str:
    """Path of a build tool: the PyPI package in this environment, which may not be on PATH, or the system's."""
    try:
        return str(Path(getattr(importlib.import_module(name), folder), name))
    except ImportError:
        path = shutil.which(name)
    if path is None:
        raise PlatformError(f"the build needs {name}, which is not installed: pip install {name}")
    return path


def run(*command: str) -> None:
    if status := subprocess.run(command).returncode:
        raise ExecError(f"{Path(command[0]).name} failed (exit code {status}); see the output above")


def index_readme(text: str, source: str | None, version: str) -> str:
    """The README for a package index, on which relative links lead nowhere.

    With an address of the sources (``Source`` in pyproject.toml's ``[project.urls]``), they become links to the files of this
    version's tag. Without one, only their texts are left.
    """

    def absolute(link: re.Match[str]) -> str:
        image, words, target = link.groups()
        if source is None:
            return words
        return f"{image}[{words}]({source.rstrip('/')}/{'raw' if image else 'blob'}/v{version}/{target})"

    return re.sub(r"(!?)\[([^]]+)\]\((?!https?://|#)([^)]+)\)", absolute, text)


def long_description() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return index_readme(readme, project["urls"].get("Source"), project["version"])


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        """A library without Python's C API, which has no suffix for a version of Python."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        check_torch()
        parallel = jobs(os.environ)
        cmake, ninja = program("cmake", "CMAKE_BIN_DIR"), program("ninja", "BIN_DIR")
        folder = ROOT / "build" / f"native-{sysconfig.get_platform()}"
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", *cmake_options(os.environ)]

        # CMake caches the compilers that it found, so configure from scratch if the environment has changed. Otherwise only
        # edited files are compiled again.
        variables = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "CUDACXX", "CUDAFLAGS", "PATH")
        inputs = "\n".join([*configure, *(f"{name}={os.environ.get(name, '')}" for name in variables)])
        stamp = folder / "configured-with.txt"
        fresh = not stamp.exists() or stamp.read_text() != inputs
        stamp.unlink(missing_ok=True)
        run(*configure, *(["--fresh"] if fresh else []))
        stamp.write_text(inputs)
        run(cmake, "--build", str(folder), *parallel)

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / target.name, target)


class AnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        long_description=long_description(),
        long_description_content_type="text/markdown",
        ext_modules=[Extension("vblora.libvblora", sources=[])],
        cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPython},
    )
