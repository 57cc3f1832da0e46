"""Quality against stored parameters, and how the training loss falls."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(rows: list[dict], tasks: list[str], path: Path) -> None:
    def scores(axes: Axes, task: str) -> None:
        for row in rows:
            mean, deviation, name = row["mean"][task], row["std"][task], row["name"]
            if row["stored"]:
                axes.errorbar(row["stored"], mean, deviation, marker="o", capsize=3, label=name)
            else:
                axes.axhline(mean, color="grey", linestyle=":", label=name)
        axes.set(xscale="log", xlabel="stored parameters beside the head")

    _draw(scores, "score on the development set, %", "lower right", tasks, path)


def draw_losses(rows: list[dict], tasks: list[str], path: Path) -> None:
    def losses(axes: Axes, task: str) -> None:
        for row in rows:
            axes.plot(*zip(*row["losses"][task], strict=True), label=row["name"])
        axes.set(xlabel="steps")

    _draw(losses, "training loss", "upper right", tasks, path)


def _draw(panel: Callable[[Axes, str], None], label: str, legend: str, tasks: list[str], path: Path) -> None:
    """A panel a task, beside each other."""
    figure = Figure(figsize=(4.2 * len(tasks), 4.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        panel(axes, task)
        axes.set_title(task)
    figure.axes[0].set_ylabel(label)
    figure.axes[-1].legend(fontsize="small", loc=legend)
    figure.savefig(path, dpi=120)
