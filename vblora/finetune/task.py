"""What ``vblora finetune`` trains on, read and checked before anything slow is imported."""

import argparse
import json
import math
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.folder import TENSORS_FILE
from ..errors import CommandError, listed
from ..files import byte_order_mark, refuse_lfs_pointer, sha256, write_file
from . import data, demo, tables, texts
from .notices import print_warning

RESULTS_FILE = "finetune.json"
_MAX_EVAL = 500  # texts to evaluate on, if no option says how many
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # in the order in which transformers looks for them


@dataclass
class Task:
    """A model, the classes, the rows to train and to evaluate on, and their columns. Without classes, labels are scores."""

    model: str
    labels: list[str] | None
    train: list[data.Row]
    held_out: list[data.Row]
    columns: data.Columns
    fingerprint: dict[str, str] = field(default_factory=dict)  # of the model's weights, once it is loaded

    @property
    def scale(self) -> dict[str, float] | None:
        """Mean and deviation of the scores to train on, which the head is trained with; None with classes."""
        if self.labels is not None:
            return None
        scores = [float(row.label) for row in self.train]
        return {"mean": statistics.fmean(scores), "deviation": statistics.pstdev(scores)}

    def __str__(self) -> str:
        rows = f"{len(self.train):,} rows to train on, {len(self.held_out):,} to evaluate on"
        if self.labels is None:
            scores = [float(row.label) for row in self.train]
            return f"{rows}; scores from {min(scores):g} to {max(scores):g}"
        return f"{rows}; labels: {listed(self.labels, str, 10)}"


@dataclass
class LanguageTask:
    """The model, and the texts to train and to evaluate on.

    Attributes:
        template: the chat template to use instead of the tokenizer's.
        ends: the tokens that end a completion, once the tokenizer is loaded.
    """

    model: str
    template: str | None
    train: texts.Texts
    held_out: texts.Texts
    ends: list[int] = field(default_factory=list)
    fingerprint: dict[str, str] = field(default_factory=dict)  # of the model's weights, once it is loaded

    @property
    def columns(self) -> texts.Columns:
        return self.train.columns

    def __str__(self) -> str:
        columns = " and ".join(repr(name) for name in self.columns.names.values())
        return f"{len(self.train):,} rows to train on, {len(self.held_out):,} to evaluate on; columns {columns}"


def read_language_task(arguments: argparse.Namespace) -> LanguageTask:
    """Reads the texts that the arguments name.

    Raises:
        CommandError: a file or an argument is wrong.
    """
    model = str(demo.find_language_model()) if arguments.model is None else find_model(arguments.model)
    template = read_template(arguments.chat_template)
    path, evaluate = arguments.data, arguments.eval_data
    if path is None:
        path, evaluate = demo.TRAINING_TEXTS, evaluate or demo.TEST_TEXTS
    _refuse_two_splits(arguments)
    given = {part: getattr(arguments, f"{part}_column") for part in ("text", "prompt", "completion", "messages")}
    columns = texts.find_columns(path, "--data", given)
    if columns.kind == "text":
        refuse_for_plain_texts(arguments, template)
    if evaluate is None:
        train, held_out = split_texts(arguments, path, columns)
    else:
        train = texts.whole(path, columns, "--data", arguments.max_train, arguments.seed)
        in_evaluate = texts.find_columns(evaluate, "--eval-data", dict(columns.names))
        held_out = texts.whole(evaluate, in_evaluate, "--eval-data", arguments.max_eval, arguments.seed)
        if common := texts.count_common(train, held_out):
            print_warning(_of_common_rows(common, len(held_out)))
    return LanguageTask(model, template, train, held_out)


def split_texts(arguments: argparse.Namespace, path: Path, columns: texts.Columns) -> tuple[texts.Texts, texts.Texts]:
    """The texts of a file to train and to evaluate on."""
    limit = _MAX_EVAL if arguments.eval_fraction is None else None
    return texts.split(
        path,
        columns,
        fraction=arguments.eval_fraction,
        max_train=arguments.max_train,
        max_eval=limit if arguments.max_eval is None else arguments.max_eval,
        seed=arguments.seed,
    )


def refuse_for_plain_texts(arguments: argparse.Namespace, template: str | None) -> None:
    """Refuses options that plain texts leave without effect."""
    for option, given in (("--chat-template", template is not None), ("--loss last", arguments.loss == "last")):
        if given:
            raise CommandError(
                f"{option} has no effect, because the rows are plain texts, all of which the model learns. Leave it out."
            )


def read_template(given: str) -> str | None:
    """The text of a chat template's file; None for "auto" and "none"."""
    if given in ("auto", "none"):
        return None
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CommandError(f"--chat-template: {given} cannot be read: {error}. Give auto, none, or a file.") from None


def _refuse_two_splits(arguments: argparse.Namespace) -> None:
    if arguments.eval_data is not None and arguments.eval_fraction is not None:
        raise CommandError(
            "--eval-fraction is the share of --data to evaluate on, but --eval-data is given too. Give one of them."
        )


def read_task(arguments: argparse.Namespace) -> Task:
    """Reads the data that the arguments name. Without ``--task``, sets it to what the labels are.

    Raises:
        CommandError: a file or an argument is wrong.
    """
    model = str(demo.find_model()) if arguments.model is None else find_model(arguments.model)
    path, columns, keep = arguments.data, data.Columns("text", "label"), arguments.keep_labels
    if path is None:
        path, columns, keep = demo.find_data(), demo.COLUMNS, keep or demo.LABELS
    given = {name: getattr(arguments, f"{name}_column") for name in columns._fields}
    columns = columns._replace(**{name: column for name, column in given.items() if column is not None})
    refuse_texts_to_generate(path, columns.text)
    columns = columns.in_file(path, "--data")
    _refuse_two_splits(arguments)

    rows = data.read_rows(path, columns, "--data", keep)
    if arguments.task is None:
        arguments.task = "regression" if data.are_scores(rows) else "classification"
    regression = arguments.task == "regression"
    labels = None if regression else data.labels_of(rows, path, columns.label)
    common = None
    if arguments.eval_data is None:
        train, held_out = data.split_rows(rows, arguments.eval_fraction or 0.2, arguments.seed)
    else:
        train = data.sample_rows(rows, len(rows), arguments.seed)
        held_out = data.read_rows(arguments.eval_data, columns._replace(group=None), "--eval-data", keep)
        common = _common_rows(train, held_out)
    train = data.sample_rows(train, arguments.max_train, arguments.seed)
    held_out = data.sample_rows(held_out, arguments.max_eval, arguments.seed)
    if regression:
        data.check_scores(train, "the rows to train on")
        data.check_scores(held_out, "the rows to evaluate on")
    else:
        data.check_labels(held_out, sorted({row.label for row in train}), "the rows to evaluate on")
        data.warn_of_odd_labels(rows, path, "finetune")
    if common:
        print_warning(common)
    return Task(model, labels, train, held_out, columns)


def refuse_texts_to_generate(path: Path, text_column: str) -> None:
    """Refuses a file that is for a language model, whose user has forgotten to say so."""
    header = {name.strip().casefold() for name in tables.first_row(path, "--data")}
    if text_column.strip().casefold() not in header and ("messages" in header or {"prompt", "completion"} <= header):
        raise CommandError(
            f"--task: {path} has the columns of a language model's data, {tables.quoted(sorted(header))}. "
            "Give --task causal-lm; for a classifier, name the texts with --text-column."
        )
    if header == {text_column.strip().casefold()}:
        raise CommandError(
            f"--task: {path} has only the column {text_column!r}, and no labels. Give --task causal-lm to train a language model "
            "on these texts; a classifier needs a column with the label of each."
        )


def _common_rows(train: list[data.Row], held_out: list[data.Row]) -> str | None:
    """A warning if rows are in both."""
    seen = {(row.text, row.pair) for row in train}
    common = sum((row.text, row.pair) in seen for row in held_out)
    if not common:
        return None
    return _of_common_rows(common, len(held_out))


def _of_common_rows(common: int, total: int) -> str:
    return (
        f"--eval-data: {common:,} of its {total:,} rows are also in --data, so the result is not that of unseen rows."
    )


def find_model(name: str) -> str:
    """The model's folder or GGUF file, checked, or its name on the Hugging Face Hub, which only transformers can check."""
    path = Path(name)
    if path.is_dir():
        _check_model_folder(path)
    elif path.is_file() and path.suffix == ".gguf":
        try:
            refuse_lfs_pointer(path)
        except (OSError, ValueError) as error:
            raise CommandError(f"--model: {error}") from None
    elif path.exists():
        raise CommandError(f"--model: {path} is a file; give the folder that save_pretrained wrote, or a .gguf file.")
    elif path.suffix == ".gguf":
        raise CommandError(f"--model: there is no file {name}.")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise CommandError(f"--model: there is no folder {name!r}. Give a model's folder, or its name on the Hub.")
    return name


def _check_model_folder(folder: Path) -> None:
    """Refuses what transformers would fail on with a message that does not tell why."""
    if (folder / TENSORS_FILE).is_file() and not any(folder.glob(_WEIGHTS[0])):
        raise CommandError(
            f"--model: {folder} is the folder of an adapter. Give the base model. To continue the adapter's training, use "
            "--resume; to train another one on top of it, give the folder that vblora merge writes."
        )
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


def as_json(arguments: argparse.Namespace) -> dict[str, object]:
    """The arguments of the command line, for a file."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    return {name: value for name, value in values.items() if name not in ("run", "command")}


def save_results(
    arguments: argparse.Namespace, task: Task | LanguageTask, folder: Path | None = None, **results: object
) -> None:
    """Writes what the adapter's own files do not hold: the task, the arguments and the ``results``.

    Args:
        folder: the adapter's; None is ``--output``.
    """
    folder = folder or arguments.output
    if isinstance(task, Task):
        about: dict[str, object] = {"labels": task.labels, "scores": task.scale}
    else:
        plain = task.columns.kind == "text"
        about = {
            "rows": task.columns.kind,
            "chat_template": "none" if plain else task.template or arguments.chat_template,
            "ends": task.ends,
        }
    report = {
        "task": arguments.task,
        "adapter_sha256": sha256(folder / TENSORS_FILE),
        "model": str(Path(task.model).absolute()) if Path(task.model).exists() else task.model,
        "fingerprint": task.fingerprint,
        **about,
        "arguments": as_json(arguments),
        **results,
    }
    write_file(folder / RESULTS_FILE, json.dumps(finite(report), indent=2).encode() + b"\n")


def finite(value: object) -> object:
    """The same with None for numbers that JSON lacks: infinite ones and NaN, of a diverged step's log or of a perplexity."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def most_frequent(rows: list[data.Row]) -> float:
    """The share of rows that have the most frequent label."""
    return max(Counter(row.label for row in rows).values()) / len(rows)
