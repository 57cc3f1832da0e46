"""``vblora train-bank``: train one vector bank on several files of rows, and an adapter for each."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CommandError
from .finetune import add_adapter, add_base_model, add_recipe, add_texts, settle_options
from .folders import check_output, refuse_undecodable, removed_if_empty, require
from .options import at_least, number

if TYPE_CHECKING:
    from ..finetune.task import LanguageTask, Task
    from .folders import Subparsers

_DESCRIPTION = """\
Trains one vector bank on several files of rows, and an adapter for each. Defaults are in parentheses.

  --task classification   texts with labels (the default); each adapter has its own head
  --task causal-lm        a language model: texts, prompts with completions, or chats

The model is frozen, and batches alternate between the files. The command writes the bank, bank.safetensors, and a folder for
each adapter into --output. Each folder contains indices, weights and the head, but no bank.

  vblora train-bank --data reviews=reviews.csv --data topics=news.jsonl --label-column topics=topic --output shared

To train another adapter on the finished bank, which stays as it is:

  vblora finetune --data mails.csv --bank shared/bank.safetensors"""

# Options that only one task has, and their defaults. All are None until the task is known.
_OPTIONS: dict[str, dict[str, object]] = {
    "classification": {
        "pair_column": (), "label_column": (), "eval_fraction": 0.2, "num_vectors": 256, "batch_size": 32, "lr_head": 5e-3,
    },
    "causal-lm": {
        "prompt_column": (), "completion_column": (), "messages_column": (), "chat_template": "auto", "loss": "completions",
        "eval_fraction": None, "num_vectors": 1024, "batch_size": 8,
    },
}  # fmt: skip
_COLUMNS = {
    "text": "the text (text)",
    "pair": "a second text, for pairs (classification)",
    "label": "the label (label; classification)",
    "prompt": "the prompt (prompt; causal-lm)",
    "completion": "the completion of the prompt (completion; causal-lm)",
    "messages": "a chat (messages; causal-lm)",
}


def add_parser(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "train-bank",
        help="train one bank on several files, and an adapter for each",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, bank=None)
    parser.add_argument("--task", choices=list(_OPTIONS), default="classification", help="what to train (see above)")

    group = parser.add_argument_group("what to train on")
    group.add_argument(
        "--data", type=_named, action="append", required=True, metavar="NAME=FILE",
        help="a name for the adapter, and its file, as for vblora finetune; repeat this for each file",
    )  # fmt: skip
    for column, what in _COLUMNS.items():
        group.add_argument(
            f"--{column}-column", type=_column, action="append", metavar="[NAME=]COLUMN",
            help=f"the column with {what}, in all files or in the file NAME",
        )  # fmt: skip
    group.add_argument(
        "--eval-fraction", type=number(float, "above 0 and below 1", lambda x: 0 < x < 1), metavar="X",
        help="share of each file to evaluate on (0.2; causal-lm: 0.1, at most 500 rows)",
    )  # fmt: skip
    group.add_argument(
        "--max-train", type=at_least(1), metavar="N", help="train on N rows of each file, drawn at random"
    )
    group.add_argument(
        "--max-eval", type=at_least(1), metavar="N", help="evaluate on N rows of each file, drawn at random"
    )
    add_texts(group)

    group = parser.add_argument_group("the model, the bank and the adapters")
    add_base_model(group)
    group.add_argument(
        "--num-vectors", type=at_least(1), metavar="N", help="vectors in the bank (256; causal-lm: 1024)"
    )
    add_adapter(group)

    group = parser.add_argument_group("how to train")
    group.add_argument("--epochs", type=at_least(1), default=2, metavar="N", help="passes over the rows (%(default)s)")
    group.add_argument("--batch-size", type=at_least(1), metavar="N", help="rows in a batch (32; causal-lm: 8)")
    group.add_argument(
        "--max-length", type=at_least(4), metavar="N",
        help="tokens of a text to read; the rest is cut off (128; causal-lm: 1024; or the model's limit)",
    )  # fmt: skip
    add_recipe(group)

    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the bank and the adapters")
    group.add_argument("--overwrite", action="store_true", help="write into --output even if it is not empty")


def run(arguments: argparse.Namespace) -> int:
    settle_options(arguments, arguments.task, _OPTIONS)
    language = arguments.task == "causal-lm"
    require("transformers", "accelerate", "rich")
    if language:
        require("trl", "datasets", extra="llm")
    from ..finetune.notices import processes

    if processes() > 1:
        raise CommandError(f"train-bank trains in one process, but {processes()} were started. Start one.")
    refuse_undecodable("--output", arguments.output)
    check_output("--output", arguments.output, overwrite=arguments.overwrite, instead=", or --overwrite")
    from ..finetune.injection import check_adapter
    from ..finetune.notices import say_default_model

    check_adapter(arguments)
    tasks = _read_tasks(arguments)
    for name, task in tasks.items():
        print(f"{name}: {task}", flush=True)
    (model,) = {task.model for task in tasks.values()}
    say_default_model(arguments.model, model)
    from ..finetune import shared_bank  # imports transformers, which is slow: only after all other checks

    with removed_if_empty(arguments.output):
        if language:
            from ..finetune import shared_language

            return shared_bank.run(arguments, tasks, shared_language.prepare)
        from ..finetune import shared_classifiers

        return shared_bank.run(arguments, tasks, shared_classifiers.prepare)


def _read_tasks(arguments: argparse.Namespace) -> "Mapping[str, Task] | Mapping[str, LanguageTask]":
    files = _files(arguments)
    columns = {part: _by_file(arguments, part, files) for part in _COLUMNS}
    if arguments.task == "causal-lm":
        return _read_texts(arguments, files, columns)
    return _read_tables(arguments, files, columns)


def _files(arguments: argparse.Namespace) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for name, path in arguments.data:
        if (other := next((other for other in files if other.casefold() == name.casefold()), None)) is not None:
            raise CommandError(
                f"--data: {name!r} names both {files[other]} and {path}, or folders that some file systems take for one. Give "
                "each file a name of its own."
            )
        files[name] = path
    if len(files) < 2:
        raise CommandError(
            "--data: there is one file, but a shared bank takes at least two. See vblora finetune for one."
        )
    return files


_ByFile = dict[str, dict[str, str | None]]  # the column of each part, by the file's name


def _read_tables(arguments: argparse.Namespace, files: Mapping[str, Path], columns: _ByFile) -> "dict[str, Task]":
    from ..finetune import data, demo
    from ..finetune.task import Task, find_model, refuse_texts_to_generate

    model = str(demo.find_model()) if arguments.model is None else find_model(arguments.model)
    tasks = {}
    for name, path in files.items():
        chosen = data.Columns(columns["text"][name] or "text", columns["label"][name] or "label", columns["pair"][name])
        refuse_texts_to_generate(path, chosen.text)
        rows = data.read_rows(path, chosen, "--data")
        labels = data.labels_of(rows, path, chosen.label)
        train, held_out = data.split_rows(rows, arguments.eval_fraction, arguments.seed)
        train = data.sample_rows(train, arguments.max_train, arguments.seed)
        held_out = data.sample_rows(held_out, arguments.max_eval, arguments.seed)
        data.check_labels(held_out, sorted({row.label for row in train}), f"the rows of {path} to evaluate on")
        data.warn_of_odd_labels(rows, path, "train-bank")
        tasks[name] = Task(model, labels, train, held_out, chosen)
    return tasks


def _read_texts(
    arguments: argparse.Namespace, files: Mapping[str, Path], columns: _ByFile
) -> "dict[str, LanguageTask]":
    from ..finetune import demo, texts
    from ..finetune.task import LanguageTask, find_model, read_template, refuse_for_plain_texts, split_texts

    model = str(demo.find_language_model()) if arguments.model is None else find_model(arguments.model)
    template = read_template(arguments.chat_template)
    tasks = {}
    for name, path in files.items():
        given = {part: columns[part][name] for part in ("text", "prompt", "completion", "messages")}
        chosen = texts.find_columns(path, "--data", given)
        if chosen.kind == "text":
            refuse_for_plain_texts(arguments, template)
        tasks[name] = LanguageTask(model, template, *split_texts(arguments, path, chosen))
    return tasks


def _by_file(arguments: argparse.Namespace, part: str, files: Mapping[str, Path]) -> dict[str, str | None]:
    """The column of each file: what ``--PART-column`` says of this file, or else of all."""
    given: dict[str | None, str] = {}
    for file, column in getattr(arguments, f"{part}_column") or ():
        if file is not None and file not in files:
            raise CommandError(
                f"--{part}-column: there is no file {file!r}; --data names {', '.join(map(repr, files))}."
            )
        if file in given:
            of = "all files" if file is None else repr(file)
            raise CommandError(f"--{part}-column: {given[file]!r} and {column!r} are both for {of}. Give one of them.")
        given[file] = column
    return {name: given.get(name, given.get(None)) for name in files}


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if (
        not (name and equals and path)
        or name in (".", "..", "bank.safetensors", "train-bank.json")
        or set(name) & set("/\\\0")
    ):
        raise argparse.ArgumentTypeError(f"is {text!r}, but must be NAME=FILE, where NAME can be a folder's name")
    return name, Path(path)


def _column(text: str) -> tuple[str | None, str]:
    table, equals, column = text.rpartition("=")
    if not column or (equals and not table):
        raise argparse.ArgumentTypeError(f"is {text!r}, but must be COLUMN or NAME=COLUMN")
    return (table if equals else None), column
