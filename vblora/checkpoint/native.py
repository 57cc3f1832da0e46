"""An adapter as a folder: ``adapter_config.json`` in PEFT's field names, ``adapter_model.safetensors`` with its tensors."""

import json
import os
import secrets
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from ..config import VBLoRAConfig
from ..injection import Injection, eject, inject, injection_of, injections, refuse_if_disabled

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
_BESIDE = "beside."  # names of tensors that train beside the adapter come after this


def save(model: nn.Module, directory: str | os.PathLike) -> None:
    """Writes a model's adapter, all that is needed to run it and to train it further, into a folder.

    Each file is written under a temporary name, synced and renamed, so that no reader ever sees half of one.

    Args:
        model: an injected model.
        directory: made if it is not there.

    Raises:
        ValueError: the model has no adapter.
    """
    record = injection_of(model)
    config = {"peft_type": "VBLORA", **record.config.to_dict()}
    name = getattr(getattr(record.model, "config", None), "_name_or_path", None)
    config["base_model_name_or_path"] = name or None
    layout = [[target.name, target.in_features, target.out_features] for target in record.adapter.targets]
    tensors, aliases = _untied(_tensors(record))
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    metadata = {"format": "pt", "targets": json.dumps(layout), "aliases": json.dumps(aliases)}
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / TENSORS_FILE, to_safetensors(tensors, metadata))
    _write(folder / CONFIG_FILE, json.dumps(config, indent=2).encode() + b"\n")


def load(model: nn.Module, directory: str | os.PathLike, *, is_trainable: bool | None = None) -> nn.Module:
    """Puts a saved adapter into a model: into a base model as :func:`vblora.inject` does, or over the one it has.

    Everything in the folder is checked first; a model that it does not fit is left as it was.

    Args:
        model: the base model, or a model with an adapter of the same config, whose tensors are then written over: those of a
            bank that it shares, too.
        directory: what :func:`save` wrote.
        is_trainable: whether the adapter's parameters shall require gradients. By default they do not, and those of an
            adapter that is there stay as they are.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: a file of the two is missing.
        ValueError: a file is damaged, or does not fit the model; named. Or the model is merged, disabled, or on the meta
            device.
    """
    folder = Path(directory)
    config = _read_config(folder / CONFIG_FILE)
    tensors, layout = _read_tensors(folder / TENSORS_FILE)
    has_adapter = bool(injections(model))
    if has_adapter:
        record = injection_of(model)
        refuse_if_disabled(record.layers)
        if any(layer.merged for layer in record.layers):
            raise ValueError("`model` is merged. Call vblora.unmerge(model) before loading another adapter into it.")
        if record.config != config:
            raise ValueError(f"`model` has an adapter of another config than {folder / CONFIG_FILE}. Eject it first.")
    else:
        with torch.random.fork_rng(devices=[]):  # what is drawn here is written over
            inject(model, config)
        record = injection_of(model)
    try:
        _check_fit(record, layout, tensors, folder / TENSORS_FILE)
    except ValueError:
        if not has_adapter:
            eject(model)
        raise
    with torch.no_grad():
        for name, tensor in _tensors(record).items():
            tensor.copy_(tensors[name])
            trainable = False if is_trainable is None and not has_adapter else is_trainable
            if isinstance(tensor, nn.Parameter) and trainable is not None:
                tensor.requires_grad_(trainable and tensor.is_floating_point())
    record.adapter.invalidate()
    return model


def _tensors(record: Injection) -> dict[str, Tensor]:
    """An adapter's tensors as they are, by their names in a file."""
    beside = {_BESIDE + name: replaced.stand_in for name, replaced in record.replaced.items()}
    return {"bank.vectors": record.adapter.bank.vectors, "logits": record.adapter.logits, **beside}


def _untied(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, under its first name, and what other names there are for it."""
    first: dict[Tensor, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        if first.setdefault(tensor, name) != name:
            aliases[name] = first[tensor]
    return {name: tensor for tensor, name in first.items()}, aliases


def _read_config(path: Path) -> VBLoRAConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {error}.") from None
    if not isinstance(values, dict) or values.get("peft_type") != "VBLORA":
        raise ValueError(f'{path} is not of a VB-LoRA adapter: it must say "peft_type": "VBLORA".')
    try:
        return VBLoRAConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], list]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            layout, aliases = (json.loads(metadata.get(key, "null")) for key in ("targets", "aliases"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return tensors | {alias: tensors[name] for alias, name in (aliases or {}).items()}, layout
    except (SafetensorError, json.JSONDecodeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from None


def _check_fit(record: Injection, layout: list, tensors: dict[str, Tensor], path: Path) -> None:
    own = [[target.name, target.in_features, target.out_features] for target in record.adapter.targets]
    if layout != own:
        raise ValueError(f"{path} is for other layers than the model's: {_first_difference(layout, own)}.")
    wanted = _tensors(record)
    if any(tensor.is_meta for tensor in wanted.values()):
        raise ValueError(
            "`model` is on the meta device, where nothing can be loaded. Materialise it first, with `to_empty`."
        )
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise ValueError(f"{path} {'lacks' if name in wanted else 'has an unknown'} tensor `{name}`.")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{path}: `{name}` is {tuple(tensor.shape)}, but must be {tuple(wanted[name].shape)}.")
        if tensor.is_floating_point() != wanted[name].is_floating_point():
            raise ValueError(f"{path}: `{name}` is {tensor.dtype}, but must be like {wanted[name].dtype}.")
        if name == "bank.vectors" and not tensor.isfinite().all():
            raise ValueError(f"{path}: `{name}` holds an infinite or NaN element.")
        if name == "logits" and tensor.isnan().any():
            raise ValueError(f"{path}: `{name}` holds NaN.")


def _first_difference(layout: object, own: list) -> str:
    if not isinstance(layout, list) or len(layout) != len(own):
        return f"it lists {len(layout) if isinstance(layout, list) else 'no'} layers, the model has {len(own)}"
    return next(f"{theirs} there, {ours} here" for theirs, ours in zip(layout, own, strict=True) if theirs != ours)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
