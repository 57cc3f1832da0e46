"""The command line of ``python -m benchmarks.quality``."""

import argparse
import os
from pathlib import Path

from .suites import SUITES, Suite
from .tasks import WORD_ORDER


def parse(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.quality",
        description=description,
        epilog="\n".join(f"methods of {name}: {', '.join(suite.recipes)}" for name, suite in SUITES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--suite",
        choices=list(SUITES),
        default="glue",
        help="glue: sentence encoders; e2e: a language model describes restaurants; chat: a language model learns from chats "
        "(%(default)s)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="glue: the folder of TASK/train.tsv and TASK/dev.tsv ($GLUE); e2e: the folder of devset.csv and "
        "testset_w_refs.csv ($E2E); chat makes its own data",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help="glue: the folder of an encoder (all-MiniLM-L6-v2); e2e, chat: the folder or the GGUF file of a language model "
        "(SmolLM2-135M-Instruct)",
    )
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="the methods to compare, listed below (all)")
    parser.add_argument("--seeds", type=_positive, metavar="N", help="train each method with the seeds 0 to N - 1 (3)")
    parser.add_argument(
        "--precision",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="compute in bfloat16 (autocast) or float32; auto: bfloat16 if the processor has instructions for it (%(default)s)",
    )
    parser.add_argument(
        "--processes",
        type=_positive,
        default=min(os.cpu_count() or 1, 4),
        metavar="N",
        help="train N runs at the same time (%(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the file with all runs; runs that it has are not repeated (build/quality.jsonl; build/quality-SUITE.jsonl)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a short form: one seed, fewer rows or steps, the most important methods"
    )

    group = parser.add_argument_group("how much to train and to evaluate")
    group.add_argument("--max-train", type=_positive, metavar="N", help="train on N rows of each task (all)")
    group.add_argument("--batch-size", type=_positive, metavar="N", help="rows in a step (glue: 16; e2e, chat: 8)")
    group.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help=f"glue: the tasks; {WORD_ORDER} is made from the texts of the others (all in the folder)",
    )
    group.add_argument("--epochs", type=_positive, metavar="N", help="glue: passes over the rows (3)")
    group.add_argument("--steps", type=_positive, metavar="N", help="e2e, chat: training steps (600)")
    group.add_argument("--max-dev", type=_positive, metavar="N", help="e2e, chat: compute the loss of N rows (all)")
    group.add_argument(
        "--max-prompts", type=_whole, metavar="N", help="e2e: complete N prompts (all); 0: compute only the loss"
    )
    group.add_argument(
        "--beams", type=_positive, nargs="+", metavar="N", help="e2e: complete with N beams; 1 is greedy (1 4)"
    )

    group = parser.add_argument_group(
        "to choose settings",
        "With these, only the table is written. Without them, it is also written as JSON, with two pictures, next to --output.",
    )
    group.add_argument(
        "--held-out",
        action="store_true",
        help="evaluate on training rows that no run trains on, instead of the test set; glue: those beyond --max-train",
    )
    group.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="change learning rates (lr_bank, lr_factors, ...), warm_up, or fields of the config, for the methods that have them",
    )
    group.add_argument(
        "--search",
        type=_positive,
        metavar="N",
        help="try N settings of each method: its own, and others that are drawn at random; needs --held-out. If there are "
        "several tasks, the better half of the settings on the first task is tried on the others",
    )
    arguments = parser.parse_args()
    suite = SUITES[arguments.suite]
    _refuse(parser, arguments, suite)
    if arguments.suite != "chat":
        variable = arguments.suite.upper()
        arguments.data = arguments.data or (Path(os.environ[variable]) if os.environ.get(variable) else None)
        if arguments.data is None:
            parser.error(f"give --data, or set {variable}, to the folder of the data")
    if arguments.output is None:
        arguments.output = Path(
            "build", "quality.jsonl" if arguments.suite == "glue" else f"quality-{arguments.suite}.jsonl"
        )
    defaults = {"seeds": 3}
    if arguments.quick:
        defaults = {"seeds": 1, "methods": list(suite.quick), **suite.short}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def _positive(text: str) -> int:
    if (number := _whole(text)) == 0:
        raise argparse.ArgumentTypeError("is 0; it must be 1 or more")
    return number


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"is {text!r}; it must be a whole number")
    return int(text)


def _refuse(parser: argparse.ArgumentParser, arguments: argparse.Namespace, suite: Suite) -> None:
    """Options of other suites, methods that this one does not have, and a search on test sets."""
    others = {name for other in SUITES.values() for name in other.options} - set(suite.options)
    for name in sorted(others | ({"data"} if arguments.suite == "chat" else set())):
        if getattr(arguments, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is not an option of --suite {arguments.suite}")
    for name in arguments.methods or ():
        if name not in suite.recipes:
            parser.error(f"--methods: {name!r} is none of {arguments.suite}'s: {', '.join(suite.recipes)}")
    if arguments.search and not arguments.held_out:
        parser.error("--search: add --held-out, so that test sets do not choose settings")
