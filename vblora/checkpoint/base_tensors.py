"""Tensors of the base model in an adapter's file: PEFT stores the embeddings that it adapts, or whose vocabulary was resized."""

import warnings
from collections.abc import Collection
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..distributed import gather_to_cpu, is_sharded
from ..errors import VBLoRAWarning, listed
from ..layers.adapted import AdaptedLayer
from ..layers.kinds import has_kind
from ..layers.weights import format_name, is_quantised
from ..model.heads import is_resized
from ..model.lookup import base_tensors_in_place
from ..model.targets import base_modules, embedding_layers
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
                if is_sharded(own):
                    raise ValueError(f"its `{name}` is not the model's, which is sharded. Load it before fully_shard.")
                differing[name] = tensor
    kept = {name: tensor for name, tensor in contents.extra_parameters.items() if name not in base}
    return replace(contents, extra_parameters=kept), differing


def embeddings_to_save(model: nn.Module, choice: bool | str) -> dict[str, Tensor]:
    """The tensors of the input and output embeddings, by their names in the model, if ``choice`` wants them saved.

    Args:
        choice: ``"auto"`` means if the vocabulary is of another size than that of the checkpoint that the model was loaded from.

    Raises:
        ValueError: ``choice`` is neither ``"auto"`` nor a bool, or True for a model without embeddings; or those were merged
            into and released.
    """
    if choice not in (True, False, "auto"):
        raise ValueError(f'`save_embedding_layers` is {choice!r}; allowed are True, False and "auto".')
    if choice is False or (choice == "auto" and not is_resized(model)):
        return {}
    layers = embedding_layers(model)
    merged = {layer.base_layer: layer for layer in model.modules() if isinstance(layer, AdaptedLayer) and layer.merged}
    found: dict[str, Tensor] = {}
    for name, module in base_modules(model).items():
        if any(module is layer for layer in layers):
            found |= {f"{name}.{own}": tensor for own, tensor in module._parameters.items() if tensor is not None}
            if module in merged:
                unmerged = merged[module].unmerged
                if unmerged is None:
                    raise ValueError(
                        f"`{name}.weight` was merged into with release=True, which freed what the file would hold."
                    )
                found[f"{name}.weight"] = unmerged.original
    if not found:
        raise ValueError("`save_embedding_layers` is True, but the model has no `get_input_embeddings`.")
    if choice == "auto":
        size = sum(tensor.nbytes for tensor in set(found.values()))
        warnings.warn(
            f"the vocabulary was resized after the model was loaded, so the file also holds {listed(found)} "
            f"({size:,} bytes), as in PEFT. To leave them out, pass save_embedding_layers=False.",
            VBLoRAWarning,
            stacklevel=4,
        )
    return found


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
