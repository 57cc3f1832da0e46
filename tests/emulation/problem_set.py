"""Problems for `problems.cpp`, a line each: in the emulation (test_kernels.py), and on a GPU (`make gpu-check`)."""

from __future__ import annotations

import random

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
    "admixture_backward rows=5000 columns=20 length=24 k=1 popular=1 out=bf16 need_logits=0",  # one that is split
    "admixture_backward rows=9000 columns=5000 length=3 k=1 popular=2 need_logits=0",  # a bucket that is split
    "admixture_backward rows=2 columns=1100 length=3 k=1100 need_bank=0",  # owners take all of shared memory
]
# Flags of exhausted rows: of rows by 8 lanes, by a warp, by a block. Gradients in pieces, some of which are left out.
PROBLEMS += [
    "admixture rows=33 columns=128 candidates=i16 exhausted=1",
    "admixture rows=9 columns=300 k=3 type=bf16 exhausted=1",
    "admixture rows=3 columns=300 k=33 type=f64 exhausted=1",
    "admixture_backward rows=300 columns=16 k=2 popular=1 runs=7",
    "admixture_backward rows=100 columns=40 length=17 k=3 type=bf16 out=f32 candidates=i16 runs=9",
    "admixture_backward rows=40 columns=40 k=33 length=24 grad_weights=1 runs=6",
    "admixture_backward rows=900 columns=20 length=8 k=2 out=bf16 runs=3",  # more than 256 pieces
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
    *(f"add_updates rows=7 positions=2 inputs=100 outputs=300 rank=3 type={type}" for type in TYPES),
    "add_updates rows=5 inputs=1 outputs=1 rank=1 adapters=1",
    "add_updates rows=4 positions=3 inputs=31 outputs=513 rank=17 one=1 type=bf16",
    *(f"add_updates rows=4 shifted={name}" for name in ("y", "x", "A", "B")),
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
