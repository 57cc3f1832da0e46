"""What PEFT's files of all methods share, as peft 0.21 writes and reads them."""

import re
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from ...config import PEFT_METADATA, AdapterConfig
from ...files import read_json
from ..contents import Contents

PREFIX = "base_model.model."
_OF_AN_ADAPTER = re.compile(r"\.(vblora_logits|vera_lambda|lora)_")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LISTS = ("exclude_modules", "layers_to_transform", "layers_pattern")
_HEADS = ("classifier", "score")  # PEFT adds these to `modules_to_save` of a classifier, which has one of them
_EMBEDDINGS = ("embed_tokens", "lm_head")  # it writes these, unasked, where the vocabulary was resized


def read_config(path: Path) -> dict:
    """What PEFT's ``adapter_config.json`` says.

    Raises:
        ValueError: it is not there, or of another method than VB-LoRA.
    """
    description = read_json(path) if path.is_file() else None
    if not isinstance(description, dict):
        raise ValueError(f"{path.parent} holds no adapter of vblora's: {path.name} is missing or no JSON object.")
    kind = description.get("peft_type")
    if kind is None:
        raise ValueError(f"{path.parent} holds no adapter of vblora's, and none of PEFT's.")
    if kind not in ("VBLORA", "LORA", "VERA"):
        raise ValueError(
            f"{path.parent} holds an adapter of PEFT's of type {kind!r}; what is read are 'VBLORA', 'LORA' and 'VERA'."
        )
    return description


def describe(contents: Contents, base_model: str | None) -> dict:
    """What the ``adapter_config.json`` of any method says: only fields that every version of PEFT knows."""
    config = contents.config
    names = [target.name for target in contents.targets]
    if any("." not in name for name in names):  # in a list, a name also matches any other that ends with a dot and it
        names = "|".join(re.escape(name) for name in names)
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "revision": None,
        "task_type": None,
        "inference_mode": True,
        "r": config.r,
        "target_modules": names,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "fan_in_fan_out": config.fan_in_fan_out,
        "modules_to_save": list(_saved_modules(list(contents.extra_parameters), config.modules_to_save or [])) or None,
    }


def refuse_other_kinds(contents: Contents, form: str, method: str) -> None:
    for target in contents.targets:
        if target.kind != "linear":
            raise ValueError(
                f'`form` is "{form}", but `{target.name}` is no linear layer (its kind is "{target.kind}"), and PEFT\'s {method} '
                'takes no other; form="lora" holds it.'
            )


def encode_extra_parameters(contents: Contents) -> dict[str, Tensor]:
    """What trained beside the adapter, by PEFT's names. Each is a copy: safetensors does not store what is tied."""
    biases = {f"{target.name}.bias": f"{target.name}.base_layer.bias" for target in contents.targets}
    return {PREFIX + biases.get(name, name): tensor.clone() for name, tensor in contents.extra_parameters.items()}


def decode_config(kind: type[AdapterConfig], description: dict, neutral: Collection[str] = ()) -> AdapterConfig:
    """The config of another method than VB-LoRA.

    Args:
        neutral: names of fields that we do not have and that mean nothing by themselves. Of the others those that are None,
            False, 0 or empty are passed over, too.

    Raises:
        ValueError: a field that changes what the adapter means and that we do not have, named.
    """
    known = {field.name for field in fields(kind)}
    values = {}
    for name, value in description.items():
        if name in known and value is not None and not (name in LISTS and not value):
            values[name] = value
        elif name not in known and name not in PEFT_METADATA and name not in neutral and value:
            raise ValueError(f"its config has `{name}` = {value!r}, which vblora does not do.")
    try:
        return kind.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"its config is not what it should be: {error}") from None


def as_float(key: str, tensor: Tensor) -> Tensor:
    """Half precision becomes float32, which holds it exactly."""
    if tensor.dtype not in FLOATS:
        raise ValueError(f"`{key}` is {tensor.dtype}; allowed are {', '.join(map(str, FLOATS))}.")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def decode_extra_parameters(
    tensors: dict[str, Tensor], config: AdapterConfig, targets: set[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """What trained beside by its names in the model, and the modules that were saved in full."""
    extra_parameters = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if name == key or _OF_AN_ADAPTER.search(key):
            raise ValueError(f"it has an unknown tensor `{key}`.")
        # With bias="all" PEFT writes the biases of `modules_to_save` three times: the base model's, and the trained ones again.
        if ".original_module." in name or any(PREFIX + again in tensors for again in _without_wrapper(name)):
            continue
        layer = name.removesuffix(".base_layer.bias")
        extra_parameters[f"{layer}.bias" if layer in targets and layer != name else name] = tensor
    saved = _saved_modules(list(extra_parameters), config.modules_to_save or [], by_dot=False)
    entries = set(config.modules_to_save or [])
    missing = {entry for entry in entries if not any(module.endswith(entry) for module in saved)}
    if missing - set(_HEADS) or (missing and missing == entries):
        raise ValueError(f"its `modules_to_save` names `{min(missing)}`, but it holds no tensor of that.")
    saved |= _saved_modules(list(extra_parameters), list(_EMBEDDINGS))
    for name in extra_parameters:
        is_bias = config.bias != "none" and name.rpartition(".")[2] == "bias"
        if not is_bias and not any(name.startswith(module + ".") for module in saved):
            raise ValueError(f"it has an unknown tensor `{PREFIX}{name}`.")
    return extra_parameters, list(saved)


def _without_wrapper(name: str) -> list[str]:
    """What a tensor is called that PEFT named as in its own wrapper, with or without the adapter's name in it."""
    module, wrapper, rest = name.partition(".modules_to_save.")
    return [f"{module}.{rest}", f"{module}.{rest.partition('.')[2]}"] if wrapper else []


def _saved_modules(names: list[str], entries: list[str], *, by_dot: bool = True) -> dict[str, None]:
    """The modules that ``entries`` mean, in full, among those that hold the tensors ``names``; of nested ones the outermost.

    An entry is a module's name or an ending of it: after a dot here, any ending in PEFT.
    """
    found = {}
    for name in names:
        parts = name.split(".")
        for count in range(1, len(parts)):
            module = ".".join(parts[:count])
            if any(module == entry or module.endswith("." * by_dot + entry) for entry in entries):
                found[module] = None
                break
    return found
