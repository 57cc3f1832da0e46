"""Which of a model's adapters run: switch them, turn them off, and remove them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ..layers.adapted import adapted_layers
from .record import adapted_model, adapted_models, check_adapter_name, refuse_if_disabled, refuse_if_merged


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str]) -> None:
    """Makes one adapter of a model the active one, or several, whose updates add up; or none, with an empty list.

    Only active adapters have parameters that require gradients; an adapter that becomes active again has those that it had.
    Biases and ``modules_to_save`` of an adapter stand in the model while it is active.

    Raises:
        ValueError: an unknown name, the model is merged or disabled, or several adapters that train the same bias or module
            to save. Nothing is changed then.
    """
    record = adapted_model(model)
    names = [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
    owners: dict[str, str] = {}
    for name in names:
        for place in record.adapters[check_adapter_name(record, name)].extra:
            if place in owners:
                raise ValueError(
                    f"adapters {owners[place]!r} and {name!r} both train `{place}`; only one can be active."
                )
            owners[place] = name
    refuse_if_disabled(record.layers)
    refuse_if_merged(record.layers)
    record.activate(names)


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the active adapters; all there are is ``list(model.vblora)``."""
    return adapted_model(model).active


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Takes one adapter out of a model, and frees what it alone holds. The others stay active, or not, as they were.

    With the last one the model is what :func:`eject` leaves.

    Raises:
        ValueError: an unknown name, or the model is merged or disabled.
    """
    record = adapted_model(model)
    check_adapter_name(record, adapter_name)
    refuse_if_disabled(record.layers)
    refuse_if_merged(record.layers)
    record.remove(adapter_name)
    if not record.adapters:
        record.take_out()


def eject(model: nn.Module) -> nn.Module:
    """Takes all adapters out of a model, whose parameters are then those from before :func:`inject`, bit for bit.

    After ``merge(model, release=True)`` it is the merged model instead, with trained biases and ``modules_to_save``. Buffers
    that forwards update, such as BatchNorm's statistics, stay as they are, but for those within ``modules_to_save``.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no adapter, it is disabled, or some of what is active was merged with ``release=True`` and some
            was not.
    """
    record = adapted_model(model)
    refuse_if_disabled(record.layers)
    released = any(layer.released for layer in record.layers)
    if released and not all(record.adapters[name].released for name in record.active):
        raise ValueError("some layers of `model` are merged for good and some are not. Merge the others first.")
    if not released:
        for layer in record.layers:
            layer.unmerge()
        record.activate([])
    record.take_out()
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within it the model is the base model: no updates, merged or not, and the base's own biases and ``modules_to_save``.

    Do not copy or pickle the model within it: the copy would stay disabled.

    Raises:
        ValueError: no adapted layers, or weights that were merged with ``release=True``.
    """
    layers = [layer for _, layer in adapted_layers(model)]
    if any(layer.released for layer in layers):
        raise ValueError("`model` was merged with release=True: its base weights are gone.")
    enabled = [layer for layer in layers if layer.enabled]
    swapped = [layer.unmerged for layer in enabled if layer.unmerged is not None]
    if enabled:  # not again where it is disabled already
        swapped += [extra for record in adapted_models(model) for extra in record.swapped_in()]
    for layer in enabled:
        layer.set(enabled=False)
    for extra in swapped:
        extra.swap()
    try:
        yield model
    finally:
        for extra in swapped:
            extra.swap()
        for layer in enabled:
            layer.set(enabled=True)
