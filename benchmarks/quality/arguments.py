"""The command line of ``python -m benchmarks.quality``."""

import argparse
import os
from pathlib import Path

from .suites import SUITES, Suite
from .tasks import WORD_ORDER


def parse(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.quality", description=description)
    parser.add_argument("--suite", choices=list(SUITES), default="glue", help="(%(default)s)")
    parser.add_argument(
        "--data", type=Path, help="of glue: folder of TASK/train.tsv, TASK/dev.tsv; of e2e: of its files ($GLUE, $E2E)"
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="folder of an encoder (all-MiniLM-L6-v2) or, or GGUF file, of a language model (SmolLM2-135M)",
    )
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="all of the suite")
    parser.add_argument("--seeds", type=_positive, default=3)
    parser.add_argument("--max-train", type=_positive, help="training rows of each task (all)")
    parser.add_argument("--batch-size", type=_positive, help="training rows a step (glue 16, others 8)")
    parser.add_argument(
        "--tasks", nargs="+", help=f"of glue: all in the folder; {WORD_ORDER} is made from the texts in it"
    )
    parser.add_argument("--epochs", type=_positive, help="of glue (3)")
    parser.add_argument("--steps", type=_positive, help="of e2e and chat (600)")
    parser.add_argument("--max-dev", type=_positive, help="of e2e and chat: rows whose loss is taken (all)")
    parser.add_argument(
        "--max-prompts", type=_whole, help="of e2e: restaurants that are described (all); with 0 only the loss"
    )
    parser.add_argument(
        "--beams", type=_positive, nargs="+", help="of e2e: a table's columns for each; 1 is greedy (1 4)"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="changes fields and rates of the methods"
    )
    parser.add_argument(
        "--search",
        type=_positive,
        metavar="N",
        help="instead of each method's recipe: N settings, its own and others drawn, of which the first task lets half pass",
    )
    parser.add_argument(
        "--held-out",
        action="store_true",
        help="score on training rows that no run is trained on: of glue those beyond --max-train",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="bfloat16 by autocast, which auto takes on a processor that has instructions for it",
    )
    parser.add_argument(
        "--processes", type=_positive, default=min(os.cpu_count() or 1, 4), help="runs at once (%(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, help="where runs are kept (build/quality.jsonl, build/quality-SUITE.jsonl)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one seed, fewer rows or steps, the methods that matter most"
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
    if arguments.quick:
        arguments.seeds, arguments.methods = 1, arguments.methods or list(suite.quick)
        for name, value in suite.short.items():
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
    """Options of other suites, and methods that this one does not have."""
    others = {name for other in SUITES.values() for name in other.options} - set(suite.options)
    for name in sorted(others | ({"data"} if arguments.suite == "chat" else set())):
        if getattr(arguments, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is not an option of --suite {arguments.suite}")
    for name in arguments.methods or ():
        if name not in suite.recipes:
            parser.error(f"--methods: {name!r} is none of {arguments.suite}'s: {', '.join(suite.recipes)}")
