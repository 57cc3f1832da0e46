"""``vblora plot``: a picture of how an adapter uses its bank."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CommandError
from .folders import add_adapter, add_bank, read_adapter, require
from .options import refuse_idle

if TYPE_CHECKING:
    from .folders import Subparsers

_DESCRIPTION = """\
Draws how a VB-LoRA adapter, vblora's or PEFT's, uses its bank: how often it uses each vector, how many of its candidates each
sub-vector tried, how even the weights are, and which layers share vectors."""


def add_parser(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "plot",
        help="draw how an adapter uses its bank",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add_adapter(parser, "folder")
    add_bank(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="the picture, a .png file (bank.png in the folder)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, and draw nothing")


def run(arguments: argparse.Namespace) -> int:
    if not arguments.json:
        require("matplotlib", extra="plot")
    refuse_idle("--output", arguments.json and arguments.output is not None, "--json draws no picture")
    if arguments.output is not None and arguments.output.suffix != ".png":
        raise CommandError(f"--output: is {arguments.output}, but must be a .png file.")
    adapter = read_adapter("FOLDER", arguments.folder, arguments.bank)
    from ..checkpoint.vblora import VBLoRAContents
    from ..finetune.bank_use import bank_use
    from ..finetune.pictures import draw_bank

    if not isinstance(adapter.contents, VBLoRAContents):
        raise CommandError(
            f"FOLDER: {arguments.folder} is a {adapter.contents.config.method} adapter, which has no bank to draw."
        )
    use = bank_use(adapter.contents)
    if arguments.json:
        print(json.dumps(use.as_json() | {"summary": use.summary()}))
        return 0
    output = arguments.output or arguments.folder / "bank.png"
    try:
        draw_bank(use, output)
    except OSError as error:
        raise CommandError(f"--output: {output} cannot be written: {error}.", 1) from None
    print(f"{output}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in use.summary().items()))
    return 0
