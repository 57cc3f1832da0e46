"""What the commands share: reading an adapter's folder, and checking where the output goes."""

import argparse
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import CommandError, in_options
from ..files import refuse_unwritable

if TYPE_CHECKING:
    from ..bank import BankFile
    from ..checkpoint.contents import Contents
    from ..checkpoint.json_objects import JsonObject

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


class AdapterFolder(NamedTuple):
    """An adapter's folder, read and checked.

    Attributes:
        bank_file: the file of the bank, if the adapter was saved without its bank.
        base_model: the name of the base model, if the folder tells it.
        about: what PEFT's config tells about the base model besides its name.
    """

    contents: "Contents"
    bank_file: "BankFile | None"
    base_model: str | None
    about: "JsonObject"


def add_adapter(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(name, type=Path, metavar=name.upper(), help="folder of an adapter, vblora's or PEFT's")


def add_bank(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bank", type=Path, metavar="FILE_OR_FOLDER",
        help="the vector bank, if the adapter was saved without it: its file, or the folder of the adapter that holds it",
    )  # fmt: skip


def require(*packages: str, extra: str = "cli") -> None:
    for package in packages:
        if find_spec(package) is None:
            raise CommandError(
                f"the package {package} is not installed. Install it with: pip install 'vblora[{extra}]'"
            )


def read_adapter(argument: str, folder: Path, bank: Path | None) -> AdapterFolder:
    """Reads and checks an adapter. Warnings go to stderr.

    Args:
        argument: what the user calls the folder, for messages.
        bank: of an adapter that was saved without it: the bank's file, or the folder of an adapter that holds it.

    Raises:
        CommandError: the folder or the bank is missing or damaged.
    """
    from ..checkpoint.folder import CONFIG_FILE, read
    from ..finetune.adapters import read_bank

    if not folder.is_dir():
        raise CommandError(f"{argument}: there is no folder {folder}. Give the folder of an adapter.")
    loaded = read_bank(bank)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            contents, shares_bank = read(folder, loaded)
    except (OSError, ValueError) as error:
        raise CommandError(f"{argument}: {in_options(error, 'bank')}") from None
    for warning in caught:
        print(f"{argument}: warning: {warning.message}", file=sys.stderr)
    base_model, about = read_about(folder / CONFIG_FILE)
    bank_file = loaded.file if loaded is not None and shares_bank else None
    return AdapterFolder(contents, bank_file, base_model, about)


def read_about(path: Path) -> "tuple[str | None, JsonObject]":
    """The name of the base model in ``adapter_config.json``, and what PEFT tells about it besides.

    Without a valid file there is nothing: vblora's own tensors' file has all that an adapter needs.
    """
    from ..checkpoint.json_objects import read_object

    try:
        config = read_object(path)
    except (OSError, ValueError):
        config = {}
    about = {name: config[name] for name in ("auto_mapping", "task_type", "revision") if config.get(name) is not None}
    base_model = config.get("base_model_name_or_path")
    return base_model if isinstance(base_model, str) else None, about


def refuse_undecodable(argument: str, folder: Path) -> None:
    """Refuses a path that is not valid UTF-8, which transformers' checkpoints cannot be written to.

    Raises:
        CommandError: it is not.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise CommandError(f"{argument}: the path {str(folder)!r} is not valid UTF-8. Give another one.") from None


@contextmanager
def removed_on_failure(folder: Path) -> Iterator[None]:
    """Removes a new folder if the block raises, and what the block has written into it."""
    existed = folder.exists()
    try:
        yield
    except BaseException:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Removes a new folder that is empty in the end: a Trainer makes its folder at once, and may fail before it writes."""
    existed = folder.exists()
    try:
        yield
    finally:
        if not existed:
            with suppress(OSError):
                folder.rmdir()


def check_output(argument: str, folder: Path, *, overwrite: bool = False, instead: str = "") -> None:
    """Checks that a folder can be written, without creating it.

    Args:
        argument: what the user calls the folder, for messages.
        overwrite: allow a folder that has files.
        instead: what the message suggests besides another folder.

    Raises:
        CommandError: it is a file, is not empty, or cannot be created.
    """
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{argument}: {folder} is a file; give a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise CommandError(f"{argument}: the folder {folder} is not empty. Give another one{instead}.")
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        refuse_unwritable(nearest)
    except OSError as error:
        raise CommandError(
            f"{argument}: {folder} cannot be created or written to: check {nearest} ({error.strerror})."
        ) from None
