"""What setup.py makes of the environment, before any compiler runs."""

import importlib.metadata
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from setuptools.errors import PlatformError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py"), run_name="setup"))


README = "![Score](docs/a.png) [guide](docs/a.md#x) · [paper](https://arxiv.org/abs/1) · [below](#limits)"


def test_the_readme_of_a_package_index_links_to_the_tag(script):
    tag = "https://forge.example/vblora/{}/v1.2.0/docs/a"
    assert script.index_readme(README, "https://forge.example/vblora/", "1.2.0") == (
        README.replace("docs/a.png", tag.format("raw") + ".png").replace("docs/a.md", tag.format("blob") + ".md")
    )


def test_the_readme_of_a_package_index_has_no_relative_link_without_an_address(script):
    expected = "Score guide · [paper](https://arxiv.org/abs/1) · [below](#limits)"
    assert script.index_readme(README, None, "1.2.0") == expected


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.14.1+cu130", "3.0.0a0+git1234"])
def test_torch_is_accepted(script, monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    script.check_torch()


@pytest.mark.parametrize("version", ["2.10.0+cu128", "2.9.0", "1.13.1"])
def test_too_old_a_torch_is_refused(script, monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(PlatformError) as error:
        script.check_torch()
    assert "torch >= 2.11" in str(error.value)
    assert version in str(error.value)


def test_a_missing_torch_is_named(script, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(PlatformError, match=r"torch >= 2\.11.*pip install torch"):
        script.check_torch()


def test_options_of_an_empty_environment(script):
    assert script.cmake_options({}) == [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DVBLORA_CPU_ONLY=0",
        "-DVBLORA_FORCE_CUDA=0",
        "-DVBLORA_CUDA_ARCH_LIST=",
    ]


@pytest.mark.parametrize(
    ("environ", "option"),
    [
        ({"DEBUG": "1"}, "-DCMAKE_BUILD_TYPE=Debug"),
        ({"DEBUG": "0"}, "-DCMAKE_BUILD_TYPE=Release"),
        ({"VBLORA_CPU_ONLY": "1"}, "-DVBLORA_CPU_ONLY=1"),
        ({"FORCE_CUDA": "1"}, "-DVBLORA_FORCE_CUDA=1"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}, "-DVBLORA_CUDA_ARCH_LIST=8.0;9.0+PTX"),
    ],
)
def test_option(script, environ, option):
    assert option in script.cmake_options(environ)


@pytest.mark.parametrize("name", ["DEBUG", "VBLORA_CPU_ONLY", "FORCE_CUDA"])
def test_a_flag_that_is_neither_on_nor_off(script, name):
    with pytest.raises(PlatformError, match=f"{name}='yes' is neither 1 .* nor 0"):
        script.cmake_options({name: "yes"})


def test_contradictory_flags(script):
    with pytest.raises(PlatformError, match="VBLORA_CPU_ONLY=1 and FORCE_CUDA=1 contradict"):
        script.cmake_options({"VBLORA_CPU_ONLY": "1", "FORCE_CUDA": "1"})


def test_jobs(script):
    assert script.jobs({}) == []
    assert script.jobs({"MAX_JOBS": "3"}) == ["--parallel", "3"]
    for value in ("0", "-1", "many"):
        with pytest.raises(PlatformError, match=f"MAX_JOBS='{value}' is not a positive number"):
            script.jobs({"MAX_JOBS": value})
