"""The operators' kernels under the checkers: no finding at any size, and how much memory they move."""

from __future__ import annotations

import random
import subprocess

import pytest

from . import build, checker

TYPES = ("f32", "f64", "bf16", "f16")


def problems(op: str, count: int) -> list[str]:
    """Sizes around those at which kernels change their ways, in combinations that are the same in each run."""
    draw = random.Random(f"2405 {op}")
    lines = []
    for _ in range(count):
        rows, length = draw.choice((1, 7, 33, 257)), draw.choice((1, 3, 8, 17, 64, 256))
        columns = draw.choice((1, 2, 17, 128, 300, 2048))
        k = min(columns, draw.choice((1, 2, 3, 4, 5, 8, 9, 33, 300)))
        candidates = draw.choice(("none", "i16", "i32"))
        vectors = columns if candidates == "none" else draw.choice((1, 100, 2048))
        options = {"rows": rows, "columns": columns, "length": length, "k": k, "candidates": candidates}
        options |= {
            "vectors": vectors,
            "type": draw.choice(TYPES),
            "out": draw.choice(TYPES),
            "seed": draw.randrange(1000),
        }
        if op == "compose":
            options["indices"] = draw.choice(("u8", "i16", "i32", "i64"))
        if op == "admixture_backward":
            grads = draw.choice(((1, 0), (0, 1), (1, 1)))
            needs = draw.choice(((1, 1), (1, 1), (1, 0), (0, 1)))
            names = ("grad_subvectors", "grad_weights", "need_logits", "need_bank")
            options |= dict(zip(names, grads + needs, strict=True))
        lines.append(" ".join([op, *(f"{name}={value}" for name, value in options.items())]))
    return lines


PROBLEMS = problems("admixture", 24) + problems("compose", 12) + problems("admixture_backward", 24)
PROBLEMS += [  # ways through the kernels that these sizes leave out
    "admixture rows=3 columns=9000 length=8 k=2",
    "admixture rows=2 columns=9000 length=8 k=33 type=bf16",
    "admixture_backward rows=3 columns=9000 length=8 k=33",  # more columns than owners fit in shared memory
    "admixture_backward rows=1500 columns=300 length=17 k=2 popular=1",  # a vector that most rows choose
    "admixture_backward rows=3000 columns=300 length=24 k=2 popular=2 out=bf16",
    "admixture_backward rows=2500 columns=5000 length=16 k=2 popular=2 need_logits=0",  # several vectors a bucket
    "admixture_backward rows=600 columns=4097 length=4 k=1 popular=-1 need_logits=0",  # fewer in the last one
    "admixture_backward rows=2 columns=1100 length=3 k=1100 need_bank=0",  # owners take all of shared memory
]
# Rows of half-precision numbers that are aligned to 8 bytes, but not to 16.
PROBLEMS += [
    f"{op} rows=300 columns=16 length=36 k=2 type=bf16 popular=1" for op in ("admixture", "admixture_backward")
]
# Rows that divide evenly, of tensors that are not aligned.
PROBLEMS += [f"admixture columns=128 candidates=i16 shifted={name}" for name in ("logits", "bank", "candidates")]
PROBLEMS += ["admixture columns=128 candidates=i32 type=bf16 shifted=candidates"]
PROBLEMS += ["compose shifted=bank", "draw rows=3 columns=256 shifted=logits"]
PROBLEMS += [
    f"admixture_backward rows=300 columns=16 k=2 type={type} out={out} popular=1 shifted={name}"
    for type, out in (("f32", "bf16"), ("bf16", "f32"))
    for name in ("grad_subvectors", "bank")
]
PROBLEMS += [
    *(f"draw rows=3 columns={columns} type={type}" for columns in (1, 257, 2048) for type in TYPES),
    *(f"draw_uniform rows=3 columns={columns} type={type}" for columns in (1, 257, 2048) for type in TYPES),
    "draw_uniform rows=3 columns=256 shifted=values",
    "draw rows=7 columns=1 vectors=1 candidates=i16",
    "draw rows=7 columns=1 vectors=255 candidates=i32 type=f64",
    "draw rows=33 columns=128 vectors=2048 candidates=i16",
    "draw rows=3 columns=300 vectors=300 candidates=i16 type=bf16",
    "draw rows=3 columns=1024 vectors=1025 candidates=i32 type=f16",
    "draw rows=2 columns=2999 vectors=5000 candidates=i16",  # in three rounds
    "draw rows=1 columns=3 vectors=700000 candidates=i32",  # more words alike in their first 8 bits than can be sorted
    # In the third round, what remains of the largest 8 bits and what is taken of the next fill all that can be sorted.
    "draw rows=1 columns=3072 vectors=785000 candidates=i32 seed=26",
]


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
    for name in OUTPUTS[op]:
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
    "workspace": 82,
}


def test_traffic_of_admixture_backward_at_full_size():
    sizes = (f"rows={ROWS}", f"vectors={VECTORS}", "length=256", "k=2", "out=bf16", *COMPACT)
    sample = (f"sample={EVERY}", f"first={RANGES}")
    report = checker.run(build.build("problems_trace"), "admixture_backward", *sizes, *sample)
    rows_kernel, bank_kernel, _ = report.launches  # the third reads flags that blocks which are left out did not write
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
    assert sum(moved.values()) <= 2350
