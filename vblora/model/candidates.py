"""Candidates in training: counts the rows that have used theirs up, and adds candidates."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.optim import Optimizer

from ..adapters import VBLoRAAdapter
from ..checks import check_count
from ..config import VBLoRAConfig
from ..distributed import is_sharded, reshard
from .lookup import adapted_models, attached_adapter


class Stats(NamedTuple):
    """The state of one adapter's rows. A row is the logits of one sub-vector.

    Attributes:
        num_subvectors: S, the number of rows.
        num_vectors: h, the number of bank vectors.
        num_candidates: M, the number of logits in a row; h for a dense adapter.
        exhausted: the number of rows that have used up their candidates. Training with all h logits might have selected another
            bank vector for them. An exhausted row stays exhausted.
    """

    num_subvectors: int
    num_vectors: int
    num_candidates: int
    exhausted: int


def stats(model: nn.Module, adapter_name: str | None = None) -> Stats:
    """Counts the exhausted rows of an adapter: sub-vectors that have used up their candidates. This waits for the device.

    Args:
        model: an injected model, or a :class:`VBLinear`.
        adapter_name: the adapter of an injected model; by default the active one.

    Returns:
        A tuple ``(num_subvectors, num_vectors, num_candidates, exhausted)``, with these names.

    Raises:
        ValueError: the model has no adapter, or several, or the adapter is deployed and has no logits.
    """
    adapter, logits = _trained_adapter(model, adapter_name)
    exhausted = 0 if adapter.exhausted is None else int(adapter.exhausted.sum())
    return Stats(adapter.num_subvectors, adapter.bank.num_vectors, logits.shape[1], exhausted)


@torch.no_grad()
def grow(model: nn.Module, num_candidates: int, *optimizers: Optimizer, adapter_name: str | None = None) -> None:
    """Adds candidates to each row of an adapter: the next largest of its initial logits.

    Without weight decay on the logits, and if no row is exhausted yet, training continues exactly as if the adapter had had this
    many candidates from the start.

    Args:
        model: an injected model, or a :class:`VBLinear`.
        num_candidates: the new M, above the current one and at most h.
        optimizers: the optimizers that train the logits. Their state changes in place. For the new logits it is that of logits
            which were never selected: zeros, with most optimizers.
        adapter_name: the adapter of an injected model; by default the active one.

    Raises:
        ValueError: the adapter has no candidates or no seed to draw more, FSDP2 has sharded it, ``num_candidates`` is out of
            range, the graph of an earlier forward still exists, or an optimizer's state differs between logits that were never
            selected. Nothing changes then.
    """
    adapter, logits = _trained_adapter(model, adapter_name)
    check_count("num_candidates", num_candidates)
    if adapter.candidates is None:
        raise ValueError("the adapter has no candidates: its rows already choose from the whole bank.")
    reshard(model)
    if is_sharded(logits):
        raise ValueError("the adapter is sharded. Save it, load it without sharding, and call vblora.grow there.")
    rows, columns = logits.shape
    if not columns < num_candidates <= adapter.bank.num_vectors:
        raise ValueError(
            f"`num_candidates` is {num_candidates}, but must be above the current {columns} and at most "
            f"`num_vectors`, {adapter.bank.num_vectors}."
        )
    drawn = adapter.initial(num_candidates)
    if drawn.candidates is None or not torch.equal(drawn.candidates[:, :columns], adapter.candidates):
        raise ValueError("the adapter's candidates are not those that its seed draws, so the next ones are unknown.")
    if _is_in_a_graph(logits):
        raise ValueError(
            "the graph of an earlier forward still refers to the current logits. Delete its outputs first: `del loss`."
        )

    def extended(tensor: Tensor, value: float = 0.0) -> Tensor:
        return torch.cat([tensor, tensor.new_full((rows, num_candidates - columns), value)], 1)

    states = [optimizer.state.get(logits, {}) for optimizer in optimizers]
    found = [
        (state, name, value)
        for state in states
        for name, value in state.items()
        if isinstance(value, Tensor) and value.shape == logits.shape
    ]
    for state, name, value in [
        (state, name, extended(value, _untrained(name, value, adapter))) for state, name, value in found
    ]:
        state[name] = value
    gradient, logits.grad = logits.grad, None  # a gradient must have the size of its parameter
    drawn.logits[:, :columns] = logits
    logits.data = drawn.logits
    logits.grad = None if gradient is None else extended(gradient)
    adapter.candidates = drawn.candidates
    adapter.invalidate()
    if adapted_models(model):
        config = attached_adapter(model, adapter_name).config
        assert isinstance(config, VBLoRAConfig)
        config.num_candidates = num_candidates


def _untrained(name: str, state: Tensor, adapter: VBLoRAAdapter) -> float:
    """What an optimizer's state is for logits that were never selected: zero, or the value that it starts with.

    Raises:
        ValueError: it is not the same for all of them.
    """
    last = state[:, -1] if adapter.exhausted is None else state[~adapter.exhausted, -1]
    if (last != last[:1]).any():
        raise ValueError(
            f"the optimizer's state `{name}` differs between logits that were never selected, so it is unknown for new ones. "
            "Finish the training with this number of candidates, or take AdamW or SGD without weight decay of the logits."
        )
    return last[0].item() if len(last) else 0.0


def moves_untouched(model: nn.Module, optimizer: Optimizer) -> str | None:
    """Why an optimizer changes logits that never had a gradient, so that training with candidates differs from dense training;
    None if it is not known to.

    Decoupled weight decay is harmless: it scales all logits by the same factor. Coupled decay is not: it enters the moments, so
    its effect depends on a logit's history.
    """
    adapters = [module for module in model.modules() if isinstance(module, VBLoRAAdapter)]
    logits = {adapter.logits for adapter in adapters if adapter.logits is not None}
    kinds = [kind.__name__ for kind in type(optimizer).__mro__]
    for group in optimizer.param_groups:
        if not logits.intersection(group["params"]):
            continue
        for kind in kinds:
            if kind in _NOT_ELEMENTWISE:
                return f"{kinds[0]} scales a logit's update by other logits."
        decay = group.get("weight_decay", 0)
        coupled = not group.get("decoupled_weight_decay", False) and any(kind in _COUPLED for kind in kinds)
        if decay and coupled and "AdamW" not in kinds:
            return f"{kinds[0]} adds `weight_decay`={decay} to the logits' gradients."
    return None


def _is_in_a_graph(parameter: Tensor) -> bool:
    """Whether a graph refers to the parameter. Only a graph keeps the parameter's node, which knows its shape, and the node's
    metadata alive."""

    def metadata() -> dict[str, Any]:  # torch declares it as a method
        return cast(dict[str, Any], get_gradient_edge(parameter).node.metadata)

    if not parameter.requires_grad:
        return False
    metadata()["vblora"] = True
    return "vblora" in metadata()


_COUPLED = frozenset({"Adadelta", "Adagrad", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "ASGD"})
_NOT_ELEMENTWISE = frozenset({"Adafactor", "LBFGS", "LAMB", "Lamb", "LARS", "Muon", "Shampoo", "SOAP"})


def _trained_adapter(model: nn.Module, adapter_name: str | None) -> tuple[VBLoRAAdapter, nn.Parameter]:
    """The VB-LoRA adapter of a model, and its logits."""
    if adapted_models(model):
        model = attached_adapter(model, adapter_name).adapter
    adapters = {module: None for module in model.modules() if isinstance(module, VBLoRAAdapter)}
    if len(adapters) != 1:
        raise ValueError(f"`model` has {len(adapters) or 'no'} VB-LoRA adapters. Pass a model with exactly one.")
    (adapter,) = adapters
    if adapter.logits is None:
        raise ValueError(
            "the adapter is deployed, so it has no logits and no candidates. Load one that was saved with the default form."
        )
    return adapter, adapter.logits
