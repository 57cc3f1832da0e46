"""The table that ends ``vblora finetune``."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

LORA_RANK = 8


@dataclass
class Results:
    """What a run measured. ``most_frequent``, ``frozen`` and ``adapted`` are accuracies on the held-out rows."""

    train_rows: int
    held_out_rows: int
    most_frequent: float  # of always answering the most frequent label
    frozen: float | None  # of a head on the frozen encoder; None if it was not trained
    adapted: float
    trainable: int
    stored: int
    file_bytes: int
    lora_bytes: int
    seconds_per_step: float
    steps: int


def lora_bytes(layers: list[tuple[int, int]], extra: int, rank: int = LORA_RANK) -> int:
    """Bytes of a float32 LoRA for layers of these widths ``(in, out)``, and of ``extra`` parameters that train with it."""
    return 4 * (rank * sum(in_features + out_features for in_features, out_features in layers) + extra)


def folder_bytes(folder: Path) -> int:
    """Bytes of an adapter's own files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("adapter_*"))


def print_table(results: Results, console: Console) -> None:
    table = Table(title=f"Held-out accuracy and size ({results.held_out_rows:,} rows held out of training)")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_row("accuracy: always the most frequent label", _percent(results.most_frequent))
    if results.frozen is not None:
        table.add_row("accuracy before: the same head on the frozen encoder", _percent(results.frozen))
    table.add_row("accuracy after: with the adapter", f"[bold]{_percent(results.adapted)}[/bold]")
    if results.frozen is not None:
        table.add_row("gained", f"{100 * (results.adapted - results.frozen):+.2f} points")
    table.add_section()
    table.add_row("trainable parameters (head included)", f"{results.trainable:,}")
    table.add_row("stored parameters (head included)", f"{results.stored:,}")
    table.add_row("adapter file on disk (head included)", _size(results.file_bytes))
    table.add_row(f"LoRA r={LORA_RANK} of the same layers and head, as float32", _size(results.lora_bytes))
    table.add_section()
    table.add_row("training steps", f"{results.steps:,}")
    table.add_row("seconds per step", f"{results.seconds_per_step:.3f}")
    console.print(table)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _size(count: int) -> str:
    return f"{count / 1024:,.1f} KiB"
