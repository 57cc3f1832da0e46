"""Finds the record of an injected model and its adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from ..layers.adapted import AdaptedLayer
from .extra_state import EXTRA, REPLACED, Path

if TYPE_CHECKING:
    from .attached import AttachedAdapter
    from .record import AdaptedModel

ADAPTERS_ATTRIBUTE = "vblora"  # the submodule of an injected model that holds its adapters


class Adapters(nn.ModuleDict):
    """The adapters of a model, by name."""


for _name in (EXTRA, REPLACED):  # keys of a state dict, which no adapter can have as its name
    setattr(Adapters, _name, Path())


def adapted_models(model: nn.Module) -> list[AdaptedModel]:
    """The records of a model and of its submodules. This does not search the adapters, so their number does not matter."""
    found, pending = {}, [model]  # modules seen, with their records
    while pending:
        module = pending.pop()
        if module is not None and module not in found and type(module) is not Adapters:
            own = vars(module)
            found[module] = own.get("_vblora_adapted_model")
            pending += reversed(own["_modules"].values())
    return [record for record in found.values() if record is not None]


@contextmanager
def base_tensors_in_place(model: nn.Module) -> Iterator[None]:
    """Within it the base model's tensors are in the places of the extra ones. Not for a merged model."""
    swapped_in = [extra for record in adapted_models(model) for extra in record.swapped_in()]
    for extra in swapped_in:
        extra.swap()
    try:
        yield
    finally:
        for extra in swapped_in:
            extra.swap()


def adapted_model(model: nn.Module) -> AdaptedModel:
    """The record of an injected model, which may be wrapped in another one (DDP, torch.compile).

    Raises:
        ValueError: the model has no record, or several.
    """
    records = adapted_models(model)
    if not records:
        raise ValueError("`model` has no adapter: call vblora.inject(model, config) first.")
    if len(records) > 1:
        raise ValueError(f"`model` contains {len(records)} injected models. Pass one of them.")
    return records[0]


def attached_adapter(model: nn.Module, adapter_name: str | None = None) -> AttachedAdapter:
    """The adapter with the given name; without a name, the active one.

    Raises:
        ValueError: no adapter has that name, or the name is None and not exactly one adapter is active.
    """
    record = adapted_model(model)
    if adapter_name is None:
        if len(record.active) != 1:
            active = f"the active ones are {', '.join(record.active)}" if record.active else "none is active"
            raise ValueError(
                f"`adapter_name` is None, which means the active adapter, but {active}. "
                f"Name one of {', '.join(record.adapters)}."
            )
        return record.adapters[record.active[0]]
    return record.adapters[check_adapter_name(record, adapter_name)]


def check_adapter_name(record: AdaptedModel, name: str) -> str:
    if name not in record.adapters:
        raise ValueError(f"`adapter_name` is {name!r}; the model's adapters are {', '.join(record.adapters)}.")
    return name


def refuse_if_disabled(layers: list[AdaptedLayer]) -> None:
    """Refuses calls that would read or write the base model's tensors instead of the adapted model's."""
    if not all(layer.enabled for layer in layers):
        raise ValueError(
            "the adapters of `model` are disabled. Call this outside the block of `with vblora.disabled(model)`."
        )


def refuse_if_merged(layers: list[AdaptedLayer]) -> None:
    """Refuses calls that would change which adapters are merged."""
    if any(layer.merged for layer in layers):
        raise ValueError("`model` is merged. Call vblora.unmerge(model) first.")
