"""Draws the pictures of the Concepts page, each for a light and for a dark page."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vblora.finetune.pictures import draw_sharing

INKS = {"light": "#1f2430", "dark": "#e3e6ee"}
FAINT = "#8a909c"  # readable on both
VECTORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")

# The bank vectors of each sub-vector, with their weights.
Mix = tuple[tuple[int, float], ...]


def pictures() -> Iterator[tuple[str, bytes]]:
    """File names and contents."""
    for name, (draw, size) in DRAWINGS.items():
        for theme, ink in INKS.items():
            colors = dict.fromkeys(
                ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink
            )
            fixed = {"svg.hashsalt": name, "font.size": 10}
            with matplotlib.rc_context(colors | fixed):
                figure = Figure(size, layout="constrained")
                draw(figure.subplots(), ink)
                file = io.BytesIO()
                figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
            yield f"{name}-{theme}.svg", file.getvalue()


def bank(axes: Axes, ink: str) -> None:
    canvas(axes, 110, 46)
    axes.text(14, 43, "vector bank", ha="center", weight="bold")
    for i, color in enumerate(VECTORS):
        strip(axes, 4, 35 - 5 * i, 20, 3.4, color)
    axes.text(14, 5.5, "⋮", ha="center", va="center", size=13)
    axes.annotate("", (3, 7), (3, 39), arrowprops={"arrowstyle": "<->", "color": FAINT})
    axes.text(1.6, 23, "h vectors", rotation=90, va="center", ha="center", alpha=0.75, size=9)
    axes.text(14, 1.5, "each has b numbers", ha="center", va="center", alpha=0.75, size=9)
    arrow(axes, (26, 23), (36, 23), ink)
    axes.text(31, 25, "mix", ha="center", size=9)
    layers = {
        "layer 1": (0, 2, 1, 4, 5, 3, 0, 2),
        "layer 2": (3, 5, 2, 0, 1, 1, 4, 0),
        "layer n": (1, 0, 4, 3, 2, 5, 3, 4),
    }
    for i, (name, picks) in enumerate(layers.items()):
        left = 38 + 25 * i
        axes.text(left + 10.5, 43, name, ha="center", weight="bold")
        for place, pick in enumerate(picks):
            row, column = divmod(place, 2)
            other = picks[(place + 3) % len(picks)]
            below = 18 * (row >= 2)
            color = blend(((pick, 0.75), (other, 0.25)))
            strip(axes, left + 10.7 * column, 34 - 4.2 * row - below + 8.4 * (row >= 2), 10, 3.4, color)
        axes.text(left - 1.2, 33.6, "A", ha="right", va="center", style="italic")
        axes.text(left - 1.2, 15.4, "B", ha="right", va="center", style="italic")
    axes.text(74.5, 3.5, "every strip is a sub-vector; all layers share the bank", ha="center", alpha=0.75, size=9)


def subvectors(axes: Axes, ink: str) -> None:
    canvas(axes, 110, 40)
    colors = (0, 2, 4, 1, 5, 3)
    for name, shape, left, pieces, shift in (
        ("A", "(r, in_features)", 8, 3, 0),
        ("B, stored transposed", "(r, out_features)", 55, 4, 3),
    ):
        width = 11.5 * pieces
        axes.text(left + width / 2, 36.5, name, ha="center", weight="bold")
        for row in range(4):
            for column in range(pieces):
                color = blend(((colors[(row + 2 * column + shift) % 6], 0.7), (colors[(2 * row + column) % 6], 0.3)))
                strip(axes, left + 11.5 * column, 28 - 5 * row, 11, 4, color)
        axes.text(left + width / 2, 1.5, shape, ha="center", alpha=0.75, size=9)
        axes.annotate("", (left, 10.2), (left + 11, 10.2), arrowprops={"arrowstyle": "<->", "color": ink})
        axes.text(left + 5.5, 7.2, "b", ha="center", va="center")
    axes.annotate("", (6.5, 12.5), (6.5, 32.5), arrowprops={"arrowstyle": "<->", "color": FAINT})
    axes.text(4, 22.5, "rank r", rotation=90, va="center", ha="center", alpha=0.75, size=9)


def mixture(axes: Axes, ink: str) -> None:
    canvas(axes, 110, 42)
    logits = (0.4, 1.5, 0.2, 0.7, 1.0, -0.3)
    weights = {1: 0.62, 4: 0.38}
    axes.text(16, 39, "logits of one sub-vector", ha="center", weight="bold")
    for i, logit in enumerate(logits):
        chosen = i in weights
        left = 3 + 4.6 * i
        axes.add_patch(
            Rectangle((left, 14), 3.4, 13 * logit, color=VECTORS[i] if chosen else FAINT, alpha=1 if chosen else 0.45)
        )
        axes.text(
            left + 1.7, 14 + 13 * logit + (1.8 if logit > 0 else -1.8), f"{logit}", ha="center", va="center", size=8
        )
    axes.plot((2, 31), (14, 14), color=FAINT, linewidth=0.8)
    axes.text(16, 4, "the k = 2 largest are selected", ha="center", alpha=0.75, size=9)
    arrow(axes, (33, 22), (41, 22), ink)
    axes.text(37, 24.5, "softmax", ha="center", size=9)
    axes.text(58, 39, "k bank vectors", ha="center", weight="bold")
    for height, (i, weight) in zip((28, 13), weights.items(), strict=True):
        axes.text(48.5, height + 2, f"{weight} ×", ha="right", va="center")
        strip(axes, 50, height, 20, 4, VECTORS[i])
    axes.text(60, 22.5, "+", ha="center", va="center", size=13)
    arrow(axes, (73, 22), (81, 22), ink)
    axes.text(77, 24.5, "sum", ha="center", size=9)
    axes.text(94, 39, "sub-vector", ha="center", weight="bold")
    strip(axes, 84, 20, 20, 4, blend(tuple(weights.items())))
    axes.text(94, 15.5, "b numbers", ha="center", va="center", alpha=0.75, size=9)


def candidates(axes: Axes, ink: str) -> None:
    canvas(axes, 110, 46)
    initial = [13 - 0.42 * i - 0.018 * (i - 12) ** 2 * (i > 12) + 2.6 / (1 + 0.7 * i) for i in range(26)]
    trained = {0: 7.2, 1: 17.5, 2: 9.0, 3: 14.6}
    kept = 14
    base = 17
    for i, value in enumerate(initial):
        left = 4 + 4 * i
        inside = i < kept
        style = {"facecolor": VECTORS[0] if inside else "none", "edgecolor": VECTORS[0] if inside else FAINT}
        axes.add_patch(
            Rectangle((left, base), 3, value, alpha=0.45 if inside else 0.9, linestyle="-" if inside else ":", **style)
        )
        if i in trained:
            axes.plot((left - 0.2, left + 3.2), (base + trained[i],) * 2, color=VECTORS[1], linewidth=2.6)
    edge = 4 + 4 * kept - 0.5
    axes.plot((3, 108), (base, base), color=FAINT, linewidth=0.8)
    axes.plot((edge, edge), (base - 5, 38), color=ink, linewidth=0.9, linestyle="--")
    axes.text((3 + edge) / 2, 42, "the first M: candidates", ha="center", weight="bold")
    axes.text((edge + 108) / 2, 42, "the rest: not stored", ha="center", weight="bold", alpha=0.75)
    for left, right, words in (
        (4, 19, "changed by\ntraining"),
        (20, edge - 0.8, "never selected so far:\nstill the initial values"),
        (edge + 0.8, 108, "cannot be selected before\nthe candidates are used up"),
    ):
        axes.annotate(
            "",
            (left, base - 2.6),
            (right, base - 2.6),
            arrowprops={"arrowstyle": "|-|,widthA=0.25,widthB=0.25", "color": FAINT},
        )
        axes.text((left + right) / 2, base - 7.4, words, ha="center", va="center", size=9)
    axes.text(
        55,
        3.2,
        "bars: initial logits of one sub-vector, sorted     lines: logits after some steps",
        ha="center",
        alpha=0.75,
        size=9,
    )


def sharing(axes: Axes, ink: str) -> None:
    found = json.loads(Path(__file__).with_name("pictures").joinpath("sharing.json").read_text(encoding="utf-8"))
    draw_sharing(axes, found["layers"], found["sharing"], labels=18)


def canvas(axes: Axes, width: float, height: float) -> None:
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.set_axis_off()


def strip(axes: Axes, x: float, y: float, width: float, height: float, color: Any) -> None:
    """A vector, whose numbers are cells of slightly different shades."""
    cells = round(width / 1.25)
    for i in range(cells):
        shade = 0.72 + 0.28 * ((7 * i + round(3 * x + y)) % 5) / 4
        cell = Rectangle((x + i * width / cells, y), width / cells, height, color=color, alpha=shade, linewidth=0)
        axes.add_patch(cell)


def blend(mix: Mix) -> tuple[float, ...]:
    colors = [to_rgb(VECTORS[i]) for i, _ in mix]
    return tuple(sum(weight * color[c] for (_, weight), color in zip(mix, colors, strict=True)) for c in range(3))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], ink: str) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": ink})


DRAWINGS: dict[str, tuple[Callable[[Axes, str], None], tuple[float, float]]] = {
    "bank": (bank, (8.2, 3.4)),
    "subvectors": (subvectors, (8.2, 3.0)),
    "mixture": (mixture, (8.2, 3.1)),
    "candidates": (candidates, (8.2, 3.4)),
    "sharing": (sharing, (7.0, 5.4)),
}
