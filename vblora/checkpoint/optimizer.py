"""An optimizer's state, with the state of logits packed as the logits are: of each row, the part that training changed."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..adapters import VBLoRAAdapter
from ..distributed import gather_to_cpu, is_sharded, reshard, shard_like
from ..errors import listed
from ..model.lookup import adapted_models
from .packing import pack_prefixes, unpack_prefixes

_PACKED = "vblora.packed"
_PARAMETERS = "vblora.parameters"  # what identifies the optimizer's parameters, in order
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "base_layer.")  # parts of names that wrapping a module adds


def pack_optimizer(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The ``state_dict`` of a torch optimizer with the per-element state of an adapter's logits packed.

    Logits that were never selected have a state of zeros, which is not stored. Everything else is stored bit for bit. Save the
    result with ``torch.save``; ``torch.load(..., weights_only=True)`` reads it.

    Args:
        model: an injected model, or one with :class:`VBLinear` layers.
        optimizer: any optimizer whose per-element state has the shape of the parameter.

    Returns:
        A state dict for :func:`unpack_optimizer`, on the CPU where it is packed.
    """
    return pack_state(model, optimizer, optimizer.state_dict())


def unpack_optimizer(model: nn.Module, optimizer: Optimizer, packed: dict[str, Any]) -> None:
    """Loads the result of :func:`pack_optimizer` into an optimizer of the same parameters.

    It finds parameters by the names of the adapters and of the parameters, so you may have loaded the adapters in another order.
    A single adapter may have another name now.

    Args:
        model: the model with the same adapters.
        optimizer: a new optimizer over its parameters, made in the same way as the one that was packed.
        packed: the result of :func:`pack_optimizer`.

    Raises:
        ValueError: ``packed`` is of other parameters, or of logits of another seed. The optimizer is not changed.
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
    identities = [[adapter, name, list(shape)] for adapter, name, shape in _identities(model, optimizer)]
    return {_PARAMETERS: identities} | state_dict | {"state": state}


def unpack_state(model: nn.Module, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The ``state_dict`` that :func:`pack_state` packed, with the parameters in the order that they have in ``optimizer``."""
    reshard(model)
    state_dict = _in_order(model, optimizer, state_dict)
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


class _Identity(NamedTuple):
    """What identifies a parameter.

    Attributes:
        adapter: the name of the adapter that it belongs to; empty if it belongs to none, or to several that share a bank.
        name: its name in that adapter, or in the model; empty if the model does not have it.
    """

    adapter: str
    name: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"`{f'{self.adapter}.{self.name}'.lstrip('.')}` {self.shape}"


def _identities(model: nn.Module, optimizer: Optimizer) -> list[_Identity]:
    names: dict[Tensor, tuple[str, str]] = {p: ("", _without_wrappers(name)) for name, p in model.named_parameters()}
    owners: dict[Tensor, list[tuple[str, str]]] = {}
    for record in adapted_models(model):
        for attached in record.adapters.values():
            for name, parameter in attached.parameters.items():
                owners.setdefault(parameter, []).append((attached.name, name))
    for tensor, owned in owners.items():
        names[tensor] = owned[0] if len(owned) == 1 else ("", " and ".join(sorted(map(".".join, owned))))
    return [_Identity(*names.get(p, ("", "")), tuple(p.shape)) for p in _parameters(optimizer)]


def _in_order(model: nn.Module, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The ``state_dict`` with the parameters of each group in the order that they have in ``optimizer``.

    Raises:
        ValueError: it is of other parameters.
    """
    if _PARAMETERS not in state_dict:  # torch's own
        return state_dict
    own = _identities(model, optimizer)
    saved = [_Identity(adapter, name, tuple(shape)) for adapter, name, shape in state_dict[_PARAMETERS]]
    before, now = ({identity.adapter for identity in some} - {""} for some in (saved, own))
    present = {name for record in adapted_models(model) for name in record.adapters}
    if len(before) == len(now) == 1 and not before & present:  # the adapter has another name now
        saved = [identity._replace(adapter=min(now)) if identity.adapter else identity for identity in saved]
    groups = state_dict["param_groups"]
    identity_of = dict(zip((number for group in groups for number in group["params"]), saved, strict=True))
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"`packed` has {len(groups)} groups of parameters, but the optimizer {len(optimizer.param_groups)}."
        )
    numbers: list[int] = []  # those of the saved state, in the optimizer's order
    ordered = []
    for group, own_group in zip(groups, optimizer.param_groups, strict=True):
        start = len(numbers)
        wanted = own[start : start + len(own_group["params"])]
        found = [identity_of[number] for number in group["params"]]
        if sorted(found) != sorted(wanted) or (found != wanted and len(set(found)) < len(found)):
            theirs, ours = (sorted(set(one) - set(other)) for one, other in ((found, wanted), (wanted, found)))
            raise ValueError(
                f"`packed` is of other parameters than the optimizer's: it also has {listed(theirs, str)}, and lacks "
                f"{listed(ours, str)}. Load the adapters that it was packed with under their names, activate the same ones, and "
                "make the optimizer in the same way."
            )
        if found == wanted:
            numbers += group["params"]
        else:
            number_of = dict(zip(found, group["params"], strict=True))
            numbers += [number_of[identity] for identity in wanted]
        ordered.append(group | {"params": list(range(start, len(numbers)))})
    state = {
        place: state_dict["state"][number] for place, number in enumerate(numbers) if number in state_dict["state"]
    }
    return state_dict | {"state": state, "param_groups": ordered}


def _without_wrappers(name: str) -> str:
    for part in _WRAPPERS:
        name = name.replace(part, "")
    return name.removeprefix("module.")


@dataclass(frozen=True)
class _Logits:
    """How to pack what has the shape of an adapter's logits.

    Attributes:
        order: for logits of all bank vectors, the bank vectors of each row in the order in which they come to be selected.
        seed: which bank vector a column of packed state is of depends on it.
    """

    shape: tuple[int, ...]
    order: Tensor | None
    seed: int | None

    def pack(self, value: Any) -> Any:
        if not _has_shape(value, self.shape):
            return value
        value = value.cpu()
        lengths, values = pack_prefixes(value if self.order is None else value.gather(1, self.order))
        return {_PACKED: True, "lengths": lengths, "values": values, "seed": self.seed}

    def unpack(self, value: Any) -> Any:
        if not isinstance(value, dict) or _PACKED not in value:
            return value
        if value.get("seed", self.seed) != self.seed:
            raise ValueError(
                f"`packed` is of logits of the seed {value['seed']}, but the adapter's are of the seed {self.seed}. Load the "
                "adapter that it was saved with first."
            )
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
        found[number] = _Logits(tuple(parameter.shape), None if order is None else order.cpu().long(), adapter.seed)
    return found


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """The parameters in the order in which a ``state_dict`` numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _has_shape(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and value.shape == shape
