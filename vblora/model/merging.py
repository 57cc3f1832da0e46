"""Merges updates into weights, and unmerges them."""

import warnings
from collections.abc import Sequence

from ..errors import VBLoRAWarning
from ..layers.adapted import AdaptedLayer, adapted_layers
from ..layers.kinds import refusal
from ..layers.users import has_other_users
from ..layers.weights import Rounding, can_merge_into, format_name
from .lookup import adapted_models, refuse_if_disabled
from .merge_checks import warn_before_merging
from .record import ModuleT


def merge(model: ModuleT, adapter_names: str | Sequence[str] | None = None, *, release: bool = False) -> ModuleT:
    """Adds each layer's updates to its weight, so that the model runs at the base model's speed.

    The sum is computed in float32 (float64 for a float64 weight) and rounded once to the weight's dtype. Each merged layer gets
    its own weight; a layer whose weight was tied to it does not change.

    A quantised weight (8-bit and 4-bit bitsandbytes, int8 torchao) is dequantised, and its sum with the updates is quantised
    again in the same format. A warning reports the rounding error. The attribute ``rounding`` of each layer also has it, relative
    to the norm of the weight (``of_weight``) and to that of the update (``of_update``).

    Do not merge or unmerge while another thread runs the model: its forward pass would add the update of some layers twice or
    not at all.

    Args:
        model: an injected model, or a module with :class:`VBLinear` layers.
        adapter_names: which of the active adapters to merge; by default all. Forwards still add the updates of the others.
        release: free the original weights. By default they stay in memory, so that :func:`unmerge` restores them bit for bit.
            You cannot undo a released merge; call :func:`eject` afterwards to get a plain model.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no adapted layers or is disabled, an adapter is not active or is already merged, a forward read
            the weight of a layer without calling it, another adapted layer has the same base layer, a weight is on the meta
            device (accelerate offloads there), or a sum is not finite in the weight's dtype. Nothing is merged then.
        TypeError: a base weight is computed from other tensors, or its quantisation format is unknown; or a base layer was
            replaced by one of another kind.
    """
    layers = adapted_layers(model)
    refuse_if_disabled([layer for _, layer in layers])
    chosen = _chosen(layers, [adapter_names] if isinstance(adapter_names, str) else adapter_names)
    swaps: set[object] = {swap for record in adapted_models(model) for swap in record.swaps()}
    for name, layer in layers:
        if not chosen[layer]:
            continue
        again = [adapter for adapter in chosen[layer] if adapter in layer.merged]
        if again:
            raise ValueError(
                f"adapter {again[0]!r} is already merged into layer `{name}`. Call vblora.unmerge(model) first."
            )
        if any(layer.updates[adapter].slot.weight_read for adapter in chosen[layer]):
            raise ValueError(
                f"the model's code reads the weight of layer `{name}` itself, which leaves out the update. Merging would add it, "
                "so nothing was merged. Exclude that layer with `exclude_modules`."
            )
        if has_other_users(layer.base_layer, swaps | {layer}):
            raise ValueError(
                f"the base layer of `{name}` is also that of another adapted layer, in another injected model or in a VBLinear, "
                "which would get the update, too. Nothing was merged. Eject or delete the other, or merge a copy.deepcopy of "
                "this model."
            )
        if not can_merge_into(layer.weight):
            raise TypeError(f"layer `{name}` has a weight of {format_name(layer.weight)}, which cannot be merged into.")
        if "weight" not in layer.base_layer._parameters:
            raise TypeError(
                f"the weight of layer `{name}` is parametrized: it is computed from other tensors and cannot be replaced."
            )
        if reason := refusal(layer.base_layer):
            raise TypeError(
                f"the base layer of `{name}` is a {type(layer.base_layer).__name__} now{reason}. Something replaced it after "
                "vblora.inject, so merging could change what the layer computes. Nothing was merged."
            )
        if layer.weight.is_meta:
            raise ValueError(
                f"the weight of layer `{name}` is on the meta device, so it has no values here. Perhaps accelerate has offloaded "
                "it. Load the base model without offloading to merge."
            )
        weight = layer.merged_weight(chosen[layer])
        if not weight.isfinite().all():
            raise ValueError(
                f"the merged weight of layer `{name}` would not be finite in {weight.dtype}: the adapter holds NaN or is too "
                "large for that dtype. Nothing was merged."
            )
    warn_before_merging(model, [(name, layer) for name, layer in layers if chosen[layer]])
    for layer, names in chosen.items():
        if names:
            layer.merge(names, release)
    _warn_of_rounding(
        [(name, layer.rounding) for name, layer in layers if chosen[layer] and layer.rounding is not None]
    )
    return model


def unmerge(model: ModuleT) -> ModuleT:
    """Restores the weights from before :func:`merge`, bit for bit. A model that is not merged does not change.

    Returns:
        The same model.

    Raises:
        ValueError: the weights were released, or the model is disabled.
    """
    layers = adapted_layers(model)
    refuse_if_disabled([layer for _, layer in layers])
    for name, layer in layers:
        if layer.released:
            raise ValueError(
                f"layer `{name}` was merged with release=True, which freed its original weight. Load the base model again."
            )
    taken_out = [layer for record in adapted_models(model) for layer in record.layers]  # among them, after the merge
    for layer in (*(layer for _, layer in layers), *taken_out):
        layer.unmerge()
    return model


def _warn_of_rounding(quantised: list[tuple[str, Rounding]]) -> None:
    if not quantised:
        return
    name, worst = max(quantised, key=lambda item: item[1].of_update)
    warnings.warn(
        f"{len(quantised)} merged weights were quantised again. The error is largest in layer `{name}`: {worst.of_weight:.2g} of "
        f"its weight's norm and {worst.of_update:.2g} of its update's. `rounding` of each layer holds its error.",
        VBLoRAWarning,
        stacklevel=3,
    )


def _chosen(layers: list[tuple[str, AdaptedLayer]], names: Sequence[str] | None) -> dict[AdaptedLayer, list[str]]:
    """The adapters to merge into each layer."""
    active = {name for _, layer in layers for name in layer.active}
    for name in names or ():
        if name not in active:
            raise ValueError(
                f"`adapter_names` contains {name!r}, but the active adapters are {', '.join(sorted(active)) or 'none'}. "
                "Activate it with vblora.set_adapter first."
            )
    if not active:
        raise ValueError("`model` has no active adapter to merge. Activate one with vblora.set_adapter first.")
    return {layer: [name for name in layer.active if names is None or name in names] for _, layer in layers}
