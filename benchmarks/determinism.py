"""Bytes that the deterministic gradient of the bank moves on a GPU, compared with an atomic scatter, by emulation.

Sectors of 32 bytes that warps ask for, as if there were no cache. It is no time, and nothing here has run on a GPU.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from tests.emulation import build, checker

from .harness import Result, Row, Settings

SIZES = ("columns=128", "candidates=i16", "vectors=2048", "length=256", "k=2", "out=bf16", "need_logits=0")
KINDS = ("read", "write", "atomic")


def traffic(op: str, rows: int) -> dict[str, int]:
    """Bytes that an operator's launches move, by kind."""
    report = checker.run(build.build("problems_trace"), op, f"rows={rows}", *SIZES)
    moved = dict.fromkeys(KINDS, 0)
    for (_, buffer, _, kind), cost in report.costs.items():
        if buffer != "shared":
            moved[kind] += 32 * cost.units
    return moved


def run(settings: Settings) -> Result:
    rows = 64 if settings.quick else 4096  # of 39,040, and so many fewer a vector
    found = {"vblora, deterministic": traffic("admixture_backward", rows), "atomic scatter": traffic("scatter", rows)}
    per_row = {name: {kind: size / rows for kind, size in moved.items()} for name, moved in found.items()}
    ours, atomic = per_row.values()
    ratio = sum(ours.values()) / sum(atomic.values())
    figure = (
        f"{ratio:.2f} × ({sum(ours.values()):,.0f} bytes a row, no atomics; "
        f"{sum(atomic.values()):,.0f}, of which {atomic['atomic']:,.0f} atomic)"
    )
    table = [
        Row(f"grad_bank of {rows:,} rows: bytes that the deterministic one asks for / an atomic scatter's", figure)
    ]
    title = "deterministic backward, on the emulated GPU"
    return Result(title, table, {"bytes a row": per_row, "rows": rows}, draw(title, per_row))


def draw(title: str, per_row: dict[str, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(9, 2.2), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots()
    left = [0.0, 0.0]
    for kind in KINDS:
        widths = [moved[kind] for moved in per_row.values()]
        axes.barh(list(per_row), widths, left=left, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel("bytes a row")
    axes.legend()
    return figure
