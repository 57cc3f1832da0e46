"""Switches, disables and removes the adapters of a model."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ..errors import VBLoRAWarning
from ..layers.adapted import adapted_layers
from .lookup import adapted_model, adapted_models, check_adapter_name, refuse_if_disabled, refuse_if_merged
from .record import ModuleT


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str]) -> None:
    """Makes one or several adapters of a model active, and all others inactive. The updates of several adapters add up.

    Only the parameters of active adapters require gradients; when an adapter becomes active again, the same ones do as before.
    The biases and ``modules_to_save`` of an adapter, and the base model's embeddings that its file contains, are in the model
    while it is active, and only then in ``model.parameters()``. ``model.zero_grad()`` also clears those of inactive adapters; a
    wrapper's, such as DDP's, does not. ``optimizer.zero_grad()`` always clears what the optimizer trains.

    Args:
        model: an injected model.
        adapter_name: the name of an adapter, or a list of names. An empty list runs the base model.

    Raises:
        ValueError: a name is unknown, the model is merged or disabled, or several adapters replace the same tensor.
            The model does not change then.
    """
    record = adapted_model(model)
    names = [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
    owners: dict[str, str] = {}
    for name in names:
        for place in record.adapters[check_adapter_name(record, name)].extra:
            if place in owners:
                raise ValueError(
                    f"adapters {owners[place]!r} and {name!r} both replace `{place}`. Activate only one of them."
                )
            owners[place] = name
    refuse_if_disabled(record.layers)
    refuse_if_merged(record.layers)
    record.activate(names)


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the active adapters, in the order of their activation; ``list(model.vblora)`` has those of all adapters.

    Raises:
        ValueError: the model has no adapter.
    """
    return adapted_model(model).active


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Removes one adapter from a model and frees its memory.

    The other adapters stay active or inactive, as they were. If none is active, the model runs as its base model, and a warning
    says so. Removing the last adapter leaves the model as :func:`eject` does.

    Raises:
        ValueError: the name is unknown, or the model is merged or disabled.
    """
    record = adapted_model(model)
    check_adapter_name(record, adapter_name)
    refuse_if_disabled(record.layers)
    refuse_if_merged(record.layers)
    was_active = adapter_name in record.active
    record.remove(adapter_name)
    if not record.adapters:
        record.take_out()
    elif was_active and not record.active:
        warnings.warn(
            f"adapter {adapter_name!r} was the only active one, so the model is its base model now. Activate one of "
            f"{', '.join(record.adapters)} with vblora.set_adapter.",
            VBLoRAWarning,
            stacklevel=2,
        )


def eject(model: ModuleT) -> ModuleT:
    """Removes all adapters from a model and restores its parameters from before :func:`inject`, bit for bit.

    After ``merge(model, release=True)`` you get the merged model instead, with the trained biases and ``modules_to_save``.
    Buffers that a forward pass changes, such as counters, keep their values.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no adapter or is disabled, or only some of the active adapters were merged with
            ``release=True``.
    """
    record = adapted_model(model)
    refuse_if_disabled(record.layers)
    layers = record.present_layers
    released = any(layer.released for layer in layers)
    if released and any(layer.applied or not layer.released for layer in layers if layer.active):
        raise ValueError("only some active adapters of `model` are merged with release=True. Merge the others, too.")
    if not released:
        for layer in record.layers:
            layer.unmerge()
        record.activate([])
    record.take_out()
    return model


@contextmanager
def disabled(model: ModuleT) -> Iterator[ModuleT]:
    """A context in which the model is the base model: without updates, merged ones included, and with its original biases and
    ``modules_to_save``.

    Do not copy or pickle the model within the context: the copy would stay disabled.

    Raises:
        ValueError: the model has no adapted layers, or weights were merged with ``release=True``.
    """
    layers = [layer for _, layer in adapted_layers(model)]
    if any(layer.released for layer in layers):
        raise ValueError(
            "`model` was merged with release=True, which freed its base weights. Load the base model again."
        )
    enabled = [layer for layer in layers if layer.enabled]
    swapped = [layer.unmerged for layer in enabled if layer.unmerged is not None]
    if enabled:  # contexts can be nested: swap only once
        swapped += [extra for record in adapted_models(model) for extra in record.swapped_in()]
    for layer in enabled:
        layer.set(enabled=False)
    for extra in swapped:
        extra.swap()
    try:
        yield model
    finally:
        for extra in reversed(swapped):  # one tensor can be both replaced and merged into
            extra.swap()
        for layer in enabled:
            layer.set(enabled=True)
