"""Quality against stored parameters, and how the training loss falls."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter


def draw_scores(rows: list[dict], tasks: list[str], path: Path) -> None:
    def scores(axes: Axes, task: str) -> None:
        title = task
        for row in rows:
            mean, deviation, name = row["mean"][task], row["std"][task], row["name"]
            if row["stored"]:
                axes.errorbar(row["stored"], mean, deviation, marker="o", capsize=3, label=name)
            else:  # mostly far below: a point of it would press the others together
                title += f" ({name}: {mean:.1f})"
        axes.set(title=title, xscale="log", xlabel="stored parameters beside the head")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())

    _draw(scores, "score on the development set, %", tasks, path)


def draw_losses(rows: list[dict], tasks: list[str], path: Path) -> None:
    def losses(axes: Axes, task: str) -> None:
        for row in rows:
            axes.plot(*zip(*row["losses"][task], strict=True), label=row["name"])
        axes.set(title=task, xlabel="steps")

    _draw(losses, "training loss", tasks, path)


def _draw(panel: Callable[[Axes, str], None], label: str, tasks: list[str], path: Path) -> None:
    """A panel a task, beside each other."""
    figure = Figure(figsize=(4.2 * len(tasks) + 2, 4.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        panel(axes, task)
    figure.axes[0].set_ylabel(label)
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), fontsize="small", loc="outside right center")
    figure.savefig(path, dpi=120)
