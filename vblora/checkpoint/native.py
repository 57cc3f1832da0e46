"""An adapter as a folder: ``adapter_config.json`` in PEFT's field names, ``adapter_model.safetensors`` with its tensors."""

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from ..config import VBLoRAConfig
from ..injection import Injection, eject, inject, injection_of

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
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    config["base_model_name_or_path"] = name or None
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in _tensors(record).items()}
    layout = [[target.name, target.in_features, target.out_features] for target in record.adapter.targets]
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / TENSORS_FILE, to_safetensors(tensors, {"format": "pt", "targets": json.dumps(layout)}))
    _write(folder / CONFIG_FILE, json.dumps(config, indent=2).encode() + b"\n")


def load(model: nn.Module, directory: str | os.PathLike, *, is_trainable: bool = False) -> nn.Module:
    """Puts a saved adapter into a model: into a base model as :func:`vblora.inject` does, or over the one it has.

    Everything in the folder is checked first; a model that it does not fit is left as it was.

    Args:
        model: the base model, or a model with an adapter of the same config.
        directory: what :func:`save` wrote.
        is_trainable: whether the adapter's parameters shall require gradients.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: a file of the two is missing.
        ValueError: a file is damaged, or does not fit the model; named.
    """
    folder = Path(directory)
    config = _read_config(folder / CONFIG_FILE)
    tensors, layout = _read_tensors(folder / TENSORS_FILE)
    has_adapter = getattr(model, "_vblora_injection", None) is not None
    if has_adapter and injection_of(model).config != config:
        raise ValueError(f"`model` has an adapter of another config than {folder / CONFIG_FILE}. Eject it first.")
    if not has_adapter:
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
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(is_trainable)
    record.adapter.invalidate()
    return model


def _tensors(record: Injection) -> dict[str, Tensor]:
    """An adapter's tensors as they are, by their names in a file."""
    beside = {_BESIDE + name: getattr(item.module, item.name) for name, item in record.replaced.items()}
    return {"bank.vectors": record.adapter.bank.vectors, "logits": record.adapter.logits, **beside}


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
            layout = json.loads((file.metadata() or {}).get("targets", "null"))
            return {name: file.get_tensor(name) for name in file.keys()}, layout  # noqa: SIM118 (it is no dict)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from None


def _check_fit(record: Injection, layout: list, tensors: dict[str, Tensor], path: Path) -> None:
    own = [[target.name, target.in_features, target.out_features] for target in record.adapter.targets]
    if layout != own:
        raise ValueError(f"{path} is for other layers than the model's: {_first_difference(layout, own)}.")
    wanted = _tensors(record)
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
    handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp keeps others out; a checkpoint is an ordinary file
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
