"""What the commands that work on folders share: reading an adapter, and looking at where something is to go."""

import argparse
import json
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ..errors import CommandError


class AdapterFolder(NamedTuple):
    """An adapter's folder, read and checked."""

    contents: object  # vblora.checkpoint.contents.Contents
    bank_file: object | None  # vblora.bank.BankFile, if its bank is in a file of its own
    base_model: str | None
    about: dict  # what PEFT's config says of it besides


def add_adapter(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(name, type=Path, metavar=name.upper(), help="folder of an adapter, vblora's or PEFT's")


def add_bank(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bank", type=Path, metavar="FILE", help="the vector bank, of an adapter that was saved without"
    )


def need(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            raise CommandError(f"the package {package} is not installed. Install it with: pip install 'vblora[cli]'")


def read_adapter(argument: str, folder: Path, bank: Path | None) -> AdapterFolder:
    from ..bank import VectorBank  # torch: slow, so not before the arguments are checked
    from ..checkpoint import folder as files

    if not folder.is_dir():
        raise CommandError(f"{argument}: there is no folder {folder}. Give the folder of an adapter.")
    try:
        loaded = None if bank is None else VectorBank.from_file(bank)
    except (OSError, ValueError) as error:
        raise CommandError(f"--bank: {error}") from None
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            contents, shares_bank = files.read(folder, loaded)
    except (OSError, ValueError) as error:
        message = str(error).replace("Pass that as `bank`.", "Give its file as --bank.")
        raise CommandError(f"{argument}: {message}") from None
    for warning in caught:
        print(f"{argument}: warning: {warning.message}", file=sys.stderr)
    config = read_config(folder / files.CONFIG_FILE)
    about = {name: config[name] for name in ("auto_mapping", "task_type", "revision") if config.get(name) is not None}
    base_model = config.get("base_model_name_or_path")
    return AdapterFolder(contents, loaded.file if shares_bank else None, base_model, about)


def read_config(path: Path) -> dict:
    """What stands in an ``adapter_config.json``; nothing, if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def check_output(argument: str, folder: Path, *, overwrite: bool = False, instead: str = "") -> None:
    """Makes sure, without making it, that a folder can be written. ``instead``: what else may be given than another one."""
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{argument}: {folder} is a file; give a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise CommandError(f"{argument}: the folder {folder} is not empty. Give another one{instead}.")
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise CommandError(f"{argument}: {folder} cannot be made or written to: look at {nearest}.")
