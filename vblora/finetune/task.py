"""What `vblora finetune` trains on: read and checked before anything slow is imported."""

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..errors import CommandError
from . import data, demo

RESULTS_FILE = "finetune.json"


@dataclass
class Task:
    """What is trained on and measured."""

    model: str
    labels: list[str]
    train: list[data.Row]
    held_out: list[data.Row]


def read_task(arguments: argparse.Namespace) -> Task:
    model = _find_model(arguments.model)
    path, columns, keep = arguments.data, data.Columns("text", "label"), arguments.keep_labels
    if path is None:
        path, columns, keep = demo.find_data(), demo.COLUMNS, keep or demo.LABELS
    given = {name: getattr(arguments, f"{name}_column") for name in columns._fields}
    columns = columns._replace(**{name: column for name, column in given.items() if column is not None})
    if arguments.eval_data is not None and arguments.eval_fraction is not None:
        raise CommandError(
            "--eval-fraction is the share of --data to hold out, but --eval-data was given. Give one of them."
        )

    rows = data.read_rows(path, columns, "--data", keep)
    labels = data.labels_of(rows, path, columns.label)
    if arguments.eval_data is None:
        train, held_out = data.split_rows(rows, arguments.eval_fraction or 0.2, arguments.seed)
    else:
        train = data.sample_rows(rows, len(rows), arguments.seed)
        held_out = data.read_rows(arguments.eval_data, columns._replace(group=None), "--eval-data", keep)
    train = data.sample_rows(train, arguments.max_train, arguments.seed)
    held_out = data.sample_rows(held_out, arguments.max_eval, arguments.seed)
    data.check_labels(held_out, sorted({row.label for row in train}), "the rows to evaluate on")
    return Task(model, labels, train, held_out)


def _find_model(name: str | None) -> str:
    """The model's folder or its name on the hub; of a name no more can be said before transformers is imported."""
    if name is None:
        return str(demo.find_model())
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CommandError(
                f"--model: the folder {path} holds no config.json; give the folder that save_pretrained wrote."
            )
    elif path.exists():
        raise CommandError(f"--model: {path} is a file; give the folder that save_pretrained wrote.")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise CommandError(f"--model: there is no folder {name!r}. Give a model's folder, or its name on the hub.")
    return name


def save_results(arguments: argparse.Namespace, task: Task, **results: object) -> None:
    """Writes what the adapter's own files do not say: which label is which, and how it was trained."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    for name in ("run", "command"):
        values.pop(name, None)
    report = {"model": task.model, "labels": task.labels, "arguments": values, **results}
    (arguments.output / RESULTS_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def most_frequent(rows: list[data.Row]) -> float:
    """The share of rows that have the commonest label."""
    return max(Counter(row.label for row in rows).values()) / len(rows)
