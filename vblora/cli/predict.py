"""``vblora predict``: a table of texts in, labels or scores out."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CommandError
from .folders import require
from .options import add_inference, add_output_file, at_least, names

if TYPE_CHECKING:
    from .folders import Subparsers

_DESCRIPTION = """\
Predicts labels or scores of texts with an adapter from vblora finetune. The output has the columns of the file and new ones:
predicted and, for labels, probability. Defaults are in parentheses."""


def add_parser(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "predict",
        help="predict labels or scores with a classifier's adapter",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    group = parser.add_argument_group("texts")
    group.add_argument("--data", type=Path, required=True, metavar="FILE", help="rows: .csv, .tsv or .jsonl")
    group.add_argument("--text-column", metavar="NAME", help="the column with the text (as the adapter was trained)")
    group.add_argument(
        "--pair-column", metavar="NAME", help="the column with a second text (as the adapter was trained)"
    )
    group.add_argument(
        "--max-length", type=at_least(4), metavar="N", help="tokens of a text to read (as the adapter was trained)"
    )
    group = add_inference(parser, base_alone=False)
    group.add_argument(
        "--labels",
        type=names,
        metavar="A,B",
        help="the labels in the order of the head's outputs, if the adapter's folder does not contain them",
    )
    group.add_argument("--batch-size", type=at_least(1), default=64, metavar="N", help="texts in a batch (%(default)s)")
    add_output_file(parser)


def run(arguments: argparse.Namespace) -> int:
    require("transformers", "accelerate")
    from ..finetune import adapters
    from ..finetune.data import Columns
    from ..finetune.outputs import check_output_file

    check_output_file(arguments.output, arguments.overwrite)
    if not arguments.adapter:
        raise CommandError(
            "--adapter: missing. Give the folder of the adapter, which also contains the classifier's head."
        )
    folders = adapters.find_folders(arguments.adapter)
    if arguments.adapter_column is None:
        adapters.refuse_several(folders)
    runs = {name: adapters.read_run(folder) for name, folder in folders.items()}
    for run in runs.values():
        if run.is_language_model:
            raise CommandError(f"--adapter: {run.folder} is a language model's adapter. Use vblora generate.")
    found = list(runs.values())
    model = adapters.find_base(arguments.model, found)
    texts = [run.arguments.get("text_column") or "text" for run in found]
    pairs = [run.arguments.get("pair_column") for run in found]
    columns = Columns(
        text=arguments.text_column or adapters.common_setting(found, "--text-column", texts),
        label="",
        pair=arguments.pair_column or adapters.common_setting(found, "--pair-column", pairs),
    )
    from ..finetune import predicting  # imports transformers, which is slow: only after all other checks

    return predicting.run(arguments, predicting.Job(model, runs, arguments.labels, columns))
