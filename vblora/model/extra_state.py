"""The extra tensors of every adapter in the model's state dict.

Adapters take turns with the same tensors of the model: those that `modules_to_save` and `bias` name are in the model while their
adapter is active. So a name such as `head.weight` does not say which adapter its value belongs to. Where that matters, a state
dict also holds, whichever adapters are active:

* ``vblora.extra.ADAPTER.NAME``: the value that the adapter has for the model's tensor ``NAME``;
* ``vblora.replaced.NAME``: the base model's value.

Loading takes the values from there and ignores those under the model's own names. If an update is merged into such a tensor, the
value here is without it, and the model's own name has the sum.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..distributed import is_sharded, shard_like
from ..layers.adapted import TensorSwap

if TYPE_CHECKING:
    from .record import AdaptedModel

EXTRA, REPLACED = "extra", "replaced"


class Path:
    """Stands for any path below a module: torch.distributed.checkpoint looks up each key of a state dict as attributes."""

    def __getattr__(self, name: str) -> "Path":
        if name == "_fqn_modifiers" or name.startswith("__"):
            raise AttributeError(name)
        return self


class _Entry(NamedTuple):
    swap: TensorSwap  # stores the tensor, unless that is in the model
    replaces: bool  # whether the tensor is what the swap replaces another with

    @property
    def tensor(self) -> Tensor:
        return self.swap.replacement if self.replaces else self.swap.original

    @property
    def in_model(self) -> bool:
        return self.swap.swapped_in == self.replaces


def add_extra_tensors(
    record: "AdaptedModel", _model: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: object
) -> None:
    """Adds them to a state dict, if the model's own names do not tell whose tensors they are."""
    if not record.unwrapped and take_turns(record):
        for key, entry in _entries(record, prefix).items():
            tensor = entry.tensor.detach()
            # A copy of what has another key, too: formats such as safetensors refuse tensors that share memory.
            state_dict[key] = tensor.clone() if entry.in_model else tensor


def take_extra_tensors(
    record: "AdaptedModel",
    model: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    _strict: bool,
    missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    """Takes them out of a state dict that is being loaded: into the adapters, or to the names that torch then loads."""
    entries = _entries(record, prefix)
    if not entries.keys() & state_dict.keys():
        missing += entries if take_turns(record) else []
        return
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(f"{prefix}{name}.")
    assigned: dict[Tensor, Tensor] = {}  # tied tensors stay tied
    for key, entry in entries.items():
        own, value = entry.tensor, state_dict.pop(key, None)
        if value is None:
            missing.append(key)
        elif not isinstance(value, Tensor) or value.shape != own.shape:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            errors.append(f"size mismatch for {key}: the state dict has {given}, but the model {tuple(own.shape)}.")
            value = None
        else:
            value = _sharded_as(value, own)
        if entry.in_model:
            for place in (f"{name}{entry.swap.name}" for name in names.get(entry.swap.module, ())):
                if value is not None:
                    state_dict[place] = value
                elif place in state_dict:  # perhaps another adapter's
                    state_dict[place] = own
        elif value is not None:
            if metadata.get("assign_to_params_buffers", False) or own.is_meta:
                is_parameter = isinstance(own, nn.Parameter)
                new = nn.Parameter(value, requires_grad=own.requires_grad) if is_parameter else value
                entry.swap.stored = assigned.setdefault(own, new)
            else:
                with torch.no_grad():
                    own.copy_(value)


def take_turns(record: "AdaptedModel") -> bool:
    """Whether the model's own names leave open whose tensors they are: then a state dict holds them all."""
    swaps, merged = record.swaps(), _merged(record)
    in_place = all(swap.swapped_in and swap.module not in merged for swap in swaps)
    return bool(swaps) and (len(record.adapters) > 1 or not in_place)


def _merged(record: "AdaptedModel") -> dict[nn.Module, TensorSwap]:
    """The base layers whose weight in the model contains an update, with the swap that stores it without."""
    swaps = {layer.base_layer: layer.unmerged for layer in record.layers}
    return {layer: swap for layer, swap in swaps.items() if swap is not None and swap.swapped_in}


def _entries(record: "AdaptedModel", prefix: str) -> dict[str, _Entry]:
    """What a state dict holds beside the model's own tensors, by its keys. Empty if no adapter has such tensors."""
    start = f"{prefix}{record.adapters_name}."
    entries: dict[str, _Entry] = {}
    merged = _merged(record)
    replaced: dict[tuple[nn.Module, str], str] = {}
    for attached in record.adapters.values():
        for name, swap in attached.extra.items():
            if swap.name in swap.module._non_persistent_buffers_set:
                continue
            entries[f"{start}{EXTRA}.{attached.name}.{name}"] = _Entry(swap, replaces=True)
            key = replaced.setdefault((swap.module, swap.name), f"{start}{REPLACED}.{name}")
            if key not in entries or swap.swapped_in:  # then it stores the base model's tensor
                entries[key] = _Entry(swap, replaces=False)
    for key, entry in entries.items():
        if entry.in_model and entry.swap.name == "weight" and entry.swap.module in merged:
            entries[key] = _Entry(merged[entry.swap.module], replaces=False)
    return entries


def _sharded_as(value: Tensor, own: Tensor) -> Tensor:
    if is_sharded(own) and not is_sharded(value):
        return shard_like(value, own)
    return value.full_tensor() if is_sharded(value) and not is_sharded(own) else value
