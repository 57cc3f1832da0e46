"""What PEFT's files of all methods have in common, as peft 0.21 writes and reads them."""

import re
from collections.abc import Collection
from dataclasses import fields
from typing import TypeVar

import torch
from torch import Tensor

from ...config import PEFT_METADATA, AdapterConfig
from ..contents import Contents
from ..json_objects import Json, JsonObject, optional_field, shortened

_Config = TypeVar("_Config", bound=AdapterConfig)

PREFIX = "base_model.model."
_OF_AN_ADAPTER = re.compile(r"\.(vblora_logits|vera_lambda|lora)_")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LISTS = ("exclude_modules", "layers_to_transform", "layers_pattern")
_HEADS = ("classifier", "score")  # PEFT adds both to `modules_to_save` of a classifier, which has one of them


def describe(contents: Contents, base_model: str | None) -> JsonObject:
    """The fields of ``adapter_config.json`` that all methods have. Every version of PEFT knows them."""
    config = contents.config
    names = [target.name for target in contents.targets]
    target_modules: Json = [*names]
    if any("." not in name for name in names):  # in a list, a name also matches all that end with a dot and it
        target_modules = "|".join(re.escape(name) for name in names)
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "revision": None,
        "task_type": config.task_type,
        "inference_mode": True,
        "r": config.r,
        "target_modules": target_modules,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "fan_in_fan_out": config.fan_in_fan_out,
        "modules_to_save": [*_saved_modules(list(contents.extra_parameters), config.modules_to_save or [])] or None,
    }


def refuse_other_kinds(contents: Contents, form: str, method: str) -> None:
    """Checks that all layers are linear ones.

    Raises:
        ValueError: one is not.
    """
    for target in contents.targets:
        if target.kind != "linear":
            raise ValueError(
                f'`form` is "{form}", but `{target.name}` is not a linear layer (its kind is "{target.kind}"), and PEFT\'s '
                f'{method} adapts no others; form="lora" holds the same update.'
            )


def encode_extra_parameters(contents: Contents) -> dict[str, Tensor]:
    """The extra parameters by PEFT's names. They are copies, because safetensors cannot store tied tensors."""
    wrapped = {
        f"{target.name}.{own}": f"{target.name}.base_layer.{own}"
        for target in contents.targets
        for own in ("weight", "bias")
    }
    return {PREFIX + wrapped.get(name, name): tensor.clone() for name, tensor in contents.extra_parameters.items()}


def decode_config(kind: type[_Config], description: JsonObject, neutral: Collection[str] = ()) -> _Config:
    """The config of a method, from PEFT's fields.

    Args:
        neutral: fields that vblora lacks and that have no effect by themselves. Any other field that vblora lacks must be
            null, false, 0 or empty.

    Raises:
        ValueError: a field is invalid, or vblora lacks it and it changes the adapter. The message names it.
    """
    optional_field(description, "fan_in_fan_out", bool, False)
    optional_field(description, "inference_mode", bool, False)
    known = {field.name for field in fields(kind)}
    values: JsonObject = {}
    for name, value in description.items():
        if name in known and value is not None and not (name in LISTS and not value):
            values[name] = value
        elif name not in known and name not in PEFT_METADATA and name not in neutral and value:
            raise ValueError(f"its config has `{name}` = {shortened(value)}, which vblora does not support.")
    try:
        return kind.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"its config is invalid: {error}") from None


def as_float(key: str, tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is that.

    Raises:
        ValueError: another dtype.
    """
    if tensor.dtype not in FLOATS:
        raise ValueError(f"`{key}` is {tensor.dtype}; allowed are {', '.join(map(str, FLOATS))}.")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def decode_extra_parameters(
    tensors: dict[str, Tensor], config: AdapterConfig, targets: set[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """The extra parameters by their names in the model, and the names of the modules that were saved in full.

    PEFT also stores weights and biases of embeddings that it does not train: of those that ``target_modules`` names, and all if
    the vocabulary was resized. They are among the extra parameters (:attr:`Contents.base_tensors`).

    Raises:
        ValueError: a tensor is unknown, or a module of ``modules_to_save`` is missing.
    """
    extra_parameters: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if name == key or _OF_AN_ADAPTER.search(key):
            raise ValueError(f"it has an unknown tensor `{key}`.")
        # With bias="all" PEFT writes the biases of `modules_to_save` three times: the base model's once, the trained ones twice.
        if ".original_module." in name or any(PREFIX + again in tensors for again in _without_wrapper(name)):
            continue
        layer, _, own = name.rpartition(".")
        inner = layer.removesuffix(".base_layer")
        extra_parameters[f"{inner}.{own}" if inner in targets else name] = tensor
    saved = _saved_modules(list(extra_parameters), config.modules_to_save or [], by_dot=False)
    entries = set(config.modules_to_save or [])
    missing = {entry for entry in entries if not any(module.endswith(entry) for module in saved)}
    if missing - set(_HEADS) or (missing and missing == entries):
        raise ValueError(f"its `modules_to_save` names `{min(missing)}`, but no tensor of it is there.")
    for name in extra_parameters:
        may_be_base = name.rpartition(".")[2] in ("weight", "bias")
        if not may_be_base and not any(name.startswith(module + ".") for module in saved):
            raise ValueError(f"it has an unknown tensor `{PREFIX}{name}`.")
    return extra_parameters, list(saved)


def _without_wrapper(name: str) -> list[str]:
    """The possible names in the model of a tensor that PEFT named after its own wrapper, with or without an adapter name."""
    module, wrapper, rest = name.partition(".modules_to_save.")
    return [f"{module}.{rest}", f"{module}.{rest.partition('.')[2]}"] if wrapper else []


def _saved_modules(names: list[str], entries: list[str], *, by_dot: bool = True) -> dict[str, None]:
    """The full names of the modules that ``entries`` match and that hold one of the tensors ``names``, without nested ones.

    An entry matches a module's name or its ending: after a dot if ``by_dot``, any ending otherwise, as in PEFT.
    """
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for count in range(1, len(parts)):
            module = ".".join(parts[:count])
            if any(module == entry or module.endswith("." * by_dot + entry) for entry in entries):
                found[module] = None
                break
    return found
