"""An optimizer's state, with the state of logits packed as the logits are: of each row, the part that training changed."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..adapters import VBLoRAAdapter
from ..distributed import gather_to_cpu, is_sharded, reshard, shard_like
from .packing import pack_prefixes, unpack_prefixes

_PACKED = "vblora.packed"


def pack_optimizer(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The ``state_dict`` of a torch optimizer with the per-element state of an adapter's logits packed.

    Logits that were never selected have a state of zeros, which is not stored. Everything else is stored bit for bit. Save the
    result with ``torch.save``; ``torch.load(..., weights_only=True)`` reads it.

    Args:
        model: an injected model, or one with :class:`VBLinear` layers.
        optimizer: any optimizer whose per-element state has the shape of the parameter.
    """
    return pack_state(model, optimizer, optimizer.state_dict())


def unpack_optimizer(model: nn.Module, optimizer: Optimizer, packed: dict[str, Any]) -> None:
    """Loads the result of :func:`pack_optimizer` into an optimizer of the same parameters.

    Raises:
        ValueError: it is of other parameters. The optimizer is not changed.
    """
    optimizer.load_state_dict(unpack_state(model, optimizer, packed))


def pack_state(model: nn.Module, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Packs a ``state_dict`` of the optimizer. State that is already packed stays as it is."""
    reshard(model)
    state = {
        number: {name: gather_to_cpu(value) if is_sharded(value) else value for name, value in values.items()}
        for number, values in state_dict["state"].items()
    }
    for number, logits in _logits_of(model, optimizer).items():
        if number in state:
            state[number] = {name: logits.pack(value) for name, value in state[number].items()}
    return state_dict | {"state": state}


def unpack_state(model: nn.Module, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The ``state_dict`` that :func:`pack_state` packed."""
    reshard(model)
    state = dict(state_dict["state"])
    for number, logits in _logits_of(model, optimizer).items():
        if number in state:
            state[number] = {name: logits.unpack(value) for name, value in state[number].items()}
    for number, parameter in enumerate(_parameters(optimizer)):
        if is_sharded(parameter) and number in state:
            state[number] = {
                name: shard_like(value, parameter) if _has_shape(value, parameter.shape) else value
                for name, value in state[number].items()
            }
    return state_dict | {"state": state}


def is_packed(optimizer: Optimizer) -> bool:
    """Whether an optimizer was loaded with packed state, which it cannot use."""
    return any(isinstance(v, dict) and _PACKED in v for values in optimizer.state.values() for v in values.values())


@dataclass(frozen=True)
class _Logits:
    """How to pack what has the shape of an adapter's logits.

    Attributes:
        order: for logits of all bank vectors, the bank vectors of each row in the order in which they come to be selected.
    """

    shape: tuple[int, ...]
    order: Tensor | None

    def pack(self, value: Any) -> Any:
        if not _has_shape(value, self.shape):
            return value
        value = value.cpu()
        lengths, values = pack_prefixes(value if self.order is None else value.gather(1, self.order))
        return {_PACKED: True, "lengths": lengths, "values": values}

    def unpack(self, value: Any) -> Any:
        if not isinstance(value, dict) or _PACKED not in value:
            return value
        values = unpack_prefixes(value["lengths"], value["values"], value["values"].new_zeros(self.shape))
        return values if self.order is None else torch.zeros_like(values).scatter_(1, self.order, values)


def _logits_of(model: nn.Module, optimizer: Optimizer) -> dict[int, _Logits]:
    """Those of the optimizer's parameters that are an adapter's logits, by the number that a ``state_dict`` gives them."""
    adapters: dict[Tensor, VBLoRAAdapter] = {
        m.logits: m for m in model.modules() if isinstance(m, VBLoRAAdapter) and m.logits is not None
    }
    found = {}
    for number, parameter in enumerate(_parameters(optimizer)):
        if (adapter := adapters.get(parameter)) is None:
            continue
        order = None
        if adapter.candidates is None and adapter.seed is not None:
            order = adapter.initial(adapter.bank.num_vectors).candidates
        found[number] = _Logits(tuple(parameter.shape), None if order is None else order.cpu().long())
    return found


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """The parameters in the order in which a ``state_dict`` numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _has_shape(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and value.shape == shape
