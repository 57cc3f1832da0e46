"""Tensors of the base model in an adapter's file: PEFT stores the embeddings that it adapts, or whose vocabulary was resized."""

from collections.abc import Collection
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..distributed import gather_to_cpu
from ..layers.kinds import has_kind
from ..layers.weights import format_name, is_quantised
from ..model.record import base_tensors_in_place
from ..model.targets import base_modules
from .contents import Contents

_Contents = TypeVar("_Contents", bound=Contents)


def split_base_tensors(
    contents: _Contents, model: nn.Module, present: Collection[str] = ()
) -> tuple[_Contents, dict[str, Tensor]]:
    """The contents without base tensors, and those of them that differ from the model's.

    Args:
        present: names of base tensors that the adapter in the model has already replaced. They stay in the contents.

    Raises:
        ValueError: the model lacks such a tensor, or has one of another shape, a quantised one, or one tied tensor for two.
    """
    base = {name: tensor for name, tensor in contents.base_tensors.items() if name not in present}
    if not base:
        return contents, {}
    modules = base_modules(model)
    differing: dict[str, Tensor] = {}
    first: dict[nn.Parameter, str] = {}
    with base_tensors_in_place(model):
        for name, tensor in base.items():
            module_name, _, attribute = name.rpartition(".")
            module = modules.get(module_name)
            own = None if module is None else module._parameters.get(attribute)
            if module is None or own is None or not has_kind(module):
                raise ValueError(f"it has an unknown tensor `{name}`.")
            _check_like(name, tensor, own)
            if not torch.equal(tensor, base[first.setdefault(own, name)]):
                raise two_values(first[own], name)
            if not torch.equal(tensor.to(own.dtype), gather_to_cpu(own)):
                differing[name] = tensor
    kept = {name: tensor for name, tensor in contents.extra_parameters.items() if name not in base}
    return replace(contents, extra_parameters=kept), differing


def two_values(name: str, other: str) -> ValueError:
    """The error for two tensors of a file that are one in the model."""
    return ValueError(
        f"`{name}` and `{other}` are one tied tensor in the model, but the adapter holds two different ones. "
        "Load the base model with them untied (in transformers, `tie_word_embeddings=False`)."
    )


def _check_like(name: str, tensor: Tensor, own: Tensor) -> None:
    if is_quantised(own):
        raise ValueError(
            f"it holds its own `{name}`, which is quantised in the model ({format_name(own)}). Load the base model with that "
            "layer as it is."
        )
    if own.is_meta:
        raise ValueError(f"it holds its own `{name}`, but that of the model has been offloaded. Place it on a device.")
    if tensor.shape != own.shape:
        resized = tensor.dim() == 2 and tensor.shape[1:] == own.shape[1:]
        hint = f" If the vocabulary was resized, call model.resize_token_embeddings({tensor.shape[0]}) first." * resized
        raise ValueError(f"`{name}` is {tuple(tensor.shape)}, but must be {tuple(own.shape)}.{hint}")
    if not tensor.is_floating_point():
        raise ValueError(f"`{name}` is {tensor.dtype}, but the model's is {own.dtype}.")
