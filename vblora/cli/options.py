"""What several commands take: checked numbers and names, and how a model is loaded."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ..errors import CommandError


def number(kind: type, allowed: str, is_allowed: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not is_allowed(value):
            raise argparse.ArgumentTypeError(f"is {text!r}, but must be {allowed}")
        return value

    return parse


def at_least(minimum: int) -> Callable[[str], float]:
    return number(int, f"a whole number, at least {minimum}", lambda value: value >= minimum)


seed = number(int, "a whole number from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32)


def names(text: str) -> list[str]:
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"is {text!r}, but must be names with commas between them")
    return found


def refuse_idle(option: str, given: bool, reason: str) -> None:
    """Refuses an option that would have no effect.

    Args:
        reason: why not, with "because" before it.
    """
    if given:
        raise CommandError(f"{option} has no effect, because {reason}. Leave it out.")


def add_precision(group: "argparse._ArgumentGroup") -> None:
    group = group.add_mutually_exclusive_group()
    group.add_argument(
        "--precision",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="dtype in which layers compute; auto: bfloat16 if the hardware is fast at it, otherwise float32 (%(default)s)",
    )
    group.add_argument(
        "--bf16", action="store_const", const="bfloat16", dest="precision", help="the same as --precision bfloat16"
    )


def add_load_in(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--load-in", choices=["4bit", "8bit"], help="quantise a language model with bitsandbytes when it is loaded"
    )


def add_inference(parser: argparse.ArgumentParser, *, base_alone: bool) -> "argparse._ArgumentGroup":
    """The options of ``generate`` and ``predict``. Returns the group of those about the model.

    Args:
        base_alone: whether the base model can do without an adapter.
    """
    group = parser.add_argument_group("model and adapters")
    group.add_argument("--model", metavar="PATH_OR_NAME", help="the base model (the one that the adapter names)")
    group.add_argument(
        "--adapter", type=Path, action="append", default=[], metavar="DIR",
        help="folder of an adapter, or a folder of such folders; may be given several times, with --adapter-column"
        + " (none: the base model)" * base_alone,
    )  # fmt: skip
    group.add_argument(
        "--adapter-column",
        metavar="NAME",
        help="the column with the adapter of each row: the name of its folder"
        + ", or nothing for the base model" * base_alone,
    )
    group.add_argument(
        "--bank", type=Path, metavar="FILE_OR_FOLDER",
        help="the vector bank, if adapters were saved without it: its file, or the folder of the adapter that holds it",
    )  # fmt: skip
    add_precision(group)
    return group


def add_output_file(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="a .csv, .tsv or .jsonl file (standard output, as JSON lines)",
    )
    group.add_argument("--overwrite", action="store_true", help="overwrite the file if it exists")
