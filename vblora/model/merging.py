"""Putting updates into weights, and taking them out again."""

import warnings
from collections.abc import Sequence

from torch import nn

from ..errors import VBLoRAWarning
from ..layers.adapted import AdaptedLayer, adapted_layers
from ..layers.weights import Rounding, format_name, format_of
from .record import refuse_if_disabled


def merge(model: nn.Module, adapter_names: str | Sequence[str] | None = None, *, release: bool = False) -> nn.Module:
    """Adds each layer's updates to its weight, so that the model runs at the base model's speed.

    The sum is formed in float32 (float64 for a float64 weight) and rounded once to the weight's dtype. Each merged layer gets
    a weight of its own: one that is tied to another layer's leaves that layer alone.

    A quantised weight (bitsandbytes' 8 and 4 bits, torchao's int8) is dequantised, and its sum with the updates quantised again
    in the same way. A warning tells what that rounds away, and each layer's ``rounding``: the relative error of the weight
    (``of_weight``), and the same error by the norm of the update (``of_update``).

    Args:
        model: an injected model, or any module that holds :class:`VBLinear` layers.
        adapter_names: which of the active adapters; all by default. The others' updates go on to be added by each forward.
        release: keep nothing of the old weights. By default they are kept beside the merged ones, so that :func:`unmerge`
            brings them back bit for bit; that costs the memory of the targets' weights once more. A released merge
            cannot be undone; follow it with :func:`eject` for a plain model.

    Returns:
        The same model.

    Raises:
        ValueError: no adapted layers, an adapter that is not active, is merged already or disabled, a layer whose weight a
            forward read without calling it, or a sum that is not finite in the weight's dtype. Nothing is merged then.
        TypeError: a base weight that is computed from others, or quantised in a way that nothing can be merged into.
    """
    layers = adapted_layers(model)
    refuse_if_disabled([layer for _, layer in layers])
    chosen = _chosen(layers, [adapter_names] if isinstance(adapter_names, str) else adapter_names)
    for name, layer in layers:
        if not chosen[layer]:
            continue
        again = [adapter for adapter in chosen[layer] if adapter in layer.merged]
        if again:
            raise ValueError(
                f"layer `{name}` has adapter {again[0]!r} merged already. Call vblora.unmerge(model) first."
            )
        if any(layer.updates[adapter].slot.read for adapter in chosen[layer]):
            raise ValueError(
                f"the model's code reads the weight of layer `{name}` itself, which leaves the update out; merged, it would be "
                "in. Nothing was merged. Adapt the model without that layer (`exclude_modules`)."
            )
        if "weight" not in layer.base_layer._parameters:
            raise TypeError(
                f"the weight of layer `{name}` is computed from others (parametrized), and cannot be replaced."
            )
        if format_of(layer.weight) is None:
            raise TypeError(f"layer `{name}` has a weight of {format_name(layer.weight)}, which cannot be merged into.")
        weight = layer.merged_weight(chosen[layer])
        if not weight.isfinite().all():
            raise ValueError(
                f"merged, the weight of layer `{name}` would not be finite in {weight.dtype}: the adapter is broken, "
                "or too large for that dtype. Nothing was merged."
            )
    for layer, names in chosen.items():
        if names:
            layer.merge(names, release)
    _warn_of_rounding(
        [(name, layer.rounding) for name, layer in layers if chosen[layer] and layer.rounding is not None]
    )
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Brings back the weights that :func:`merge` set aside, bit for bit. A model that is not merged is left as it is.

    Raises:
        ValueError: the weights were released, or the adapter is disabled.
    """
    layers = adapted_layers(model)
    refuse_if_disabled([layer for _, layer in layers])
    for name, layer in layers:
        if layer.released:
            raise ValueError(f"layer `{name}` was merged with release=True, which kept nothing to go back to.")
    for _, layer in layers:
        layer.unmerge()
    return model


def _warn_of_rounding(quantised: list[tuple[str, Rounding]]) -> None:
    if not quantised:
        return
    name, worst = max(quantised, key=lambda item: item[1].of_update)
    warnings.warn(
        f"{len(quantised)} merged weights were quantised again. The error is largest in layer `{name}`: {worst.of_weight:.2g} of "
        f"its weight's norm, {worst.of_update:.2g} of its update's. Each layer's is its `rounding`; unmerged there is none.",
        VBLoRAWarning,
        stacklevel=3,
    )


def _chosen(layers: list[tuple[str, AdaptedLayer]], names: Sequence[str] | None) -> dict[AdaptedLayer, list[str]]:
    """Which adapters to merge into each layer."""
    active = {name for _, layer in layers for name in layer.active}
    for name in names or ():
        if name not in active:
            raise ValueError(
                f"`adapter_names` names {name!r}, but active are {', '.join(sorted(active)) or 'none'}. "
                "Activate it with vblora.set_adapter first."
            )
    if not active:
        raise ValueError("`model` has no active adapter to merge. Activate one with vblora.set_adapter first.")
    return {layer: [name for name in layer.active if names is None or name in names] for _, layer in layers}
