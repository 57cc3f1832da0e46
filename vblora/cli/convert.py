"""``vblora convert``: from one file format of adapters to another."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CommandError, in_options
from .folders import AdapterFolder, add_bank, check_output, read_adapter, removed_on_failure

if TYPE_CHECKING:
    from .folders import Subparsers

_FORMS = ("resume", "deploy", "peft", "peft-topk", "lora")
_DTYPES = ("bfloat16", "float16", "int8")

_DESCRIPTION = """\
Converts an adapter of vblora (resume, deploy), of PEFT (VB-LoRA with all logits or save_only_topk_weights, VeRA, LoRA),
or a safetensors checkpoint of the paper's repository. No model is needed.

forms:
  resume     vblora's, to continue training exactly
  deploy     vblora's, for inference: the bank, and k indices and weights for each sub-vector
  peft       PEFT's, with all logits, for PEFT to continue training
  peft-topk  PEFT's, for inference
  lora       PEFT's LoRA with the same update, for PEFT and for servers"""


def add_parser(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "convert",
        help="convert an adapter between the formats of vblora, PEFT and LoRA",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "src", type=Path, metavar="SRC", help="folder of an adapter, or a checkpoint of the paper's repository"
    )
    parser.add_argument("dst", type=Path, metavar="DST", help="folder to write")
    parser.add_argument("--form", choices=_FORMS, required=True, help="the form to write")
    add_bank(parser)
    parser.add_argument(
        "--bank-dtype", choices=_DTYPES, help="round the bank to this dtype, for --form deploy (default: exact)"
    )
    parser.add_argument(
        "--topk", type=int, metavar="K", help="k, for a checkpoint of the paper's repository without a config.json"
    )
    parser.add_argument("--overwrite", action="store_true", help="write into DST even if it is not empty")


def run(arguments: argparse.Namespace) -> int:
    check_output("DST", arguments.dst, overwrite=arguments.overwrite, instead=", or --overwrite")
    from ..finetune.outputs import refuse_same_folder

    refuse_same_folder("DST", arguments.dst, "SRC", arguments.src)
    refuse_same_folder("DST", arguments.dst, "--bank", arguments.bank)
    if arguments.bank_dtype is not None and arguments.form != "deploy":
        raise CommandError(f"--bank-dtype: is {arguments.bank_dtype}, but only --form deploy may round the bank.")
    adapter = _read(arguments)

    import torch

    from ..checkpoint.folder import CONFIG_FILE, TENSORS_FILE, encode, write
    from ..finetune.adapters import read_report
    from ..finetune.task import RESULTS_FILE

    report = read_report("SRC", arguments.src)

    dtype = None if arguments.bank_dtype is None else getattr(torch, arguments.bank_dtype)
    try:
        with removed_on_failure(arguments.dst):
            files = encode(
                adapter.contents,
                arguments.dst,
                form=arguments.form,
                bank_dtype=dtype,
                bank_file=adapter.bank_file if dtype is None else None,
                base_model=adapter.base_model,
                about=adapter.about,
            )
            if report:  # the labels, the chat template and more, without which the adapter may be used in another way
                report["adapter_sha256"] = hashlib.sha256(files[arguments.dst / TENSORS_FILE]).hexdigest()
                files[arguments.dst / RESULTS_FILE] = json.dumps(report, indent=2).encode() + b"\n"
            write(files)
            if not report:
                (arguments.dst / RESULTS_FILE).unlink(missing_ok=True)  # is about the adapter that this one replaces
    except ValueError as error:
        message = in_options(error, "bank_dtype", "form")
        raise CommandError(message if message.startswith("--") else f"--form: {message}") from None
    except OSError as error:
        raise CommandError(f"DST: {arguments.dst} cannot be written: {error}.", 1) from None
    size = sum((arguments.dst / name).stat().st_size for name in (CONFIG_FILE, TENSORS_FILE))
    print(f"{arguments.dst}: {arguments.form}, {size:,} bytes.")
    return 0


def _read(arguments: argparse.Namespace) -> AdapterFolder:
    src = arguments.src
    if not src.exists():
        raise CommandError(f"SRC: there is no {src}. Give the folder of an adapter.")
    if not src.is_file() and not _is_official(src):
        if arguments.topk is not None:
            raise CommandError(
                "--topk: applies only to a checkpoint of the paper's repository; this adapter states its k. Leave it out."
            )
        return read_adapter("SRC", src, arguments.bank)
    if arguments.bank is not None:
        raise CommandError(
            "--bank: applies only to an adapter that was saved without its bank, but SRC is a checkpoint of the paper's "
            "repository. Leave it out."
        )
    from ..checkpoint import official

    try:
        contents = official.read(src, arguments.topk)
    except (OSError, ValueError) as error:
        raise CommandError(f"SRC: {in_options(error, 'topk')}") from None
    return AdapterFolder(contents, None, None, {})


def _is_official(folder: Path) -> bool:
    """Whether a folder holds a whole model, as the paper's repository saves it, rather than an adapter."""
    adapter = any(folder.glob("adapter_*")) or any(folder.glob("*/adapter_config.json"))
    return not adapter and any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))
