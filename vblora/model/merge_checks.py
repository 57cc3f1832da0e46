"""Layers whose merged weight would compute something else than the adapted layer, or lose its tie to another."""

import warnings
from collections.abc import Iterable

from torch import nn

from ..errors import VBLoRAWarning, listed
from ..layers.adapted import AdaptedLayer


def warn_before_merging(model: nn.Module, layers: Iterable[tuple[str, AdaptedLayer]]) -> None:
    """Warns of layers to be merged that have hooks within, or share their weight with another module."""
    chosen = dict(layers)
    hooked = [name for name, layer in chosen.items() if _has_hooks(layer.base_layer)]
    if hooked:
        warnings.warn(
            f"{listed(hooked)} had forward hooks before vblora.inject. If one changes the layer's input or output, the merged "
            "model computes something else, as the hook sees the update, too. Register such hooks after vblora.inject.",
            VBLoRAWarning,
            stacklevel=3,
        )
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(name.removesuffix(".base_layer"))
    shared = [users[id(layer.base_layer.weight)] for layer in chosen.values()]
    shared = [names for names in shared if len(names) > 1]
    if shared:
        listed_names = " and ".join(f"`{name}`" for name in shared[0])
        warnings.warn(
            f"{listed_names} share one weight; merged, each adapted layer has its own. If you save "
            "the merged model, whoever loads it must not tie them again (in transformers, set `tie_word_embeddings` to False).",
            VBLoRAWarning,
            stacklevel=3,
        )


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)
