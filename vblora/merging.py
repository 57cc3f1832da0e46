"""Putting updates into weights, and taking them out again."""

from torch import nn

from .injection import refuse_if_disabled
from .layers import adapted_layers


def merge(model: nn.Module, *, release: bool = False) -> nn.Module:
    """Adds each layer's update to its weight, so that the model runs at the base model's speed.

    The sum is formed in float32 (float64 for a float64 weight) and rounded once to the weight's dtype. Each merged layer gets
    a weight of its own: one that is tied to another layer's leaves that layer alone.

    Args:
        model: an injected model, or any module that holds :class:`VBLinear` layers.
        release: keep nothing of the old weights. By default they are kept beside the merged ones, so that :func:`unmerge`
            brings them back bit for bit; that costs the memory of the targets' weights once more. A released merge
            cannot be undone; follow it with :func:`eject` for a plain model.

    Returns:
        The same model.

    Raises:
        ValueError: no adapted layers, one that is merged already or disabled, or a sum that is not finite in the weight's
            dtype. Nothing is merged then.
        TypeError: a base weight that is no floating-point parameter.
    """
    layers = adapted_layers(model)
    refuse_if_disabled([layer for _, layer in layers])
    for name, layer in layers:
        if layer.merged:
            raise ValueError(f"layer `{name}` is merged already. Call vblora.unmerge(model) first.")
        if "weight" not in layer.base_layer._parameters:
            raise TypeError(
                f"the weight of layer `{name}` is computed from others (parametrized), and cannot be replaced."
            )
        if not layer.weight.is_floating_point():
            raise TypeError(f"layer `{name}` has a weight of {layer.weight.dtype}, which cannot be merged into.")
        if not layer.merged_weight().isfinite().all():
            raise ValueError(
                f"merged, the weight of layer `{name}` would not be finite in {layer.weight.dtype}: the adapter is broken, "
                "or too large for that dtype. Nothing was merged."
            )
    for _, layer in layers:
        layer.merge(release)
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
