"""``vblora convert``: an adapter from one form into another."""

import argparse
from pathlib import Path

from ..errors import CommandError
from .folders import AdapterFolder, add_bank, check_output, read_adapter

_FORMS = ("resume", "deploy", "peft", "peft-topk", "lora")  # vblora.checkpoint.folder.FORMS, without importing torch
_DTYPES = ("bfloat16", "float16", "int8")

_DESCRIPTION = """\
Converts an adapter: vblora's (resume, deploy), PEFT's VB-LoRA (all logits, or save_only_topk_weights), or a checkpoint
of the paper's own repository, as safetensors. No model is needed.

forms:
  resume     vblora's, to go on training exactly
  deploy     vblora's, for inference: the bank, and k indices and weights a sub-vector
  peft       PEFT's, with all logits: PEFT can train on
  peft-topk  PEFT's, for inference
  lora       PEFT's LoRA with the same update, for PEFT and for servers"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="convert an adapter between vblora's, PEFT's and LoRA's files",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "src", type=Path, metavar="SRC", help="folder of an adapter, or a file of the paper's repository"
    )
    parser.add_argument("dst", type=Path, metavar="DST", help="folder to write")
    parser.add_argument("--form", choices=_FORMS, required=True, help="what to write")
    add_bank(parser)
    parser.add_argument(
        "--bank-dtype", choices=_DTYPES, help="round the bank of a deploy form (default: keep it exactly)"
    )
    parser.add_argument(
        "--topk", type=int, metavar="K", help="k of a file of the paper's repository without a config.json"
    )
    parser.add_argument("--overwrite", action="store_true", help="write into DST though it is there")


def run(arguments: argparse.Namespace) -> int:
    check_output("DST", arguments.dst, overwrite=arguments.overwrite, instead=", or --overwrite")
    if arguments.bank_dtype is not None and arguments.form != "deploy":
        raise CommandError(f'--bank-dtype: is {arguments.bank_dtype}, but only --form "deploy" may round the bank.')
    adapter = _read(arguments)

    import torch

    from ..checkpoint import folder as files

    dtype = None if arguments.bank_dtype is None else getattr(torch, arguments.bank_dtype)
    try:
        files.write(
            adapter.contents,
            arguments.dst,
            form=arguments.form,
            bank_dtype=dtype,
            bank_file=adapter.bank_file if dtype is None else None,
            base_model=adapter.base_model,
            about=adapter.about,
        )
    except ValueError as error:
        raise CommandError(f"--form: {error}") from None
    except OSError as error:
        raise CommandError(f"DST: {arguments.dst} cannot be written: {error}.", 1) from None
    size = sum((arguments.dst / name).stat().st_size for name in (files.CONFIG_FILE, files.TENSORS_FILE))
    print(f"{arguments.dst}: {arguments.form}, {size:,} bytes.")
    return 0


def _read(arguments: argparse.Namespace) -> AdapterFolder:
    src = arguments.src
    if not src.exists():
        raise CommandError(f"SRC: there is no {src}. Give the folder of an adapter.")
    if not src.is_file() and not _is_official(src):
        if arguments.topk is not None:
            raise CommandError("--topk: is for a file of the paper's repository; this adapter says what its k is.")
        return read_adapter("SRC", src, arguments.bank)
    if arguments.bank is not None:
        raise CommandError(
            "--bank: is of an adapter that was saved without, but SRC is a checkpoint of the paper's repository."
        )
    from ..checkpoint import official

    try:
        contents = official.read(src, arguments.topk)
    except (OSError, ValueError) as error:
        message = str(error).replace("Give that as `topk`.", "Give it as --topk.")
        raise CommandError(f"SRC: {message}") from None
    return AdapterFolder(contents, None, None, {})


def _is_official(folder: Path) -> bool:
    """Whether a folder holds a whole model, as the paper's repository saves it, and no adapter."""
    adapter = any(folder.glob("adapter_*")) or any(folder.glob("*/adapter_config.json"))
    return not adapter and any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))
