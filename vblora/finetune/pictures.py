"""training.png and bank.png."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import atomic_replacement

if TYPE_CHECKING:
    from .bank_use import BankUse

_INK = {"train": "#4477aa", "held_out": "#cc3311", "rate": "#bbbbbb"}


def can_draw() -> bool:
    return find_spec("matplotlib") is not None


def draw_training(log: list[dict[str, Any]], path: Path) -> None:
    """The training loss, the held-out one, and the learning rate, by step.

    Args:
        log: the Trainer's.
    """
    figure, axes = _figure(7, 4)
    rates = [(entry["step"], entry["learning_rate"]) for entry in log if "learning_rate" in entry]
    if rates:
        right = axes.twinx()
        right.plot(*zip(*rates, strict=True), color=_INK["rate"], linestyle="--", zorder=0)
        right.set_ylabel("learning rate of the bank (dashed)")
        right.set_ylim(bottom=0)
    for name, label, marker in (("loss", "train", ""), ("eval_loss", "held_out", "o")):
        points = [(entry["step"], entry[name]) for entry in log if name in entry and entry["step"]]
        if points:
            axes.plot(*zip(*points, strict=True), color=_INK[label], marker=marker, label=label.replace("_", "-"))
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_zorder(1)
    axes.patch.set_visible(False)
    axes.legend()
    _save(figure, path)


def draw_bank(use: "BankUse", path: Path) -> None:
    """How often each vector is used, how far down their candidates sub-vectors came, the weights' entropy, which layers share."""
    figure, axes = _figure(11, 8, rows=2, columns=2)
    counts = sorted(use.counts, reverse=True)
    used = sum(count > 0 for count in counts)
    axes[0, 0].bar(range(len(counts)), counts, width=1.0, color=_INK["train"])
    axes[0, 0].set_title(f"use of the bank: {used} of {len(counts)} vectors")
    axes[0, 0].set_xlabel("bank vector, the most used first")
    axes[0, 0].set_ylabel("sub-vectors that use it")

    axes[0, 1].set_title("how far down its candidates each sub-vector came")
    if use.depths is None:
        axes[0, 1].text(0.5, 0.5, "the folder has no logits,\nor no seed", ha="center", transform=axes[0, 1].transAxes)
        axes[0, 1].set_axis_off()
    else:
        step = -(-use.candidates // 64)  # whole numbers, so that each bar stands for as many depths as the next
        axes[0, 1].hist(use.depths, bins=range(0, use.candidates + step + 1, step), color=_INK["train"])
        axes[0, 1].set_xlabel(f"candidates tried, of {use.candidates}")
        axes[0, 1].set_ylabel("sub-vectors")
        axes[0, 1].set_yscale("symlog")

    axes[1, 0].hist(use.entropies, bins=50, range=(0, 1), color=_INK["train"])
    axes[1, 0].set_title("entropy of the weights")
    axes[1, 0].set_xlabel("0: one vector alone, 1: all the same")
    axes[1, 0].set_ylabel("sub-vectors")

    draw_sharing(axes[1, 1], use.layers, use.sharing)
    _save(figure, path)


def draw_sharing(axes: Any, layers: list[str], sharing: list[list[float]], labels: int = 8) -> None:
    """A heat map of which layers share vectors."""
    image = axes.imshow(sharing, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, label="cosine of their use")
    axes.set_title("which layers share vectors")
    places = range(0, len(layers), max(1, len(layers) // labels))
    axes.set_yticks(list(places), [_short(layers[place]) for place in places], fontsize=7)
    axes.set_xticks([])


def _short(name: str, length: int = 28) -> str:
    return name if len(name) <= length else "…" + name[1 - length :]


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot, which may ask for a display

    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def _save(figure: Any, path: Path) -> None:
    with atomic_replacement(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
