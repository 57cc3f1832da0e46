"""What ends ``vblora finetune``: a table, and completions side by side."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

LORA_RANK = 8


@dataclass
class Results:
    """What a run measured. ``most_frequent``, ``frozen`` and ``adapted`` are the metric on the held-out rows."""

    train_rows: int
    held_out_rows: int
    metric: str  # "accuracy" or "pearson"
    most_frequent: float | None  # of always answering the most frequent label; None for scores
    frozen: float | None  # of a head on the frozen encoder; None if it was not trained
    adapted: float
    metrics: dict[str, float]  # all of the adapted model
    trainable: int
    stored: int
    file_bytes: int
    lora_bytes: int
    seconds_per_step: float | None  # None if a resumed run had nothing left to train
    steps: int
    best_epoch: float | None
    warnings: list[str] = field(default_factory=list)


@dataclass
class Generation:
    """A held-out prompt, what should follow, and what the model wrote."""

    prompt: str
    reference: str
    before: str
    after: str


@dataclass
class LanguageResults:
    """What a run of a language model measured. Losses are means over the held-out tokens that are learnt."""

    train_rows: int
    held_out_rows: int
    cut_rows: int  # longer than --max-length
    left_out_rows: int  # of those, the ones in which nothing to learn remained
    tokens: int  # that were trained on, prompts included
    seconds_per_step: float | None  # None if a resumed run had nothing left to train
    steps: int
    best_epoch: float | None
    trainable: int
    stored: int
    file_bytes: int
    lora_bytes: int
    loss_before: float = math.nan
    loss_after: float = math.nan
    perplexity_before: float = math.nan
    perplexity_after: float = math.nan
    bleu_before: float | None = None
    bleu_after: float | None = None
    generations: list[Generation] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / (self.seconds_per_step * self.steps) if self.seconds_per_step else None

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}


def lora_bytes(layers: list[tuple[int, int]], extra: int) -> int:
    """Bytes of a float32 LoRA of ``LORA_RANK`` for layers of widths ``(in, out)`` and ``extra`` parameters that train with it."""
    return 4 * (LORA_RANK * sum(in_features + out_features for in_features, out_features in layers) + extra)


def folder_bytes(folder: Path) -> int:
    """Bytes of an adapter's own files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("adapter_*"))


def print_table(results: Results, console: Console) -> None:
    metric = {"pearson": "Pearson correlation"}.get(results.metric, results.metric)
    table = Table(title=f"Held-out {metric} and size ({results.held_out_rows:,} rows held out of training)")
    shown = _percent if results.metric == "accuracy" else "{:.4f}".format
    table.add_column("")
    table.add_column("value", justify="right")
    if results.most_frequent is not None:
        table.add_row(f"{metric}: always the most frequent label", shown(results.most_frequent))
    if results.frozen is not None:
        table.add_row(f"{metric} before: the same head on the frozen encoder", shown(results.frozen))
    table.add_row(f"{metric} after: with the adapter", f"[bold]{shown(results.adapted)}[/bold]")
    for name, value in results.metrics.items():
        if name != results.metric:
            table.add_row(f"{name.capitalize()} correlation after", shown(value))
    if results.frozen is not None:
        gained = results.adapted - results.frozen
        table.add_row("gained", f"{100 * gained:+.2f} points" if results.metric == "accuracy" else f"{gained:+.4f}")
    table.add_section()
    table.add_row("trainable parameters (head included)", f"{results.trainable:,}")
    table.add_row("stored parameters (head included)", f"{results.stored:,}")
    table.add_row("adapter file on disk (head included)", _size(results.file_bytes))
    table.add_row(f"LoRA r={LORA_RANK} of the same layers and head, as float32", _size(results.lora_bytes))
    table.add_section()
    table.add_row("training steps", f"{results.steps:,}")
    table.add_row("seconds per step", _number(results.seconds_per_step, ".3f"))
    if results.best_epoch is not None:
        table.caption = (
            f"The adapter is that of epoch {results.best_epoch:.4g}, whose held-out {metric} was the highest."
        )
    console.print(table)


def print_language_table(results: LanguageResults, console: Console) -> None:
    table = Table(title=f"Held-out rows and size ({results.held_out_rows:,} rows held out of training)")
    table.add_column("")
    for name in ("before", "after"):
        table.add_column(name, justify="right")
    table.add_row("loss a token", f"{results.loss_before:.4f}", f"[bold]{results.loss_after:.4f}[/bold]")
    table.add_row("perplexity", f"{results.perplexity_before:.2f}", f"[bold]{results.perplexity_after:.2f}[/bold]")
    if results.bleu_before is not None:
        table.add_row("BLEU", f"{results.bleu_before:.1f}", f"[bold]{results.bleu_after:.1f}[/bold]")
    table.add_section()
    rows = {
        "trainable parameters": f"{results.trainable:,}",
        "stored parameters": f"{results.stored:,}",
        "adapter file on disk": _size(results.file_bytes),
        f"LoRA r={LORA_RANK} of the same layers, as float32": _size(results.lora_bytes),
        "training steps": f"{results.steps:,}",
        "seconds per step": _number(results.seconds_per_step, ".3f"),
        "tokens per second": _number(results.tokens_per_second, ",.0f"),
    }
    for name, value in rows.items():
        table.add_row(name, "", value)
        if name.startswith("LoRA"):
            table.add_section()
    if results.best_epoch is not None and results.loss_after >= results.loss_before:
        table.caption = (
            f"No epoch lowered the held-out loss. The adapter is that of epoch {results.best_epoch:.4g}, the best of them, and "
            "worse than the model without it."
        )
    elif results.best_epoch is not None:
        table.caption = f"The adapter is that of epoch {results.best_epoch:.4g}, whose held-out loss was the lowest."
    console.print(table)


def print_generations(generations: list[Generation], console: Console) -> None:
    if not generations:
        return
    table = Table(title="Held-out prompts, completed", show_lines=True)
    for name in ("prompt", "before", "after", "reference"):
        table.add_column(name, overflow="fold", ratio=1)
    for one in generations:
        # Text: brackets are no markup
        table.add_row(*(Text(_shortened(text)) for text in (one.prompt, one.before, one.after, one.reference)))
    console.print(table)


def _shortened(text: str, length: int = 300) -> str:
    text = text.strip()
    return text if len(text) <= length else text[: length - 1] + "…"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _size(count: int) -> str:
    return f"{count / 1024:,.1f} KiB"
