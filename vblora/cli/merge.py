"""``vblora merge``: an adapter into a base model's files, without loading the model."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CommandError
from .folders import add_adapter, add_bank, check_output, read_adapter, require

if TYPE_CHECKING:
    from .folders import Subparsers

_DESCRIPTION = """\
Merges an adapter into the safetensors files of a base model, one file at a time. It adds the update of each layer to the weight
in float32, and rounds to the weight's dtype. Trained biases and modules_to_save replace those of the base model. It copies all
other files of the folder, except weights in other formats, checkpoints of a Trainer, and hidden files. OUT appears when it is
complete.

A language model in a .gguf file is loaded, dequantised to float32, and saved as a folder of safetensors files with its
tokenizer."""


def add_parser(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "merge",
        help="merge an adapter into a base model's files",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "base", type=Path, metavar="BASE", help="folder of the base model, with its safetensors, or a .gguf file"
    )
    add_adapter(parser, "adapter")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    add_bank(parser)


def run(arguments: argparse.Namespace) -> int:
    check_output("OUT", arguments.out)
    if arguments.out.is_mount():
        raise CommandError(
            f"OUT: {arguments.out} is where a file system is mounted, so the finished folder cannot take its place. Give a "
            "folder in it."
        )
    if arguments.base.is_file() and arguments.base.suffix == ".gguf":
        return _merge_gguf(arguments)
    if not arguments.base.is_dir():
        raise CommandError(
            f"BASE: there is no folder {arguments.base}. Give the folder that save_pretrained wrote, or a .gguf file."
        )
    adapter = read_adapter("ADAPTER", arguments.adapter, arguments.bank)
    from ..checkpoint.merge_files import merge_into_shards, read_weights
    from ..finetune.adapters import read_report, trained_template
    from ..finetune.fingerprints import differing, hash_of
    from ..finetune.stopping import generation_settings

    report = read_report("ADAPTER", arguments.adapter)
    labels = report.get("labels")
    names = (
        {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        if labels
        else {}
    )
    template = trained_template(report)
    texts = {} if template is None else {"chat_template.jinja": template}
    trained = report.get("fingerprint") or {}
    try:
        settings = generation_settings(arguments.base, report.get("ends") or [])
        others = differing(trained, {name: hash_of(weight) for name, weight in read_weights(arguments.base, trained)})
        done = merge_into_shards(adapter.contents, arguments.base, arguments.out, names, texts | settings)
    except FileNotFoundError as error:
        raise CommandError(f"BASE: {error}") from None
    except ValueError as error:
        raise CommandError(f"ADAPTER does not fit BASE: {error}") from None
    except OSError as error:
        raise CommandError(f"OUT: {arguments.out} cannot be written: {error}.", 1) from None
    print(
        f"{arguments.out}: {len(done.updated)} weights updated and {len(done.replaced)} tensors replaced "
        f"in {done.shards} file{'s' * (done.shards > 1)}."
    )
    if template is not None:
        print("The chat template is the one that the adapter was trained with.")
    if settings:
        print("Its generation_config.json also names the token with which the adapter was trained to end.")
    _warn_of_another_base(arguments.base, others)
    if scores := report.get("scores"):
        print(f"The head gives scores in units: score = output * {scores['deviation']} + {scores['mean']}.")
    if done.left_out:
        print(f"Left out, because they hold other weights or another adapter: {', '.join(done.left_out)}.")
    return 0


def _merge_gguf(arguments: argparse.Namespace) -> int:
    require("transformers", "accelerate", "gguf", extra="llm")
    read_adapter("ADAPTER", arguments.adapter, arguments.bank)  # refused before the model is loaded
    from ..finetune.adapters import read_report, trained_template
    from ..finetune.merging import merge_gguf

    report = read_report("ADAPTER", arguments.adapter)
    trained, template = report.get("fingerprint") or {}, trained_template(report)
    try:
        updated, others = merge_gguf(
            arguments.base,
            arguments.adapter,
            arguments.bank,
            arguments.out,
            trained,
            template,
            report.get("ends") or [],
        )
    except OSError as error:
        raise CommandError(f"OUT: {arguments.out} cannot be written: {error}.", 1) from None
    print(f"{arguments.out}: {updated} weights updated, all saved as float32.")
    _warn_of_another_base(arguments.base, others, " So do those of the same model with another quantisation.")
    return 0


def _warn_of_another_base(base: Path, others: list[str], further: str = "") -> None:
    """``others``: the names of weights that differ from those that the adapter was trained with."""
    from ..finetune.notices import print_warning

    if others:
        print_warning(
            f"the weights of {base} are not those that the adapter was trained with (among others {others[0]} differs), so the "
            f"merged model may write nonsense.{further}",
            "merge",
        )
