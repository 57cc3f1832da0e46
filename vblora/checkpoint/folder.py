"""An adapter as a folder: ``adapter_config.json``, ``adapter_model.safetensors``, and a few lines for people in ``README.md``.

Ours and PEFT's have these names. The metadata of the tensors' file tells them apart.
"""

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..adapters import VBLoRAAdapter
from ..bank import BankFile, VectorBank
from ..config import LoraConfig, VBLoRAConfig, VeraConfig
from ..distributed import gather_to_cpu, is_sharded, rank, reshard, shard_like
from ..errors import VBLoRAWarning
from ..files import read_tensors, write_file, write_tensors
from ..layers.kinds import Conv1D
from ..model.inject import Plan
from ..model.record import AttachedAdapter, adapted_models, attached_adapter, refuse_if_disabled, refuse_if_merged
from . import native
from .contents import Contents, VBLoRAContents
from .flat import FlatContents
from .peft import common, lora, vblora, vera

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
FORMS = (*native.FORMS, *vblora.FORMS, *lora.FORMS)
METHOD_NAMES = {
    "vblora": "VB-LoRA (arXiv 2405.15179)",
    "vera": "VeRA (arXiv 2310.11454)",
    "tied_lora": "Tied-LoRA (arXiv 2311.09578)",
    "lora": "LoRA (arXiv 2106.09685)",
}
_DECODE_OF_PEFT = {"VBLORA": vblora.decode, "LORA": lora.decode, "VERA": vera.decode}


def save(
    model: nn.Module,
    directory: str | os.PathLike,
    *,
    adapter_name: str | None = None,
    form: str | None = None,
    bank_dtype: torch.dtype | None = None,
) -> None:
    """Writes a model's adapter into a folder.

    Each file is written under a temporary name, synced and renamed: whoever is killed meanwhile leaves the old folder or the new
    one. A bank that came from a file and still is what that holds is not written again, but named by the file's SHA-256.
    Of a model that FSDP2 has sharded all processes call it, and the first writes.

    Args:
        model: an injected model.
        adapter_name: which adapter, if not the one that is active.
        directory: made if it is not there.
        form: ``"resume"`` is all that it takes to go on training exactly: the seed of the logits, and of each row what training
            touched. ``"deploy"`` is what inference takes: k bank vectors and their weights a sub-vector; outputs have the same
            bits. None: the first for an adapter that has logits, the second for one that was loaded without.
            For others: ``"peft"``, all logits, on which PEFT can train; ``"peft-topk"``, what PEFT's inference takes;
            ``"lora"``, the same update as a plain LoRA, for PEFT and for servers. A shared bank is written into these.
            Of the other methods the first two hold the same, ``"peft"`` is PEFT's own format of LoRA and VeRA, and ``"lora"``
            takes each.
        bank_dtype: of the bank in a deploy form, to make it smaller: ``torch.bfloat16``, ``torch.float16``, or ``torch.int8``
            with a scale a vector. None keeps it exactly.

    Raises:
        ValueError: the model has no such adapter, or one that cannot be written so.
    """
    source = attached_adapter(model, adapter_name)
    if form not in (None, *FORMS):
        raise ValueError(f"`form` is {form!r}; allowed are {', '.join(map(repr, FORMS))}.")
    contents = contents_of(source)
    if form is None:
        form = "resume" if contents.is_trainable else "deploy"
    bank = getattr(source.adapter, "bank", None)
    bank_file = bank.file if bank is not None and bank_dtype is None and bank.unchanged() else None
    if rank() and any(is_sharded(tensor) for tensor in source.model.parameters()):
        return  # it took part
    name = getattr(getattr(source.model, "config", None), "_name_or_path", None)
    write(
        contents,
        directory,
        form=form,
        bank_dtype=bank_dtype,
        bank_file=bank_file,
        base_model=name or None,
        about={"auto_mapping": _class_of(source.model)},
    )


def load(
    model: nn.Module,
    directory: str | os.PathLike,
    *,
    adapter_name: str | None = None,
    bank: VectorBank | str | os.PathLike | None = None,
    is_trainable: bool | None = None,
    train_kept: bool = False,
) -> nn.Module:
    """Puts a saved adapter into a model: into a base model as :func:`vblora.inject` does, or over the one it has.

    Everything in the folder is checked first; a model that it does not fit is left as it was.

    Args:
        model: the base model, or a model with an adapter of the same config and form, whose tensors are then written over:
            those of a bank that it shares, too.
        adapter_name: of the adapter that is written over, or of a new one beside those that the model has. By default it is the
            active one; in a base model, ``"default"``.
        directory: what :func:`save` wrote, or PEFT's ``save_pretrained`` of a LoRA, VeRA or VB-LoRA adapter: of the last, one
            of all logits can train on, one of ``save_only_topk_weights`` is a deploy form.
        bank: the bank of an adapter that was saved without: its file, or what :meth:`VectorBank.from_file` made of that, to be
            shared by several adapters. It stays frozen.
        is_trainable: whether the adapter's parameters shall require gradients. By default they do not, and those of an
            adapter that is there stay as they are.
        train_kept: let a deploy form train, with the k vectors that are left of each row as its only candidates.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or does not fit the model; named. Or the bank is missing or another one, the form is one
            that cannot train, or the model is merged, disabled, or on the meta device.
    """
    present = None
    for record in adapted_models(model):
        refuse_if_disabled(record.layers)
        refuse_if_merged(record.layers)
        if adapter_name is None or adapter_name in record.adapters:
            present = attached_adapter(model, adapter_name)
    path = Path(directory) / TENSORS_FILE
    if bank is not None and not isinstance(bank, VectorBank):
        bank = VectorBank.from_file(bank)
    contents, shares_bank = read(directory, bank, None if present is None else getattr(present.adapter, "bank", None))
    if train_kept:
        contents = contents.as_trainable()
    if is_trainable and not contents.is_trainable:
        raise ValueError(
            f'{path} holds a deployed adapter: k weights a sub-vector, and no logits to train. Save with form="resume" to '
            "go on exactly, or load with train_kept=True to train with the k vectors that were kept as the only candidates."
        )
    try:
        if present is None:
            plan = Plan(model, contents.config, "default" if adapter_name is None else adapter_name)
            _put_in(plan, contents, bank if shares_bank else None, bool(is_trainable))
        else:
            write_over(present, contents, is_trainable)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return model


def write(
    contents: Contents,
    directory: str | os.PathLike,
    *,
    form: str,
    bank_dtype: torch.dtype | None = None,
    bank_file: BankFile | None = None,
    base_model: str | None = None,
    about: dict | None = None,
) -> None:
    """Writes a folder, with a bank that stands in ``bank_file`` named by its hash where the format has a place for that.

    Everything that can be refused is refused before the first file. ``about``: what PEFT's config says of the base model
    besides its name, for PEFT's own ``Auto`` classes.
    """
    contents.check_widths_known()
    if form in native.FORMS:
        description, tensors = native.encode(contents, form, bank_dtype=bank_dtype, bank_file=bank_file)
        description["base_model_name_or_path"] = base_model
        # The tensors' file says all, so it alone decides whether the folder is the old one or the new one.
        metadata = {native.METADATA: json.dumps(description)}
        description = _for_people(description)
    else:
        if bank_dtype is not None:
            raise ValueError(
                f'`bank_dtype` is {bank_dtype}, but only `form` "deploy" may round the bank, not "{form}".'
            )
        description, tensors = _encode_for_others(contents, form, base_model)
        description |= about or {}
        metadata = {"format": "pt"}  # as PEFT's has it; of two files that do not belong together, the shapes tell
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / TENSORS_FILE, tensors, metadata)
    write_file(folder / CONFIG_FILE, json.dumps(description, indent=2).encode() + b"\n")
    if not (folder / "README.md").exists():
        write_file(folder / "README.md", _card(contents, form, base_model).encode())


def read(
    directory: str | os.PathLike, bank: VectorBank | None = None, present: VectorBank | None = None
) -> tuple[Contents, bool]:
    """The checked contents of a folder, and whether its bank is in a file of its own.

    Args:
        bank: that bank, if it is.
        present: what serves as well, if it should be needed and ``bank`` is None.

    Raises:
        FileNotFoundError, ValueError: as :func:`load`.
    """
    path = Path(directory) / TENSORS_FILE
    _check_files(path)
    tensors, metadata = read_tensors(path)
    if native.METADATA not in metadata:
        return _read_peft(path, tensors, bank), False
    try:
        description = json.loads(metadata[native.METADATA])
        if bank is None and present is not None and present.file is not None and description.get("bank_file"):
            bank = present
        contents = native.decode(description, tensors, bank)
        contents.check()
    except ValueError as error:  # JSON's too
        raise ValueError(f"{path}: {error}") from None
    _warn_if_edited(Path(directory) / CONFIG_FILE, description)
    return contents, description["bank_file"] is not None


def _encode_for_others(contents: Contents, form: str, base_model: str | None) -> tuple[dict, dict[str, torch.Tensor]]:
    config = contents.config
    if form in lora.FORMS or (form == "peft" and isinstance(config, LoraConfig)):
        return lora.encode(contents, base_model)
    if isinstance(contents, VBLoRAContents):
        return vblora.encode(contents, form, base_model)
    if form == "peft" and isinstance(config, VeraConfig):
        return vera.encode(contents, base_model)
    raise ValueError(
        f'`form` is "{form}", which there is not of a {type(config).__name__}; form="lora" holds the same update.'
    )


def _read_peft(path: Path, tensors: dict[str, torch.Tensor], bank: VectorBank | None) -> Contents:
    description = common.read_config(path.with_name(CONFIG_FILE))
    try:
        if bank is not None:
            raise ValueError("it has a bank of its own, but `bank` was given. Leave that out.")
        contents = _DECODE_OF_PEFT[description["peft_type"]](description, tensors)
        contents.check()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return contents


def _check_files(path: Path) -> None:
    """Says where the adapter may be, if it is not there."""
    if path.is_file():
        return
    folder = path.parent
    if (folder / "adapter_model.bin").exists():
        raise ValueError(
            f"{folder / 'adapter_model.bin'} is a pickle, which may run any code and is not read. Let PEFT load and save it "
            "again, which writes safetensors: PeftModel.from_pretrained(model, folder).save_pretrained(folder)."
        )
    inner = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_FILE}"))
    if inner:  # PEFT writes an adapter that is not called "default" into a folder of its name
        raise FileNotFoundError(
            f"{path} is missing. There are adapters in its sub-folders {', '.join(inner)}: pass one of those."
        )


def _class_of(model: nn.Module) -> dict[str, str]:
    """As PEFT names it."""
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}


def contents_of(source: AttachedAdapter) -> Contents:
    """What a model's adapter comes down to."""
    reshard(source.model)
    adapter = source.adapter
    transposed = any(layer.kind is Conv1D for layer in source.layers)
    config = replace(source.config, fan_in_fan_out=transposed)  # whatever the user says: it is seen
    copies = {}  # what is tied stays one tensor
    for replaced in source.replaced.values():
        copies.setdefault(replaced.stand_in, gather_to_cpu(replaced.stand_in))
    extra_parameters = {name: copies[replaced.stand_in] for name, replaced in source.replaced.items()}
    kind = VBLoRAContents if isinstance(adapter, VBLoRAAdapter) else FlatContents
    return kind.of(config, adapter, extra_parameters)


def _put_in(plan: Plan, contents: Contents, bank: VectorBank | None, is_trainable: bool) -> None:
    contents = contents.in_order(plan.targets)
    _check_extra_parameters(contents, plan.stand_ins)
    if is_trainable:
        plan.check_trainable()
    _refuse_meta(plan.device.type == "meta")
    adapter = contents.adapter(plan.device, bank)
    with torch.no_grad():
        for name, (_, _, stand_in) in plan.stand_ins.items():
            if name in contents.extra_parameters:
                stand_in.copy_(contents.extra_parameters[name])
            stand_in.requires_grad_(is_trainable and stand_in.is_floating_point() and stand_in.requires_grad)
    adapter.requires_grad_(is_trainable)
    if bank is not None:
        bank.requires_grad_(False)
    plan.carry_out(adapter)


def write_over(target: AttachedAdapter, contents: Contents, is_trainable: bool | None) -> None:
    """Puts checked contents over a model's adapter, whose parameters require gradients then if told so; None: as they did.

    Raises:
        ValueError: they do not fit it.
    """
    adapter = target.adapter
    own = contents_of(target)
    contents.check_config(own.config)
    contents = contents.in_order(adapter.targets)
    _check_extra_parameters(contents, {name: (r.module, r.name, r.stand_in) for name, r in target.replaced.items()})
    contents.check_sizes(own)
    _refuse_meta(any(parameter.is_meta for parameter in adapter.parameters()))
    with torch.no_grad():
        contents.write_over(adapter)
        stand_ins = [replaced.stand_in for replaced in target.replaced.values()]
        for stand_in, name in zip(stand_ins, target.replaced, strict=True):
            if name in contents.extra_parameters:
                stand_in.copy_(shard_like(contents.extra_parameters[name], stand_in))
    if is_trainable is not None:
        target.requires_grad_(is_trainable)
    adapter.invalidate()


def _refuse_meta(is_meta: bool) -> None:
    if is_meta:
        raise ValueError(
            "`model` is on the meta device, where nothing can be loaded. Materialise it first, with `to_empty`."
        )


def _check_extra_parameters(contents: Contents, places: dict[str, tuple[nn.Module, str, torch.Tensor]]) -> None:
    """``places``: whose they are in the model, called what there, and the tensors to be written over."""
    needless = {name for name, (module, own, _) in places.items() if own in module._non_persistent_buffers_set}
    wanted = {name: stand_in for name, (_, _, stand_in) in places.items()}
    for name in sorted(
        (wanted.keys() ^ contents.extra_parameters.keys()) - (needless - contents.extra_parameters.keys())
    ):
        raise ValueError(f"it {'lacks' if name in wanted else 'has an unknown'} tensor `{name}`.")
    for name, tensor in contents.extra_parameters.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"`{name}` is {tuple(tensor.shape)}, but must be {tuple(wanted[name].shape)}.")
        if tensor.is_floating_point() != wanted[name].is_floating_point():
            raise ValueError(f"`{name}` is {tensor.dtype}, but must be like {wanted[name].dtype}.")


def _for_people(description: dict) -> dict:
    """The description in one level, as PEFT's files have it."""
    return {name: value for name, value in description.items() if name != "config"} | description["config"]


def _warn_if_edited(path: Path, description: dict) -> None:
    try:
        same = json.loads(path.read_text(encoding="utf-8")) == _for_people(description)
    except (OSError, ValueError):
        same = False
    if not same:
        warnings.warn(
            f"{path} is not what {TENSORS_FILE} was saved with (it was edited, or a save was cut off). "
            f"What {TENSORS_FILE} says is what counts.",
            VBLoRAWarning,
            stacklevel=4,
        )


def _card(contents: Contents, form: str, base_model: str | None) -> str:
    config = contents.config
    base = base_model or "a model"
    what, how = f"{METHOD_NAMES[config.method]}, r={config.r}", "vblora.load(model, "
    if form in lora.FORMS or (form == "peft" and isinstance(config, LoraConfig)):
        what, how = f"LoRA, r={config.r}", "model = peft.PeftModel.from_pretrained(model, "
    elif isinstance(config, VBLoRAConfig):
        what += f", {config.num_vectors} bank vectors of length {config.vector_length}, k={config.topk}"
    return f"""---
library_name: {"vblora" if form in native.FORMS else "peft"}
{f"base_model: {base_model}" if base_model else ""}
---
An adapter of {base}: {what}, {len(contents.targets)} layers. Put it into the model with

    {how}"<this folder>")
"""
