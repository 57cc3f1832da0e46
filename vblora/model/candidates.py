"""Candidates while training: how many rows have used theirs up, and giving them more."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.optim import Optimizer

from ..adapters import VBLoRAAdapter
from ..checks import check_count
from ..distributed import is_sharded, reshard
from .record import adapted_models, attached_adapter


class Stats(NamedTuple):
    """Of one adapter.

    Attributes:
        num_subvectors: S, its rows.
        num_vectors: h.
        num_candidates: M, logits of a row; h where it is dense.
        exhausted: rows that may have parted from dense training: they have had so many candidates among their best that a
            bank vector which is none of them might have come next. Once counted, a row stays counted.
    """

    num_subvectors: int
    num_vectors: int
    num_candidates: int
    exhausted: int


def stats(model: nn.Module, adapter_name: str | None = None) -> Stats:
    """Counts the exhausted rows of an adapter, by default the active one. Waits for the device, which training itself never does.

    Raises:
        ValueError: the model has no adapter, several, or one without logits.
    """
    adapter = _trained_adapter(model, adapter_name)
    exhausted = 0 if adapter.exhausted is None else int(adapter.exhausted.sum())
    return Stats(adapter.num_subvectors, adapter.bank.num_vectors, adapter.logits.shape[1], exhausted)


@torch.no_grad()
def grow(model: nn.Module, num_candidates: int, *optimizers: Optimizer, adapter_name: str | None = None) -> None:
    """Gives each row of an adapter more candidates: the next best of its initial logits.

    Without weight decay on the logits, and with no row exhausted so far, training goes on exactly as it would have with so many
    candidates from the start: logits, gradients and optimizer state of the new ones are what they would be.

    Args:
        model: an injected model, or a :class:`VBLinear`.
        num_candidates: M from now on; more than now, at most h.
        optimizers: those that train the logits. What they keep per element of them is extended with zeros, in place.
        adapter_name: which adapter of an injected model, if not the one that is active.

    Raises:
        ValueError: it has no candidates or no seed to draw more by, FSDP2 has sharded it, ``num_candidates`` is out of range,
            or the loss of an earlier step is still there.
    """
    adapter = _trained_adapter(model, adapter_name)
    check_count("num_candidates", num_candidates)
    if adapter.candidates is None:
        raise ValueError("the adapter has no candidates: its rows choose from the whole bank already.")
    reshard(model)
    if is_sharded(adapter.logits):
        raise ValueError("the adapter is sharded. Save it, and let it grow where it is loaded before it is sharded.")
    rows, columns = adapter.logits.shape
    if not columns < num_candidates <= adapter.bank.num_vectors:
        raise ValueError(
            f"`num_candidates` is {num_candidates}, but must be more than the {columns} that there are, and at most "
            f"`num_vectors`, {adapter.bank.num_vectors}."
        )
    drawn = adapter.initial(num_candidates)
    if not torch.equal(drawn.candidates[:, :columns], adapter.candidates):
        raise ValueError("the adapter's candidates are not those that its seed draws, so the next best are not known.")

    if _is_in_a_graph(adapter.logits):
        raise ValueError(
            "the graph of an earlier forward still refers to the logits as they are. Let go of its outputs first: `del loss`."
        )

    def extended(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.new_zeros(rows, num_candidates - columns)], 1)

    for optimizer in optimizers:
        state = optimizer.state.get(adapter.logits, {})
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == adapter.logits.shape:
                state[name] = extended(value)
    gradient, adapter.logits.grad = adapter.logits.grad, None  # it has the old size while the new tensor goes in
    drawn.logits[:, :columns] = adapter.logits
    adapter.logits.data = drawn.logits
    adapter.logits.grad = None if gradient is None else extended(gradient)
    adapter.candidates = drawn.candidates
    adapter.invalidate()
    if adapted_models(model):
        attached_adapter(model, adapter_name).config.num_candidates = num_candidates


def moves_untouched(model: nn.Module, optimizer: Optimizer) -> str | None:
    """Why an optimizer moves logits that have no gradient and never had one, other than by a factor that all of them share;
    or None, if it does not, or is none that is known.

    Decoupled weight decay is such a factor. Coupled decay is not: it enters the moments, so a logit's history decides.
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
    """Whether some output's history leads to it: the node there, which knows its shape, is made anew where there is none."""
    if not parameter.requires_grad:
        return False
    get_gradient_edge(parameter).node.metadata["vblora"] = True
    return "vblora" in get_gradient_edge(parameter).node.metadata


_COUPLED = frozenset({"Adadelta", "Adagrad", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "ASGD"})
_NOT_ELEMENTWISE = frozenset({"Adafactor", "LBFGS", "LAMB", "Lamb", "LARS", "Muon", "Shampoo", "SOAP"})


def _trained_adapter(model: nn.Module, adapter_name: str | None) -> VBLoRAAdapter:
    if adapted_models(model):
        model = attached_adapter(model, adapter_name).adapter
    adapters = {module: None for module in model.modules() if isinstance(module, VBLoRAAdapter)}
    if len(adapters) != 1:
        raise ValueError(f"`model` has {len(adapters) or 'no'} VB-LoRA adapters; pass one that has one.")
    (adapter,) = adapters
    if adapter.logits is None:
        raise ValueError("the adapter is a deployed one, which has no logits and no candidates.")
    return adapter
