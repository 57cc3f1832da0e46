"""Quality against stored parameters, and how the training loss falls."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter


def draw_scores(rows: list[dict], columns: list[str], path: Path) -> None:
    """``columns``: a task and a metric each."""

    def scores(axes: Axes, column: str) -> None:
        title = column
        for row in rows:
            mean, deviation, name = row["mean"][column], row["std"][column], row["name"]
            if row["stored"]:
                axes.errorbar(row["stored"], mean, deviation, marker="o", capsize=3, label=name)
            else:  # mostly far below: a point of it would press the others together
                title += f"\n{name}: {mean:.4g}"
        axes.set(title=title, xscale="log", xlabel="stored parameters beside the head")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())

    _draw(scores, "score", columns, path)


def draw_losses(rows: list[dict], tasks: list[str], path: Path) -> None:
    def losses(axes: Axes, task: str) -> None:
        for row in rows:
            if row["losses"][task]:  # none where nothing trains
                axes.plot(*zip(*row["losses"][task], strict=True), label=row["name"])
        axes.set(title=task, xlabel="steps")

    _draw(losses, "training loss", tasks, path)


def _draw(panel: Callable[[Axes, str], None], label: str, titles: list[str], path: Path) -> None:
    """A panel each, beside each other."""
    figure = Figure(figsize=(4.2 * len(titles) + 2, 4.2), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles, strict=True):
        panel(axes, title)
    figure.axes[0].set_ylabel(label)
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), fontsize="small", loc="outside right center")
    figure.savefig(path, dpi=120)
