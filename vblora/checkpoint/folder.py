"""An adapter as a folder: ``adapter_config.json``, ``adapter_model.safetensors``, and a model card in ``README.md``.

Our folders and PEFT's have the same file names. Ours have a key of their own in the metadata of the tensors' file.
"""

import json
import os
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..bank import BankFile, VectorBank
from ..errors import VBLoRAWarning, listed
from ..files import locked, open_tensors, read_tensors, to_bytes, write_files
from . import native
from .contents import Contents
from .formats import ANY_METHOD, METHODS, PEFT_DECODERS, encode_for_peft
from .json_objects import JsonObject, as_type, parse_object, read_object, shortened

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
_CONFIG = "adapter_config"  # in the metadata of the tensors' file, in PEFT's forms: what is in the other file
_ABOUT_THE_BASE = ("base_model_name_or_path", "revision", "auto_mapping", "task_type", "inference_mode")
_PEFT_FORMS = dict.fromkeys(form for method in METHODS.values() for form in method.peft_encoders)
FORMS = (*native.FORMS, *_PEFT_FORMS, *ANY_METHOD)
METHOD_NAMES = {config.method: method.title for config, method in METHODS.items()}


def encode(
    contents: Contents,
    directory: str | os.PathLike[str],
    *,
    form: str,
    bank_dtype: torch.dtype | None = None,
    bank_file: BankFile | None = None,
    base_model: str | None = None,
    about: JsonObject | None = None,
) -> dict[Path, bytes]:
    """The files of a folder, which is made if it does not exist, for :func:`write`.

    Args:
        bank_file: the file that holds the bank. Our own forms name it by its hash in place of the bank.
        base_model: name of the base model.
        about: further fields of PEFT's config about the base model, for PEFT's ``Auto`` classes.
    """
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"`directory` is {folder}, which is a file. Pass a folder.")
    contents.check_widths_known()
    if form in native.FORMS:
        description, tensors = native.encode(contents, form, bank_dtype=bank_dtype, bank_file=bank_file)
        description["base_model_name_or_path"] = base_model
        # The tensors' file is complete by itself, so replacing it replaces the adapter.
        metadata = {native.METADATA: json.dumps(description)}
        description = _flattened(description)
    else:
        if bank_dtype is not None:
            raise ValueError(
                f'`bank_dtype` is {bank_dtype}, but only `form` "deploy" may round the bank, not "{form}".'
            )
        description, tensors = encode_for_peft(contents, form, base_model)
        description |= about or {}
        metadata = {"format": "pt", _CONFIG: json.dumps(description)}  # PEFT writes only the first
    folder.mkdir(parents=True, exist_ok=True)
    _warn_of_model(folder)
    files = {folder / TENSORS_FILE: to_bytes(tensors, metadata)}
    if (card := _renewed(folder / CARD_FILE, _model_card(contents, description, base_model))) is not None:
        files[folder / CARD_FILE] = card.encode(errors="backslashreplace")
    files[folder / CONFIG_FILE] = json.dumps(description, indent=2).encode() + b"\n"
    return files


def write(files: dict[Path, bytes]) -> None:
    """Writes the files of one or several folders. A reader that takes no lock, such as PEFT, may find a config missing, but never
    that of another adapter."""
    write_files(files, describing=[path for path in files if path.name == CONFIG_FILE])


def read(
    directory: str | os.PathLike[str], bank: VectorBank | None = None, present: VectorBank | None = None
) -> tuple[Contents, bool]:
    """The checked contents of a folder, and whether its bank is in a file of its own.

    Args:
        bank: the bank in that file.
        present: a bank to use if one is needed and ``bank`` is None.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: a file is damaged or invalid, or ``bank`` is missing or another one. The message names the file.
    """
    path = Path(directory) / TENSORS_FILE
    _check_files(path)
    with locked({path.parent}, shared=True):  # of PEFT's forms, both files count
        tensors, metadata = read_tensors(path)
        if native.METADATA not in metadata:
            return _read_peft(path, tensors, bank, metadata.get(_CONFIG)), False
    try:
        description = parse_object(metadata[native.METADATA])
        shares_bank = native.named_bank(description) is not None
        if bank is None and present is not None and present.file is not None and shares_bank:
            bank = present
        contents = native.decode(description, tensors, bank)
        contents.check()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _warn_if_edited(Path(directory) / CONFIG_FILE, description)
    return contents, shares_bank


def read_description(directory: str | os.PathLike[str]) -> native.Description | None:
    """What a folder tells of its adapter without the tensors; None for a folder that vblora has not written.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: the file is damaged or its description invalid. The message names the file.
    """
    path = Path(directory) / TENSORS_FILE
    _check_files(path)
    with open_tensors(path) as file:
        metadata = file.metadata() or {}
    if native.METADATA not in metadata:
        return None
    try:
        return native.describe(parse_object(metadata[native.METADATA]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def folder_in(directory: Path, name: str) -> Path | None:
    """The folder called ``name`` in a directory; None if there is none, or the name leads out of the directory."""
    if Path(name).name != name or name in ("", ".", ".."):
        return None
    folder = directory / name
    try:
        return folder if folder.is_dir() else None
    except OSError:  # the name is too long for a file system
        return None


def _read_peft(path: Path, tensors: dict[str, Tensor], bank: VectorBank | None, written: str | None) -> Contents:
    """``written``: the config that vblora wrote with the tensors."""
    config_path = path.with_name(CONFIG_FILE)
    try:
        of_tensors = None if written is None else parse_object(written)
    except ValueError as error:
        raise ValueError(f"{path}: its metadata is damaged: {error}") from None
    try:
        description = read_object(config_path)
    except FileNotFoundError:
        if of_tensors is None:
            raise ValueError(f"{config_path} is missing, and vblora has not written {TENSORS_FILE}.") from None
        description = of_tensors
        warnings.warn(
            f"{config_path} is missing, perhaps because a save was interrupted. vblora reads {TENSORS_FILE} without it, but PEFT "
            "cannot. Save the adapter again.",
            VBLoRAWarning,
            stacklevel=4,
        )
    kind = description.get("peft_type")
    if kind is None:
        raise ValueError(f"{config_path} has no `peft_type`: it is neither for an adapter of vblora's nor of PEFT's.")
    if kind == native.PEFT_TYPE:
        raise ValueError(
            f"{path} lacks the description that vblora writes into it, though {CONFIG_FILE} is vblora's: another program has "
            "written it. Save the adapter again."
        )
    if not isinstance(kind, str) or kind not in PEFT_DECODERS:
        known = ", ".join(map(repr, PEFT_DECODERS))
        raise ValueError(f"{config_path}: `peft_type` is {shortened(kind)}; of PEFT's adapters, vblora reads {known}.")
    try:
        if bank is not None:
            raise ValueError("it has a bank of its own, but `bank` was given. Leave that out.")
        contents = PEFT_DECODERS[kind](description, tensors)
        contents.check()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if of_tensors is not None and _fields(of_tensors) != _fields(description):
        warnings.warn(
            f"{config_path} is not what {TENSORS_FILE} was saved with: it was edited, or is that of another adapter. If you did "
            "not edit it, save the adapter again.",
            VBLoRAWarning,
            stacklevel=4,
        )
    return contents


def _fields(description: JsonObject) -> JsonObject:
    """The fields of PEFT's config that tell what the adapter computes."""
    return {name: value for name, value in description.items() if name not in _ABOUT_THE_BASE}


def _check_files(path: Path) -> None:
    """If the tensors' file is missing, says where else the adapter may be."""
    if path.is_file():
        return
    folder = path.parent
    if folder.is_file():
        raise ValueError(f"{folder} is a file. Pass the folder of the adapter, {folder.parent}.")
    if not folder.exists():
        raise FileNotFoundError(
            f"there is no folder {folder}. Pass the folder of an adapter; download one from the Hub with "
            "huggingface_hub.snapshot_download."
        )
    if (folder / "adapter_model.bin").exists():
        raise ValueError(
            f"{folder / 'adapter_model.bin'} is a pickle, which can run any code, so vblora does not read it. Let PEFT load and "
            "save it again as safetensors: PeftModel.from_pretrained(model, folder).save_pretrained(folder)."
        )
    inner = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_FILE}"))
    if inner:  # PEFT writes an adapter that is not called "default" into a sub-folder
        raise FileNotFoundError(
            f"{path} is missing. There are adapters in its sub-folders {listed(inner)}: pass one of those."
        )
    if _holds_model(folder):
        raise FileNotFoundError(
            f"{path} is missing: {folder} holds a model, not an adapter. Pass the adapter's folder."
        )


def _holds_model(folder: Path) -> bool:
    weights = [file for pattern in ("model*.safetensors", "pytorch_model*.bin") for file in folder.glob(pattern)]
    return bool(weights) and (folder / "config.json").exists()


def _warn_of_model(folder: Path) -> None:
    if _holds_model(folder):
        warnings.warn(
            f"{folder} holds a model beside the adapter. From now on, from_pretrained would try to add the adapter to that "
            "model. Save the adapter into a folder of its own.",
            VBLoRAWarning,
            stacklevel=5,
        )


def _flattened(description: JsonObject) -> JsonObject:
    """A description with the config's fields on its top level, as in PEFT's files."""
    config = as_type("`config`", description["config"], dict)
    return {name: value for name, value in description.items() if name != "config"} | config


def _warn_if_edited(path: Path, description: JsonObject) -> None:
    try:
        same = read_object(path) == _flattened(description)
    except (OSError, ValueError):
        same = False
    if not same:
        warnings.warn(
            f"{path} is not what {TENSORS_FILE} was saved with: it was edited, or a save was interrupted. "
            f"vblora uses {TENSORS_FILE} and ignores it.",
            VBLoRAWarning,
            stacklevel=4,
        )


def _quoted(text: str) -> str:
    """A YAML string in double quotes, in which a colon or a hash is just a character."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _model_card(contents: Contents, description: JsonObject, base_model: str | None) -> str:
    """``description``: of the ``adapter_config.json`` that is written."""
    is_peft = description["peft_type"] != native.PEFT_TYPE
    what = f"{METHODS[type(contents.config)].title}, {contents.summary()}"
    how = "vblora.load(model, "
    if description["peft_type"] == "LORA":
        what, how = f"LoRA, r={contents.config.r}", "model = peft.PeftModel.from_pretrained(model, "
    return f"""---
library_name: {"peft" if is_peft else "vblora"}
{f"base_model: {_quoted(base_model)}" if base_model else ""}
---
An adapter of {base_model or "a model"}: {what}, {len(contents.targets)} layers. Load it into the model with

    {how}"<this folder>")
"""


# The parts of a model card that vblora writes, in a card that the user may have added to.
_CARD_PARTS = (
    re.compile(r"\A---\nlibrary_name: \w+\n(base_model: .*)?\n---\n"),
    re.compile(r"An adapter of .*?: .*?, \d+ layers\. Load it into the model with\n\n    [^\n]*\n", re.DOTALL),
)


def _renewed(path: Path, card: str) -> str | None:
    """The model card to write: of one that is there, the parts that vblora has written become those of ``card``.

    None if nothing is to be written, as over a card of somebody else's.
    """
    if not path.exists():
        return card
    try:
        before = text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):  # no card of vblora's
        return None
    for part in _CARD_PARTS:
        old, new = part.search(text), part.search(card)
        if old is not None and new is not None:
            text = text[: old.start()] + new[0] + text[old.end() :]
    return None if text == before else text
