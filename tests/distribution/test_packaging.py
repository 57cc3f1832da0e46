"""sdist -> wheel -> installation, what is in each, and how a build that cannot be made says so.

One build for the CPU serves the whole file, from the unpacked sdist, so the working tree's own build is left alone.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import vblora

ROOT = Path(__file__).parents[2]
BUILD_VARIABLES = {
    *("DEBUG", "MAX_JOBS", "VBLORA_CPU_ONLY", "FORCE_CUDA", "CUDA_HOME", "CUDACXX", "TORCH_CUDA_ARCH_LIST"),
    "PYTHONPATH",
}

pytestmark = pytest.mark.slow


def run(*command, cwd, check=True, **variables):
    environ = {name: value for name, value in os.environ.items() if name not in BUILD_VARIABLES}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**environ, **{name: str(value) for name, value in variables.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert not check or done.returncode == 0, done.stdout
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distribution")


@pytest.fixture(scope="module")
def sdist(folder):
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder / f"vblora-{vblora.__version__}.tar.gz"


@pytest.fixture(scope="module")
def source(folder, sdist):
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"vblora-{vblora.__version__}"


@pytest.fixture(scope="module")
def wheel(folder, source):
    options = ("--verbose", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    output = run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=folder, VBLORA_CPU_ONLY=1).stdout
    assert output.count("building for the CPU only") == 1
    (path,) = folder.glob("vblora-*-py3-none-linux_*.whl")  # any Python
    return path


@pytest.fixture(scope="module")
def site(folder, wheel):
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder / "site", wheel, cwd=folder)
    return folder / "site"


def files(*patterns):
    paths = [path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in paths if "__pycache__" not in path.parts}


def test_the_sdist_has_all_that_a_build_and_its_tests_need(source):
    needed = files("csrc/**/*", "cmake/*", "tests/**/*", "vblora/**/*.py", "vblora/py.typed")
    needed |= files("*.md", "*.toml", "CMakeLists.txt", "Makefile", "setup.py", "LICENSE", ".clang-format")
    packed = {path.relative_to(source).as_posix() for path in source.rglob("*")}
    assert needed <= packed
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]


def test_the_wheel_has_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"vblora-{vblora.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        assert b"Root-Is-Purelib: false" in archive.read(f"{info}/WHEEL")
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    binary = "vblora/libvblora.so"
    expected = files("vblora/**/*.py", "vblora/py.typed", "vblora/finetune/e2e/*") | {binary}
    assert {name for name in names if not name.startswith(info)} == expected
    assert "vblora = vblora.cli:main" in entry_points
    for line in (
        "License-Expression: Apache-2.0 AND CC-BY-SA-4.0",
        "Requires-Python: >=3.11",
        "Requires-Dist: torch>=2.11",
        "Description-Content-Type: text/markdown",
    ):
        assert line in metadata.splitlines()
    assert re.findall(r"\]\((?!https?://|#)", metadata) == []  # a link that leads nowhere on a package index


def test_the_binary_needs_libtorch_cpu_and_the_system_alone(site):
    binary = site / "vblora" / "libvblora.so"
    dynamic = run("readelf", "--dynamic", "--wide", binary, cwd=site).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    system = {name for name in needed if re.match(r"(libstdc\+\+|libm|libgcc_s|libc|ld-linux-[\w-]+)\.so\.\d", name)}
    assert needed - system == {"libtorch_cpu.so"}
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)
    assert "BIND_NOW" in dynamic  # so that importing it proves every symbol to be there
    undefined = run("nm", "--dynamic", "--undefined-only", binary, cwd=site).stdout
    assert not re.search(r" U _?Py", undefined)  # one file for every Python


def test_the_binary_needs_no_newer_torch_than_the_oldest_supported(site):
    audit = Path(sysconfig.get_path("scripts")) / "torch-abi-audit"
    report = json.loads(run(audit, "--json", site / "vblora", cwd=site).stdout)
    (module,) = report["bundled_libs"]
    assert module["torch"]["stable"]
    assert module["torch"]["unknown_shim_symbols"] == []
    assert module["torch"]["min_torch_version"] == "2.11.0"


def test_code_for_one_instruction_set_is_called_by_its_own_name_only(source, wheel):
    # An inline function that the linker shares between objects may be kept from the one for the newest processor.
    objects = sorted(source.glob("build/native-*/CMakeFiles/kernels_*.dir/**/*.o"))
    assert objects
    for path in objects:
        isa = re.search(r"kernels_(\w+)\.dir", str(path))[1]
        symbols = run("nm", "--defined-only", "--extern-only", "--demangle", path, cwd=source).stdout.splitlines()
        assert symbols
        assert [line for line in symbols if f" T vblora::cpu::{isa}::" not in line] == []


def test_the_installed_wheel_runs(site):
    code = """if True:
        import torch, vblora
        bank, logits = torch.arange(6.0).view(3, 2), torch.tensor([[0.0, 1.0, 1.0]])
        subvectors, indices, weights = torch.ops.vblora.admixture(logits, bank, None, 2)
        assert subvectors.tolist() == [[3.0, 4.0]] and indices.tolist() == [[1, 2]]
        print(vblora.__file__, vblora.__version__, vblora.build_info()["cuda"], vblora.build_info()["cuda_architectures"])
    """
    printed = run(sys.executable, "-P", "-c", code, cwd=site.parent, PYTHONPATH=site).stdout.split()
    assert printed == [str(site / "vblora" / "__init__.py"), vblora.__version__, "none", "none"]


def refusal(source, **variables):
    done = run(sys.executable, "setup.py", "build_ext", cwd=source, check=False, **variables)
    assert done.returncode != 0
    assert "Traceback" not in done.stdout
    return " ".join(done.stdout.split())


@pytest.fixture
def toolkit(source, tmp_path):
    """A CUDA_HOME as far as asking it for its architectures goes, and something to compile, which it cannot."""
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho compute_75; echo compute_80; echo compute_90\n")
    compiler.chmod(0o755)
    kernel = source / "csrc" / "cuda" / "trial.cu"
    kernel.parent.mkdir(exist_ok=True)
    kernel.touch()
    yield tmp_path
    kernel.unlink()


def test_force_cuda_without_a_compiler(source, tmp_path):
    message = refusal(source, FORCE_CUDA=1, CUDA_HOME=tmp_path)
    assert f"FORCE_CUDA=1, but no CUDA compiler: CUDA_HOME={tmp_path} has no bin/nvcc" in message


@pytest.mark.parametrize(
    ("value", "why"), [("8.0;Ampere", "'Ampere' is not a compute"), ("13.0", "It supports 7.5;8.0;9.0")]
)
def test_a_wrong_architecture(source, toolkit, value, why):
    message = refusal(source, CUDA_HOME=toolkit, TORCH_CUDA_ARCH_LIST=value)
    assert f"TORCH_CUDA_ARCH_LIST={value}: " in message
    assert why in message


def test_too_old_a_torch(source, tmp_path):
    metadata = tmp_path / "torch-2.10.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.10.0\n")
    message = refusal(source, PYTHONPATH=tmp_path)
    assert "vblora builds against torch >= 2.11, but torch 2.10.0 is installed" in message
