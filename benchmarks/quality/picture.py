"""Quality against stored parameters, and how the training loss falls."""

from pathlib import Path

from matplotlib.figure import Figure


def draw(rows: list[dict], tasks: list[str], path: Path) -> None:
    figure = Figure(figsize=(4.2 * len(tasks), 4.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for row in rows:
            if row["stored"]:
                axes.errorbar(
                    row["stored"], row["mean"][task], row["std"][task], marker="o", capsize=3, label=row["name"]
                )
            else:
                axes.axhline(row["mean"][task], color="grey", linestyle=":", label=row["name"])
        axes.set(title=task, xscale="log", xlabel="stored parameters beside the head")
    figure.axes[0].set_ylabel("score on the development set, %")
    figure.axes[-1].legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=120)


def draw_losses(rows: list[dict], tasks: list[str], path: Path) -> None:
    figure = Figure(figsize=(4.2 * len(tasks), 4.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for row in rows:
            axes.plot(*zip(*row["losses"][task], strict=True), label=row["name"])
        axes.set(title=task, xlabel="steps")
    figure.axes[0].set_ylabel("training loss")
    figure.axes[-1].legend(fontsize="small", loc="upper right")
    figure.savefig(path, dpi=120)
