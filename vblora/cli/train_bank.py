"""``vblora train-bank``: train one vector bank on several tables of labelled texts, and an adapter for each."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CommandError
from .finetune import add_adapter, add_rates
from .folders import check_output, refuse_undecodable, removed_if_empty, require
from .options import at_least, number

if TYPE_CHECKING:
    from ..finetune.task import Task
    from .folders import Subparsers

_DESCRIPTION = """\
Trains one vector bank on several tables of labelled texts, and for each table an adapter with its own head. Defaults are in
parentheses.

The model is frozen, and batches alternate between the tables. The command writes the bank, bank.safetensors, and a folder for
each adapter into --output. Each folder contains indices, weights and the head, but no bank:

  vblora train-bank --data reviews=reviews.csv --data topics=news.jsonl --label-column topics=topic --output shared
  vblora finetune --data mails.csv --bank shared/bank.safetensors     another adapter of the bank, which stays as it is"""


def add_parser(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "train-bank",
        help="train one bank on several tables, and an adapter for each",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, bank=None)

    group = parser.add_argument_group("what to train on")
    group.add_argument(
        "--data", type=_named, action="append", required=True, metavar="NAME=FILE",
        help="the name of an adapter, and its file as for vblora finetune; repeat this for each table",
    )  # fmt: skip
    for column, what in (
        ("text", "the text (text)"),
        ("pair", "a second text, for pairs"),
        ("label", "the label (label)"),
    ):
        group.add_argument(
            f"--{column}-column", type=_column, action="append", default=[], metavar="[NAME=]COLUMN",
            help=f"the column with {what}, of all tables or of the table NAME",
        )  # fmt: skip
    group.add_argument(
        "--eval-fraction", type=number(float, "above 0 and below 1", lambda x: 0 < x < 1), default=0.2, metavar="X",
        help="share of each table to evaluate on (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--max-train", type=at_least(1), metavar="N", help="train on N rows of each table, drawn at random"
    )
    group.add_argument("--max-eval", type=at_least(1), metavar="N", help="evaluate on N rows of each, drawn at random")

    group = parser.add_argument_group("the model, the bank and the adapters")
    group.add_argument("--model", metavar="PATH_OR_NAME", help="a folder, or a name on the Hugging Face Hub")
    group.add_argument(
        "--num-vectors", type=at_least(1), default=256, metavar="N", help="vectors in the bank (%(default)s)"
    )
    add_adapter(group)

    group = parser.add_argument_group("how to train")
    group.add_argument("--epochs", type=at_least(1), default=2, metavar="N", help="passes over the rows (%(default)s)")
    group.add_argument("--batch-size", type=at_least(1), default=32, metavar="N", help="rows in a batch (%(default)s)")
    group.add_argument(
        "--max-length", type=at_least(4), metavar="N", help="tokens of a text to read (128, or the model's limit)"
    )
    group.add_argument(
        "--recipe", choices=["default", "paper"], default="default",
        help="learning rates of bank and logits; paper: the paper's, which are slow (%(default)s)",
    )  # fmt: skip
    add_rates(group)
    parser.set_defaults(lr_head=5e-3)

    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the bank and the adapters")
    group.add_argument("--overwrite", action="store_true", help="write into --output even if it is not empty")


def run(arguments: argparse.Namespace) -> int:
    require("transformers", "accelerate", "rich")
    refuse_undecodable("--output", arguments.output)
    check_output("--output", arguments.output, overwrite=arguments.overwrite, instead=", or --overwrite")
    from ..finetune.injection import check_adapter

    check_adapter(arguments)
    tasks = _read_tasks(arguments)
    for name, task in tasks.items():
        print(f"{name}: {task}", flush=True)
    from ..finetune import shared_bank  # imports transformers, which is slow: only after all other checks

    with removed_if_empty(arguments.output):
        return shared_bank.run(arguments, tasks)


def _read_tasks(arguments: argparse.Namespace) -> "Mapping[str, Task]":
    from ..finetune import data, demo
    from ..finetune.task import Task, find_model

    files: dict[str, Path] = {}
    for name, path in arguments.data:
        if (other := next((other for other in files if other.casefold() == name.casefold()), None)) is not None:
            raise CommandError(
                f"--data: {name!r} names both {files[other]} and {path}, or folders that some file systems take for one. Give "
                "each table a name of its own."
            )
        files[name] = path
    if len(files) < 2:
        raise CommandError(
            "--data: there is one table, but a shared bank takes at least two. See vblora finetune for one."
        )
    columns = {part: _by_table(arguments, part, files) for part in ("text", "pair", "label")}
    model = str(demo.find_model()) if arguments.model is None else find_model(arguments.model)
    tasks = {}
    for name, path in files.items():
        chosen = data.Columns(columns["text"][name] or "text", columns["label"][name] or "label", columns["pair"][name])
        rows = data.read_rows(path, chosen, "--data")
        labels = data.labels_of(rows, path, chosen.label)
        train, held_out = data.split_rows(rows, arguments.eval_fraction, arguments.seed)
        train = data.sample_rows(train, arguments.max_train, arguments.seed)
        held_out = data.sample_rows(held_out, arguments.max_eval, arguments.seed)
        data.check_labels(held_out, sorted({row.label for row in train}), f"the rows of {path} to evaluate on")
        data.warn_of_odd_labels(rows, path, "train-bank")
        tasks[name] = Task(model, labels, train, held_out, chosen)
    return tasks


def _by_table(arguments: argparse.Namespace, part: str, files: Mapping[str, Path]) -> dict[str, str | None]:
    """The column of each table: what ``--PART-column`` says of this table, or else of all."""
    given: dict[str | None, str] = {}
    for table, column in getattr(arguments, f"{part}_column"):
        if table is not None and table not in files:
            raise CommandError(
                f"--{part}-column: there is no table {table!r}; --data names {', '.join(map(repr, files))}."
            )
        if table in given:
            of = "all tables" if table is None else repr(table)
            raise CommandError(f"--{part}-column: {given[table]!r} and {column!r} are both for {of}. Give one of them.")
        given[table] = column
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
