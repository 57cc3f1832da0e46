"""The operators' kernels under the checkers: no finding at any size, and how much memory they move."""

from __future__ import annotations

import subprocess

import pytest

from . import build, checker
from .problem_set import PROBLEMS

# Of these, every byte is to be written exactly once. (Not of weights: for a large k they are normalised in place.)
OUTPUTS = {
    "admixture": ("subvectors", "indices"),
    "compose": ("subvectors",),
    "admixture_backward": ("grad_logits", "grad_bank"),
    "draw": ("logits", "candidates"),
    "draw_uniform": ("values",),
}


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_nothing_is_found(problem):
    op, *options = problem.split()
    report = checker.run(build.build("problems_trace"), op, *options)
    assert not report.findings, "\n".join(map(str, report.findings))
    assert not report.output
    for name in OUTPUTS.get(op, ()):
        if name in report.sizes:
            assert report.writes[name] == {1: report.sizes[name]}, name


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_no_address_is_out_of_bounds(problem):
    process = subprocess.run(
        [build.build("problems_asan"), *problem.split()],
        env={"ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert not process.stderr


# Traffic, for a slice of Llama-2-7B's adapter: the sectors moved if nothing were ever found in a cache. The floor is
# what has to move at least: inputs and outputs once, but bank vectors once for each block that mixes them.

SLICE = ("rows=1024", "vectors=2048", "length=256", "k=2", "out=bf16")
COMPACT, DENSE = ("columns=128", "candidates=i16"), ("columns=2048",)


def traffic(op: str, *options: str) -> tuple[checker.Report, dict[str, int], float]:
    """The report, the bytes that were moved by buffer, and their sum as a multiple of the floor."""
    report = checker.run(build.build("problems_trace"), op, *SLICE, *options)
    moved = {name: sum(report.bytes_moved(launch, name) for launch in set(report.launches)) for name in report.sizes}
    floor = 0
    for name, size in report.sizes.items():
        if name == "bank":
            floor += sum(use.read_by_block for (_, buffer), use in report.uses.items() if buffer == "bank")
        elif name == "candidates" and op == "admixture_backward":
            floor += 2 * 2 * 1024  # of those that were selected
        elif name != "workspace":
            floor += size
    return report, moved, sum(moved.values()) / floor


def scattered(report: checker.Report, moved: dict[str, int]) -> dict[str, float]:
    """Places that move many more sectors than they need to, if they move more than a hundredth of all there are."""
    least = sum(moved.values()) / 32 / 100
    return {
        f"{buffer} {kind} at {place}": cost.ratio
        for (_, buffer, place, kind), cost in report.costs.items()
        if buffer != "shared" and cost.ratio > 1.05 and cost.units > least
    }


@pytest.mark.parametrize("options", [COMPACT, DENSE], ids=["candidates", "dense"])
def test_traffic_of_admixture(options):
    report, moved, multiple = traffic("admixture", *options)
    assert len(report.launches) == 1
    assert not scattered(report, moved)
    assert multiple <= 1.10


def test_traffic_of_compose():
    report, moved, multiple = traffic("compose")
    assert len(report.launches) == 1
    assert not scattered(report, moved)
    assert multiple <= 1.10


# Besides the floor: the gradients of the sub-vectors once more for each of the k entries, sorted entries, and where they begin.
@pytest.mark.parametrize(("options", "most"), [(COMPACT, 1.5), (DENSE, 1.2)], ids=["candidates", "dense"])
def test_traffic_of_admixture_backward(options, most):
    report, moved, multiple = traffic("admixture_backward", *options)
    assert len(report.launches) == 3
    assert not scattered(report, moved)
    assert multiple <= most


# The whole of Llama-2-7B's adapter, since what a slice of it leaves out is many ranges of sorted entries: all blocks that sort
# are run, and one in forty of the others, which are alike.
ROWS, ENTRIES, VECTORS = 39_040, 2 * 39_040, 2048
RANGES, EVERY = -(-ENTRIES // 2048), 40
# Bytes a row, without caches, as docs/cuda.md has them.
MOST = {
    "grad_subvectors": 1545,
    "grad_logits": 512,
    "grad_bank": 54,
    "indices": 16,
    "weights": 16,
    "candidates": 125,
    "workspace": 103,
}


def test_traffic_of_admixture_backward_at_full_size():
    sizes = (f"rows={ROWS}", f"vectors={VECTORS}", "length=256", "k=2", "out=bf16", *COMPACT)
    sample = (f"sample={EVERY}", f"first={RANGES}")
    report = checker.run(build.build("problems_trace"), "admixture_backward", *sizes, *sample)
    rows_kernel, bank_kernel, *_ = report.launches  # the others read flags that blocks which are left out did not write
    blocks = {rows_kernel: -(-ROWS // 32), bank_kernel: VECTORS // 8 - RANGES}
    sampled = {name: len(range(0, count, EVERY)) for name, count in blocks.items()}
    moved: dict[str, float] = dict.fromkeys(report.sizes, 0)
    for (launch, buffer, place, _), cost in report.costs.items():
        if buffer == "shared" or launch not in blocks:
            continue
        if launch == bank_kernel:
            scale = (RANGES + blocks[launch]) / (RANGES + sampled[launch])
        else:
            sorting = any("backward_sort" in line for line in place.lines)
            scale = 1 if sorting else blocks[launch] / sampled[launch]
        moved[buffer] += 32 * cost.units * scale / ROWS
    moved.pop("bank")
    assert {name: bytes for name, bytes in moved.items() if bytes > MOST[name] + 0.5} == {}
    assert sum(moved.values()) <= 2371
