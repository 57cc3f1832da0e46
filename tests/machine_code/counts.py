"""Warp instructions and loads in flight of the kernels that train an adapter of Llama-2-7B, counted in sm_90's machine code."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from . import toolkit
from .interpreter import Execution, Memory
from .occupancy import DYNAMIC_SHARED, THREADS

F32, F64, BF16, I16, I32 = 0, 1, 2, 5, 6  # Type in csrc
ROWS, VECTORS, LENGTH, K, COLUMNS = 39_040, 2048, 256, 2, 128
WARPS = 8  # of a block
RANGE = 2048  # entries that a block sorts
SORTED_BYTES = DYNAMIC_SHARED["backward_rows_kernel"]
# Entries of a vector above which it is popular, at this size; and in how many parts the largest of these are added up.
POPULAR_FROM, PARTS = 2 * ROWS * K // VECTORS, 16
WHOLE, SPLIT = 1, 2  # how a popular vector is done
FEW_RUNS, MANY_RUNS = 256, 2048  # of gradients, that a kernel has room for
ROWS_KERNEL, BANK_KERNEL = "backward_rows_kernel<float, bf16, GradRuns<{}> >", "backward_bank_kernel<bf16, float>"
POPULAR_KERNEL, SPLIT_KERNEL = "backward_popular_kernel<bf16, float>", "backward_split_kernel<float>"


def structure(**fields: type) -> type[ctypes.Structure]:
    return type("Structure", (ctypes.Structure,), {"_fields_": list(fields.items())})


BYTE, WORD, LONG, POINTER = ctypes.c_int8, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64
# As in csrc.
Admixture = structure(
    type=BYTE, candidate_type=BYTE, out_type=BYTE, logits=POINTER, bank=POINTER, candidates=POINTER, subvectors=POINTER,
    indices=POINTER, weights=POINTER, exhausted=POINTER, rows=LONG, columns=LONG, vectors=LONG, length=LONG, k=LONG,
)  # fmt: skip
Composition = structure(
    type=BYTE, index_type=BYTE, out_type=BYTE, bank=POINTER, indices=POINTER, weights=POINTER, subvectors=POINTER,
    rows=LONG, vectors=LONG, length=LONG, k=LONG,
)  # fmt: skip


Backward = structure(
    type=BYTE, candidate_type=BYTE, grad_type=BYTE, grad_runs=POINTER, num_grad_runs=LONG, grad_weights=POINTER,
    indices=POINTER, weights=POINTER, bank=POINTER, candidates=POINTER, grad_logits=POINTER, grad_bank=POINTER,
    rows=LONG, columns=LONG, vectors=LONG, length=LONG, k=LONG,
)  # fmt: skip
Workspace = structure(
    entries=LONG, ranges=WORD, buckets=WORD, shift=WORD, popular_from=WORD, alignment=WORD, owed=POINTER,
    vectors=POINTER, slices=POINTER, popular=POINTER, partials=POINTER, grad_weights=POINTER, bytes=LONG,
)  # fmt: skip


@dataclass(frozen=True)
class Count:
    instructions: int  # of warps
    units: int  # rows, or entries, that they were for
    in_flight: Counter  # by buffer: loads that are under way when the first of them is needed
    memory: Memory  # afterwards

    @property
    def each(self) -> float:
        return self.instructions / self.units


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def bf16(*shape: int, seed: int = 0) -> np.ndarray:
    return (numbers(*shape, seed=seed).view(np.uint32) >> 16).astype(np.uint16)


def run(
    unit: str, instance: str, units: int, memory: Memory, arguments: bytes, blocks: Iterable, dynamic: int = 0
) -> Count:
    static = next(k.shared for k in toolkit.compile_kernels(unit).kernels if (k.instance, k.arch) == (instance, 90))
    execution = Execution(toolkit.disassemble(unit, 90)[instance], memory)
    for block in blocks:
        execution.block(arguments, block if isinstance(block, tuple) else (block, 0, 0), static + dynamic)
    return Count(execution.instructions, units, execution.in_flight, memory)


def candidates_of(rows: int, columns: int) -> np.ndarray:
    """Of each row distinct: multiples of an odd number, of which each row has another."""
    start, step = np.random.default_rng(1).integers(0, VECTORS // 2, (2, rows, 1))
    return ((start + (2 * step + 1) * np.arange(columns)) % VECTORS).astype(np.int16)


def admixture(rows: int, columns: int = COLUMNS, k: int = K, hard: bool = False, wide: bool = False) -> Count:
    """`hard`: logits that tie, infinities and NaN, candidates that repeat or are no bank vectors, a bank that overflows.
    `wide`: candidates in 32 bits."""
    memory, dense = Memory(), columns == VECTORS
    logits, bank = numbers(rows, columns), numbers(VECTORS, LENGTH, seed=1)
    candidates = candidates_of(rows, columns)
    if hard:
        special = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0], np.float32)
        logits[:] = np.round(logits)
        logits[::3] = np.where(logits[::3] > 1, special[np.arange(columns) % 5], logits[::3])
        logits[5] = -np.inf
        candidates[::2, ::3] = candidates[::2, :1]
        candidates[1::4, 1::5] = -3
        candidates[3::4, 1::5] = VECTORS
        bank[:, ::7] = np.clip(bank[:, ::7], -3, 3) * np.float32(1e38)
        bank[:, 3::11] *= np.float32(1e-40)
        bank[::2, 5] = bank[1::2, 8] = np.nan  # the second and the first of two that are rounded together
    problem = Admixture(
        type=F32, candidate_type=I32 if wide else I16, out_type=BF16,
        logits=memory.put("logits", logits), bank=memory.put("bank", bank),
        candidates=0 if dense else memory.put("candidates", candidates.astype(np.int32) if wide else candidates),
        subvectors=memory.put("subvectors", np.zeros((rows, LENGTH), np.uint16)),
        indices=memory.put("indices", np.zeros((rows, k), np.int32)),
        weights=memory.put("weights", np.zeros((rows, k), np.float32)),
        exhausted=0, rows=rows, columns=columns, vectors=VECTORS, length=LENGTH, k=k,
    )  # fmt: skip
    lanes = 32 if dense else 8  # of a row
    instance = f"admixture_kernel<float, {2 if k <= 2 else 4}, unsigned long, {lanes}>"
    if wide:
        lanes, instance = 32, f"admixture_kernel<float, {2 if k <= 2 else 8}, Wide<unsigned int>, 32>"
    return run("admixture", instance, rows, memory, bytes(problem), range(rows * lanes // THREADS))


def compose(rows: int, k: int = K) -> Count:
    memory = Memory()
    problem = Composition(
        type=F32, index_type=I16, out_type=BF16,
        bank=memory.put("bank", numbers(VECTORS, LENGTH, seed=1)),
        indices=memory.put("indices", candidates_of(rows, k)),
        weights=memory.put("weights", np.abs(numbers(rows, k, seed=2))),
        subvectors=memory.put("subvectors", np.zeros((rows, LENGTH), np.uint16)),
        rows=rows, vectors=VECTORS, length=LENGTH, k=k,
    )  # fmt: skip
    return run(
        "compose", f"compose_kernel<float, {2 if k <= 2 else 4}>", rows, memory, bytes(problem), range(rows // WARPS)
    )


ALIGNMENT = 16  # of the gradients of the sub-vectors


def grad_runs(memory: Memory, rows: int, count: int = 1) -> bytes:
    """GradRuns: the gradients of so many rows, in ``count`` pieces."""
    capacity = FEW_RUNS if count <= FEW_RUNS else MANY_RUNS
    address = memory.put("grad_subvectors", bf16(rows, LENGTH))
    begins = np.full(capacity, 2**31 - 1, np.int32)
    begins[:count] = np.arange(count) * rows // count
    pointers = np.zeros(capacity, np.uint64)
    pointers[:count] = address + begins[:count].astype(np.uint64) * (2 * LENGTH)
    first_step = 1 << (count - 1).bit_length() - 1 if count > 1 else 0
    return np.array([first_step, 2 * LENGTH], np.int32).tobytes() + begins.tobytes() + pointers.tobytes()


def backward(memory: Memory, rows: int, k: int = K) -> Backward:
    first, further = np.random.default_rng(3).integers(1, COLUMNS, (2, rows))
    indices = ((first[:, None] + (further[:, None] | 1) * np.arange(k)) % COLUMNS).astype(np.int32)  # distinct in a row
    return Backward(
        type=F32, candidate_type=I16, grad_type=BF16,
        grad_weights=0,
        indices=memory.put("indices", indices),
        weights=memory.put("weights", np.abs(numbers(rows, k, seed=2))),
        bank=memory.put("bank", numbers(VECTORS, LENGTH, seed=1)),
        candidates=memory.put("candidates", candidates_of(rows, COLUMNS)),
        grad_logits=memory.put("grad_logits", np.zeros((rows, COLUMNS), np.float32)),
        grad_bank=memory.put("grad_bank", np.zeros((VECTORS, LENGTH), np.float32)),
        rows=rows, columns=COLUMNS, vectors=VECTORS, length=LENGTH, k=k,
    )  # fmt: skip


def backward_rows(rows: int, k: int = K, runs: int = 1) -> Count:
    memory = Memory()
    arguments = bytes(backward(memory, rows, k)) + bytes(Workspace(alignment=ALIGNMENT)) + grad_runs(memory, rows, runs)
    return run_rows_kernel(rows, memory, arguments, range(rows // 32), runs)


def run_rows_kernel(units: int, memory: Memory, arguments: bytes, blocks: Iterable, runs: int) -> Count:
    instance = ROWS_KERNEL.format(FEW_RUNS if runs <= FEW_RUNS else MANY_RUNS)
    return run("admixture_backward", instance, units, memory, arguments, blocks, SORTED_BYTES)


def chosen_vectors(memory: Memory) -> np.ndarray:
    """The bank vectors that the entries of a problem stand for."""
    candidates, indices = memory.get("candidates", np.int16), memory.get("indices", np.int32)
    return np.take_along_axis(candidates.reshape(-1, COLUMNS), indices.reshape(-1, K), 1).ravel()


def sorted_workspace(memory: Memory, vectors: np.ndarray) -> Workspace:
    """What the sorting blocks leave behind, of entries that stand for these vectors."""
    entries = len(vectors)
    ranges = -(-entries // RANGE)
    order = np.concatenate(
        [begin + np.argsort(vectors[begin : begin + RANGE], kind="stable") for begin in range(0, entries, RANGE)]
    )
    return Workspace(
        entries=entries, ranges=ranges, buckets=VECTORS, shift=0, popular_from=POPULAR_FROM, alignment=ALIGNMENT,
        owed=memory.put("owed", owed_by(order, memory)),
        slices=memory.put("slices", slices_of(vectors[order])),
        popular=memory.put("popular", np.zeros(VECTORS, np.uint8)),
    )  # fmt: skip


def owed_by(entries: np.ndarray, memory: Memory) -> np.ndarray:
    """Addresses of gradients and weights, as 64-bit words."""
    weights = memory.get("weights", np.float32)[entries]
    rows = np.uint64(memory.address("grad_subvectors")) + (entries // K).astype(np.uint64) * np.uint64(2 * LENGTH)
    return np.stack([rows, weights.view(np.uint32).astype(np.uint64)], 1)


def slices_of(ordered: np.ndarray) -> np.ndarray:
    """Of entries whose vectors are in order within each range: where in it each vector's begin and end."""
    parts = [ordered[begin : begin + RANGE] for begin in range(0, len(ordered), RANGE)]
    begins = np.stack([np.searchsorted(part, np.arange(VECTORS + 1)) for part in parts]).astype(np.uint32)
    return begins[:, :-1] | begins[:, 1:] << 16


def backward_sort(runs: int = 1) -> Count:
    """One range, into a workspace that is sorted by other vectors yet."""
    memory, rows = Memory(), RANGE // K
    problem, its_runs = backward(memory, rows), grad_runs(memory, rows, runs)
    arguments = bytes(problem) + bytes(sorted_workspace(memory, np.zeros(RANGE, np.int64))) + its_runs
    return run_rows_kernel(RANGE, memory, arguments, [0], runs)


def backward_bank(rows: int, vectors: int) -> Count:
    """The first so many bank vectors."""
    memory = Memory()
    problem = backward(memory, rows)
    grad_runs(memory, rows)
    chosen = chosen_vectors(memory)
    arguments = bytes(problem) + bytes(sorted_workspace(memory, chosen))
    entries = int((chosen < vectors).sum())
    return run("admixture_backward", BANK_KERNEL, entries, memory, arguments, range(vectors // WARPS))


def backward_popular(parts: tuple[int, ...] = ()) -> Count:
    """All rows choose one vector. A block does 32 bytes of it, or of its entries those of one of 16 parts: two ranges, the last
    part one."""
    memory, rows = Memory(), (2 * PARTS - 1 if parts else 8) * RANGE // K
    problem = backward(memory, rows)
    grad_runs(memory, rows)
    workspace = sorted_workspace(memory, np.zeros(rows * K, np.int64))
    workspace.partials = memory.put("partials", np.zeros((PARTS, LENGTH), np.float32))
    memory.get("popular", np.uint8)[0] = SPLIT if parts else WHOLE
    entries = sum(map(len, parts_of(rows * K, parts))) if parts else rows * K
    arguments = bytes(problem) + bytes(workspace)
    return run(
        "admixture_backward", POPULAR_KERNEL, entries, memory, arguments, [(0, part, 0) for part in parts or (0,)]
    )


def parts_of(entries: int, parts: tuple[int, ...]) -> list[range]:
    return [range(2 * RANGE * part, min(2 * RANGE * (part + 1), entries)) for part in parts]


def backward_split() -> Count:
    """What is left to do then."""
    memory = Memory()
    problem = backward(memory, 1)
    grad_runs(memory, 1)
    workspace = sorted_workspace(memory, np.zeros(K, np.int64))
    workspace.partials = memory.put("partials", numbers(PARTS, LENGTH))
    memory.get("popular", np.uint8)[0] = SPLIT
    return run("admixture_backward", SPLIT_KERNEL, 1, memory, bytes(problem) + bytes(workspace), [0])


@dataclass(frozen=True)
class Counted:
    what: str  # is counted, by warp instructions
    count: Callable[[], Count]
    instructions: float  # at most
    in_flight: dict[str, int]  # at least


COUNTED_VECTORS = 16
COUNTED_PARTS = (0, 7, 15)
# The bounds are what is in docs/cuda.md.
COUNTED = {
    "admixture, M = 128": Counted("row", lambda: admixture(64), 225, {"logits": 4, "candidates": 4, "bank": 8}),
    "admixture, M = 128, k = 1": Counted(
        "row", lambda: admixture(32, k=1), 189, {"logits": 4, "candidates": 4, "bank": 4}
    ),
    "admixture, M = 128, k = 3": Counted(
        "row", lambda: admixture(32, k=3), 349, {"logits": 4, "candidates": 4, "bank": 6}
    ),
    "admixture, M = 128 in 32 bits": Counted(
        "row", lambda: admixture(16, wide=True), 740, {"logits": 1, "candidates": 1, "bank": 4}
    ),
    "admixture, M = h = 2048": Counted("row", lambda: admixture(16, VECTORS), 1188, {"logits": 4, "bank": 4}),
    "compose": Counted("row", lambda: compose(32), 166, {"bank": 4}),
    "compose, k = 1": Counted("row", lambda: compose(8, 1), 158, {"bank": 2}),
    "compose, k = 3": Counted("row", lambda: compose(8, 3), 227, {"bank": 6}),
    "backward, grad_logits": Counted("row", lambda: backward_rows(64), 160, {"grad_subvectors": 2, "bank": 4}),
    "backward, grad_logits, k = 3": Counted(
        "row", lambda: backward_rows(32, 3), 267, {"grad_subvectors": 2, "bank": 4}
    ),
    "backward, grad_logits, 448 pieces": Counted(
        "row", lambda: backward_rows(448, runs=448), 181, {"grad_subvectors": 2, "bank": 4}
    ),
    "backward, sort, 448 pieces": Counted(
        "entry", lambda: backward_sort(448), 9.7, {"indices": 8, "candidates": 8, "weights": 8}
    ),
    "backward, sort": Counted("entry", backward_sort, 6.4, {"indices": 8, "candidates": 8, "weights": 8}),
    "backward, grad_bank": Counted(
        "entry", lambda: backward_bank(ROWS, COUNTED_VECTORS), 34, {"slices": 1, "grad_subvectors": 8}
    ),
    "backward, popular": Counted("entry", backward_popular, 3.5, {"popular": 8, "owed": 2, "grad_subvectors": 2}),
    "backward, split": Counted(
        "entry", lambda: backward_popular(COUNTED_PARTS), 6.4, {"popular": 8, "owed": 2, "grad_subvectors": 2}
    ),
    "backward, sum of 16 parts": Counted("vector", backward_split, 5700, {"popular": 8, "partials": 16}),
}


def main() -> None:
    print("| kernel | warp instructions | loads in flight |")
    print("|---|---|---|")
    for name, counted in COUNTED.items():
        count = counted.count()
        loads = ", ".join(f"{buffer} {count.in_flight[buffer]}" for buffer in counted.in_flight)
        print(f"| {name} | {count.each:.1f} a{'n' if counted.what == 'entry' else ''} {counted.what} | {loads} |")
