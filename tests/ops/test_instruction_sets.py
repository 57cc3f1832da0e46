"""The CPU kernels are compiled for several instruction sets; a process uses the best one. All give the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.slow]

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")  # a machine that supports one supports those before it
ROOT = Path(__file__).parents[2]


def run(seed: int, instruction_set: str | None) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "VBLORA_CPU_ISA"}
    if instruction_set is not None:
        environment["VBLORA_CPU_ISA"] = instruction_set
    command = [sys.executable, "-m", "tests.ops.print_digests", str(seed)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def digests(seed: int, instruction_set: str | None) -> dict[str, str]:
    process = run(seed, instruction_set)
    assert process.returncode == 0, process.stderr
    return dict(line.split("\t") for line in process.stdout.splitlines())


def test_same_bits_on_each_that_the_machine_has(backend, generator):
    seed = int(torch.randint(2**31, (), generator=generator))
    expected = digests(seed, None)
    assert len(expected) > 100
    best = expected.pop("instruction set")
    for instruction_set in INSTRUCTION_SETS[: INSTRUCTION_SETS.index(best) + 1]:
        results = digests(seed, instruction_set)
        assert results.pop("instruction set") == instruction_set
        assert results == expected


def test_an_unknown_name_is_refused(backend):
    process = run(0, "avx1024")
    assert process.returncode != 0
    assert "VBLORA_CPU_ISA" in process.stderr
    assert "avx1024" in process.stderr
