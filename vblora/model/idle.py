"""Detects adapters that training would not change: ``parameter_groups`` refuses them, a forward warns."""

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from ..errors import VBLoRAWarning
from ..layers.adapted import AdaptedLayer

if TYPE_CHECKING:
    from .attached import AttachedAdapter

_UNMERGE = "Call vblora.unmerge(model) first"
_THAW = "Load it with vblora.load(model, folder, is_trainable=True), or call requires_grad_(True) on its parameters"


def refuse_merged(layers: Iterable[AdaptedLayer]) -> None:
    """Refuses to prepare training while an adapter is merged, because it would get no gradient."""
    merged = [layer for layer in layers if layer.merged]
    if merged:
        raise ValueError(_merged_message(merged[0].merged[0], any(layer.released for layer in merged)))


def _merged_message(name: str, released: bool) -> str:
    mend = "It was merged with release=True: to train it, load the base model again." if released else f"{_UNMERGE}."
    return f"adapter {name!r} is merged into the weights, so it gets no gradient. {mend}"


def frozen(name: str) -> str:
    """The message for an adapter none of whose parameters requires gradients."""
    return f"no parameter of adapter {name!r} requires gradients. {_THAW}."


def warn_if_idle(model: nn.Module, active: Iterable["AttachedAdapter"]) -> None:
    """Warns once for each active adapter that gets no gradient in training: merged, or frozen while other parameters train.

    Call it when the model trains.
    """
    for attached in active:
        merged = attached.name in attached.layers[0].merged
        if attached.checked_for_training == merged:  # nothing changed since
            continue
        attached.checked_for_training = merged
        if merged:
            warnings.warn(
                "the model is in training mode, but " + _merged_message(attached.name, attached.layers[0].released),
                VBLoRAWarning,
                stacklevel=2,
            )
        elif not any(p.requires_grad for p in attached.adapter.parameters()) and any(
            p.requires_grad for p in model.parameters()
        ):
            warnings.warn(f"the model trains, but {frozen(attached.name)}", VBLoRAWarning, stacklevel=2)
