"""What can be said of the CUDA kernels without a GPU: they are compiled for each architecture, and looked at."""

from __future__ import annotations

import functools
import re

import pytest

from . import occupancy, toolkit
from .toolkit import Kernel

UNITS = pytest.mark.parametrize("unit", toolkit.translation_units())


def kernels(unit: str) -> tuple[Kernel, ...]:
    return toolkit.compile_kernels(unit).kernels


@UNITS
def test_compiles_for_every_architecture_without_warnings(unit):
    assert toolkit.compile_kernels(unit).warnings == ()
    instances = {arch: {k.instance for k in kernels(unit) if k.arch == arch} for arch in toolkit.architectures()}
    assert len(set(map(frozenset, instances.values()))) == 1
    assert all(len(found) >= 4 for found in instances.values())


def test_architectures_that_share_ptx_share_sources():
    asked = {
        int(arch) for path in toolkit.sources() for arch in re.findall(r"__CUDA_ARCH__ \S+ (\d+)", path.read_text())
    }
    assert asked and asked <= {10 * arch for arch in toolkit.PTX}


@UNITS
def test_no_local_memory(unit):
    assert [f"{k}: {k.stack} bytes of stack, {k.spills} of spills" for k in kernels(unit) if k.stack or k.spills] == []


@pytest.fixture(scope="module")
def share(tmp_path_factory):
    return occupancy.calculator(tmp_path_factory.mktemp("occupancy"))


@UNITS
def test_occupancy(unit, share):
    assert [f"{k}: {share(k):.0%}" for k in kernels(unit) if share(k) < 0.5] == []


def test_occupancy_is_reckoned_as_nvidia_documents_it(share):
    def kernel(arch: int, registers: int, shared: int = 0) -> Kernel:
        return Kernel("any", "any", arch, registers, 0, 0, shared)

    assert share(kernel(80, 32)) == 1
    assert share(kernel(80, 64)) == 0.5  # 65536 registers are 1024 threads of 64, of 2048
    assert share(kernel(75, 64)) == 1  # of 1024
    assert share(kernel(86, 64)) == pytest.approx(1024 / 1536)
    assert share(kernel(90, 65)) == 0.375  # registers come in eights: 72
    assert share(kernel(86, 32, 33 * 1024)) == pytest.approx(2 * 256 / 1536)  # each block takes 34 of 100 KiB


# Architectures to disassemble: the oldest, one in the middle, the newest.
DISASSEMBLED = pytest.mark.parametrize("arch", sorted({toolkit.ARCHITECTURES[i] for i in (0, 1, -1)}))


@functools.cache
def instructions(unit: str, arch: int) -> dict[str, set[str]]:
    code = toolkit.disassemble(unit, arch)
    return {
        name: set(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", text)) for name, text in code.items()
    }


@DISASSEMBLED
@UNITS
def test_instructions(unit, arch):
    if arch not in toolkit.architectures():
        pytest.skip(f"CUDA {toolkit.version()} does not compile for sm_{arch}")
    found = instructions(unit, arch)
    assert set(found) == {k.instance for k in kernels(unit) if k.arch == arch}
    for name, opcodes in found.items():
        assert "EXIT" in opcodes, name
        assert not [o for o in opcodes if re.match("LDL|STL", o)], f"{name} uses local memory"
        # Two kernels change integers in shared memory atomically. Nothing in global memory is, nor anything by trying
        # until it works, as those float atomics are that the hardware lacks.
        atomics = {o for o in opcodes if re.match("ATOM|RED(?!UX)|CAS", o)}
        allowed = r"ATOMS\.(ADD|POPC\.INC\.32)$" if name.startswith("draw_largest") else r"ATOMS\.MAX(\.S32)?$"
        assert not [o for o in atomics if not re.match(allowed, o)], f"{name}: {atomics}"
        assert not atomics or name.startswith("draw_largest") or "void" in name, f"{name}: {atomics}"


@DISASSEMBLED
@UNITS
def test_rows_are_read_and_written_16_bytes_at_a_time(unit, arch):
    if arch not in toolkit.architectures():
        pytest.skip(f"CUDA {toolkit.version()} does not compile for sm_{arch}")
    for name, opcodes in instructions(unit, arch).items():
        if "any_k" in name or "void" in name or "double" in name:
            continue  # the general paths read element by element, and 16 bytes of float64 may be fewer of another type
        if name.startswith("draw"):
            continue  # which reads nothing, and writes less than it computes
        if name.startswith("backward_split"):
            continue  # a thread an element, so that all parts of it are read at once
        if name.startswith("update_kernel"):
            continue  # lanes take neighbouring elements, as the CPU's partial sums do
        assert any(re.match(r"LDG\.E\.128", o) for o in opcodes), (
            f"{name} reads {sorted(o for o in opcodes if 'LDG' in o)}"
        )
        assert any(re.match(r"STG\.E\.128", o) for o in opcodes), (
            f"{name} writes {sorted(o for o in opcodes if 'STG' in o)}"
        )
