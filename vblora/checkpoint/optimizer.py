"""An optimizer's state, with what it keeps per logit stored as the logits are: of each row, the part that was touched."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..adapters import VBLoRAAdapter
from ..distributed import gather_to_cpu, is_sharded, reshard, shard_like
from .packing import pack_prefixes, unpack_prefixes

_PACKED = "vblora.packed"


def pack_optimizer(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The ``state_dict`` of a torch optimizer, with every tensor that is shaped like an adapter's logits packed.

    What was never selected has a state of zeros, which is not stored; everything else is, to the bit. Save it with
    ``torch.save``; ``torch.load(..., weights_only=True)`` reads it.

    Args:
        model: an injected model, or one that holds :class:`VBLinear` layers.
        optimizer: any that keeps per-element state in tensors shaped like the parameter.
    """
    return pack_state(model, optimizer, optimizer.state_dict())


def unpack_optimizer(model: nn.Module, optimizer: Optimizer, packed: dict[str, Any]) -> None:
    """Loads what :func:`pack_optimizer` returned into an optimizer of the same parameters.

    Raises:
        ValueError: it was packed for other parameters. The optimizer is left as it was.
    """
    optimizer.load_state_dict(unpack_state(model, optimizer, packed))


def pack_state(model: nn.Module, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A ``state_dict`` of the optimizer, packed. What is packed already stays so."""
    reshard(model)
    state = {
        number: {name: gather_to_cpu(value) if is_sharded(value) else value for name, value in kept.items()}
        for number, kept in state_dict["state"].items()
    }
    for number, order in _logits_of(model, optimizer).items():
        if number in state:
            state[number] = {name: _pack(value, order) for name, value in state[number].items()}
    return state_dict | {"state": state}


def unpack_state(model: nn.Module, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The ``state_dict`` that :func:`pack_state` was given."""
    reshard(model)
    state = dict(state_dict["state"])
    for number, order in _logits_of(model, optimizer).items():
        if number in state:
            state[number] = {name: _unpack(value, order) for name, value in state[number].items()}
    for number, parameter in enumerate(_parameters(optimizer)):
        if is_sharded(parameter) and number in state:
            state[number] = {
                name: shard_like(value, parameter) if _is_per_element(value, parameter.shape) else value
                for name, value in state[number].items()
            }
    return state_dict | {"state": state}


def is_packed(optimizer: Optimizer) -> bool:
    """Whether packed state was loaded into an optimizer that cannot use it."""
    return any(isinstance(v, dict) and _PACKED in v for kept in optimizer.state.values() for v in kept.values())


def _logits_of(model: nn.Module, optimizer: Optimizer) -> dict[int, Tensor | tuple[int, int]]:
    """Of each of the optimizer's parameters that are an adapter's logits, by its number: the shape, or for a dense adapter the
    bank vectors of each row in the order in which they come to be selected."""
    adapters = {m.logits: m for m in model.modules() if isinstance(m, VBLoRAAdapter) and m.logits is not None}
    found = {}
    for number, parameter in enumerate(_parameters(optimizer)):
        adapter = adapters.get(parameter)
        if adapter is None:
            continue
        found[number] = tuple(parameter.shape)
        if adapter.candidates is None and adapter.seed is not None:
            found[number] = adapter.initial(adapter.bank.num_vectors).candidates.cpu()
    return found


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """In the order by which a ``state_dict`` numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _is_per_element(value: Any, shape: torch.Size | tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and value.shape == shape


def _pack(value: Any, order: Tensor | tuple[int, int]) -> Any:
    if not _is_per_element(value, order if isinstance(order, tuple) else order.shape):
        return value
    value = value.cpu()
    if isinstance(order, Tensor):
        value = value.gather(1, order.long())
    lengths, values = pack_prefixes(value)
    return {_PACKED: True, "lengths": lengths, "values": values}


def _unpack(value: Any, order: Tensor | tuple[int, int]) -> Any:
    if not isinstance(value, dict) or _PACKED not in value:
        return value
    shape = order if isinstance(order, tuple) else tuple(order.shape)
    values = unpack_prefixes(value["lengths"], value["values"], value["values"].new_zeros(shape))
    return torch.zeros_like(values).scatter_(1, order.long(), values) if isinstance(order, Tensor) else values
