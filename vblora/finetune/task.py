"""What ``vblora finetune`` trains on, read and checked before anything slow is imported."""

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..errors import CommandError
from ..files import byte_order_mark, refuse_lfs_pointer
from . import data, demo

RESULTS_FILE = "finetune.json"
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # in the order in which transformers looks for them


@dataclass
class Task:
    """The model, the classes, and the rows to train and to evaluate on."""

    model: str
    labels: list[str]
    train: list[data.Row]
    held_out: list[data.Row]


def read_task(arguments: argparse.Namespace) -> Task:
    """Reads the data that the arguments name.

    Raises:
        CommandError: a file or an argument is wrong.
    """
    model = _find_model(arguments.model)
    path, columns, keep = arguments.data, data.Columns("text", "label"), arguments.keep_labels
    if path is None:
        path, columns, keep = demo.find_data(), demo.COLUMNS, keep or demo.LABELS
    given = {name: getattr(arguments, f"{name}_column") for name in columns._fields}
    columns = columns._replace(**{name: column for name, column in given.items() if column is not None})
    _check_columns(columns)
    if arguments.eval_data is not None and arguments.eval_fraction is not None:
        raise CommandError(
            "--eval-fraction is the share of --data to evaluate on, but --eval-data is given too. Give one of them."
        )

    rows = data.read_rows(path, columns, "--data", keep)
    labels = data.labels_of(rows, path, columns.label)
    if arguments.eval_data is None:
        train, held_out = data.split_rows(rows, arguments.eval_fraction or 0.2, arguments.seed)
    else:
        train = data.sample_rows(rows, len(rows), arguments.seed)
        held_out = data.read_rows(arguments.eval_data, columns._replace(group=None), "--eval-data", keep)
        _warn_of_common_rows(train, held_out)
    train = data.sample_rows(train, arguments.max_train, arguments.seed)
    held_out = data.sample_rows(held_out, arguments.max_eval, arguments.seed)
    data.check_labels(held_out, sorted({row.label for row in train}), "the rows to evaluate on")
    return Task(model, labels, train, held_out)


def _check_columns(columns: data.Columns) -> None:
    """Refuses one column as two of text, pair and label: a model that reads the label learns nothing else."""
    option_of: dict[str, str] = {}
    for option in ("text", "pair", "label"):
        column = getattr(columns, option)
        if column is not None and (other := option_of.setdefault(column, option)) != option:
            raise CommandError(f"--{option}-column: is {column!r}, as is --{other}-column. Give two different columns.")


def _warn_of_common_rows(train: list[data.Row], held_out: list[data.Row]) -> None:
    seen = {(row.text, row.pair) for row in train}
    common = sum((row.text, row.pair) in seen for row in held_out)
    if common:
        print(
            f"vblora finetune: warning: --eval-data: {common:,} of its {len(held_out):,} rows are also in --data, so the "
            "accuracy is not that of unseen rows.",
            file=sys.stderr,
        )


def _find_model(name: str | None) -> str:
    """The model's folder, checked, or its name on the Hugging Face Hub, which only transformers can check."""
    if name is None:
        return str(demo.find_model())
    path = Path(name)
    if path.is_dir():
        _check_model_folder(path)
    elif path.exists():
        raise CommandError(f"--model: {path} is a file; give the folder that save_pretrained wrote.")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise CommandError(f"--model: there is no folder {name!r}. Give a model's folder, or its name on the Hub.")
    return name


def _check_model_folder(folder: Path) -> None:
    """Refuses what transformers would fail on with a message that does not tell why."""
    if not (folder / "config.json").is_file():
        raise CommandError(
            f"--model: the folder {folder} has no config.json; give the folder that save_pretrained wrote."
        )
    weights = next((files for files in map(sorted, map(folder.glob, _WEIGHTS)) if files), [])
    for file in (*folder.glob("*.json"), *folder.glob("*.txt"), *folder.glob("*.model"), *weights):
        try:
            refuse_lfs_pointer(file)
            if file.suffix == ".json":
                with open(file, "rb") as opened:
                    encoding = byte_order_mark(opened.read(4))
                if encoding is not None:
                    raise ValueError(
                        f"{file} starts with a {encoding} byte-order mark, which transformers cannot read. "
                        "Save it as UTF-8 without one."
                    )
        except (OSError, ValueError) as error:
            raise CommandError(f"--model: {error}") from None


def save_results(arguments: argparse.Namespace, task: Task, **results: object) -> None:
    """Writes what the adapter's own files do not hold: the labels, the arguments and the ``results``."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    for name in ("run", "command"):
        values.pop(name, None)
    report = {"model": task.model, "labels": task.labels, "arguments": values, **results}
    (arguments.output / RESULTS_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def most_frequent(rows: list[data.Row]) -> float:
    """The share of rows that have the most frequent label."""
    return max(Counter(row.label for row in rows).values()) / len(rows)
