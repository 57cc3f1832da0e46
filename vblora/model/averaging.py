"""Keeps ``torch.optim.swa_utils.AveragedModel`` from averaging tensors that do not belong together."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..adapters import Adapter
from .lookup import adapted_models

_EXHAUSTED = "exhausted"  # flags that training sets, which the average takes from the model

_update = AveragedModel.update_parameters


@wraps(_update)
def _update_parameters(average: AveragedModel, model: nn.Module) -> None:
    """``update_parameters``, which pairs the two models' tensors by their order.

    Raises:
        ValueError: an adapter is active in only one of them, and they take turns with the same tensor of the model; or the logits
            of an adapter choose other bank vectors in one than in the other.
    """
    ours, theirs = _owners(average.module), _owners(model)
    for place in ours | theirs:
        if (own := ours.get(place)) != (given := theirs.get(place)):
            raise ValueError(
                f"`{place}` is {_whose(given)} in `model`, but {_whose(own)} in the average, so they cannot be averaged. "
                "Call vblora.set_adapter(averaged.module, name) with the name of the adapter that is active in `model`."
            )
    pairs = list(zip(_adapters(average.module), _adapters(model), strict=False))
    for averaged, other in pairs:
        for name, indices in _integers(averaged).items():
            buffer = other._buffers.get(name)
            if name != _EXHAUSTED and buffer is not None and not _equal(indices, buffer):
                raise ValueError(
                    f"the adapters' `{name}` differ: their rows choose from other bank vectors in `model` than in the average, "
                    "so they cannot be averaged. Inject both models with the same `seed`."
                )
    with _without_integers([adapter for pair in pairs for adapter in pair]):
        _update(average, model)
    for averaged, other in pairs:
        flags = averaged._buffers.get(_EXHAUSTED), other._buffers.get(_EXHAUSTED)
        if flags[0] is not None and flags[1] is not None:
            flags[0].copy_(flags[1])


AveragedModel.update_parameters = _update_parameters  # type: ignore[assignment, method-assign]


def _owners(model: nn.Module) -> dict[str, str]:
    """The adapters whose extra tensors are in a model now, by the tensors' names."""
    return {
        name: attached.name
        for record in adapted_models(model)
        for attached in record.adapters.values()
        for name, extra in attached.extra.items()
        if extra.swapped_in
    }


def _whose(adapter: str | None) -> str:
    return "the base model's" if adapter is None else f"adapter {adapter!r}'s"


def _adapters(model: nn.Module) -> list[Adapter]:
    return [module for module in model.modules() if isinstance(module, Adapter)]


def _integers(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's indices and flags, of which there is no average."""
    return {name: t for name, t in adapter._buffers.items() if t is not None and not t.is_floating_point()}


def _equal(own: Tensor, given: Tensor) -> bool:
    """Whether both hold the same, as far as that is to be checked here: torch refuses other shapes itself."""
    return own.shape != given.shape or own.is_meta or torch.equal(own, given.to(own.device))


@contextmanager
def _without_integers(adapters: Sequence[Adapter]) -> Iterator[None]:
    """Within it, these adapters do not list them among their buffers, which ``use_buffers=True`` averages, too."""
    taken = [(adapter, _integers(adapter)) for adapter in adapters]
    for adapter, integers in taken:
        for name in integers:
            del adapter._buffers[name]
    try:
        yield
    finally:
        for adapter, integers in taken:
            adapter._buffers.update(integers)
