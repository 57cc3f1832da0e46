"""Batches whose rows use different adapters: the adapters of the rows, during one call of the model."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..adapters.base import Factors
from .kinds import Linear, compute_dtype

if TYPE_CHECKING:
    from .adapted import AdaptedLayer

# Per thread and asynchronous task, so that concurrent calls of one model can use different adapters.
_current: ContextVar[RowAdapters | None] = ContextVar("vblora_row_adapters", default=None)


class Stacked(NamedTuple):
    """The factors of several rows: A ``(n, r, in)``, B ``(n, r, out)``, and the indices of these rows; None means all rows."""

    A: Tensor
    B: Tensor
    rows: Tensor | None


class RowAdapters(ABC):
    """The adapters of a batch's rows.

    Args:
        names: the adapter of each row, or None for the base model's output.
        layers: the model's adapted layers, with their names.

    Attributes:
        repeats: how many times in a row a layer may get each row: 1, and in ``generate`` also the number of beams or sequences.
        outlasts_forwards: True if these adapters apply to all forwards within ``running``, False if to one forward only.
        outer: the adapters that were current when that forward began.
    """

    def __init__(self, names: Sequence[str | None], layers: dict[AdaptedLayer, list[str]]) -> None:
        self.names = tuple(names)
        self.layers = layers
        self.repeats: Collection[int] = (1,)
        self.outlasts_forwards = False
        self.outer: RowAdapters | None = None

    @abstractmethod
    def factors(self, layer: AdaptedLayer, name: str) -> Factors | None:
        """The factors of one adapter for a layer; None if the adapter does not target that layer."""

    @abstractmethod
    def stacked(self, layer: AdaptedLayer) -> Stacked | None:
        """The factors of all rows, with ``d`` and ``e`` multiplied in; None if no row has an update for the layer."""

    def add_to(self, layer: AdaptedLayer, y: Tensor, x: Tensor) -> Tensor:
        """Adds each row's update to the layer's output ``y`` for ``x``. Rows without an adapter keep the same bits."""
        repeat, rest = divmod(x.shape[0], len(self.names)) if x.dim() else (0, 1)
        if rest or repeat not in self.repeats:
            name = self.layers[layer][0]
            raise ValueError(
                f"`adapter_names` names {len(self.names)} rows, but layer `{name}` got an input of shape {tuple(x.shape)}, "
                "whose first dimension is not the rows. Rows cannot use different adapters there: run one adapter at a time."
            )
        dtype = compute_dtype(x.device, x.dtype if x.is_floating_point() else y.dtype)
        if issubclass(layer.kind, Linear) and x.is_floating_point():
            stacked = self.stacked(layer)
            return y if stacked is None else _add_products(y, x.to(dtype), stacked, len(self.names))
        names = [name for name in self.names for _ in range(repeat)]
        added = y.clone()
        for name in dict.fromkeys(name for name in names if name is not None):
            factors = self.factors(layer, name)
            if factors is not None:
                rows = torch.tensor([row for row, other in enumerate(names) if other == name], device=x.device)
                part = layer.kind.add_update(layer.base_layer, y[rows], x[rows], factors.to(x.device, dtype))
                added.index_copy_(0, rows, part)
        return added

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which layers use these adapters."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


def updated(layer: AdaptedLayer, y: Tensor, x: Tensor) -> Tensor:
    """Adds to the layer's output ``y`` for ``x`` the updates of its rows' adapters, or those of the applied adapters.

    In a graph this is one operator that looks up the adapters when it runs, so other names do not recompile. With gradients, the
    rows of a batch cannot use different adapters, and the graph contains the applied updates.
    """
    if torch.compiler.is_compiling():
        if torch.is_grad_enabled():
            return layer.add_applied(y, x)
        return torch.ops.vblora.add_row_updates(y, x, layer.key)
    batch = _current.get()
    return layer.add_applied(y, x) if batch is None or layer not in batch.layers else batch.add_to(layer, y, x)


_keys = itertools.count()
_layers: WeakValueDictionary[int, AdaptedLayer] = WeakValueDictionary()  # by key


def new_key(layer: AdaptedLayer) -> Tensor:
    """A key by which graphs refer to a layer: a tensor, because an integer would recompile the graph for each layer."""
    key = next(_keys)
    _layers[key] = layer
    return torch.tensor(key)


# A CUDA graph would replay the adapters of the batch that it was captured with.
@torch.library.custom_op("vblora::add_row_updates", mutates_args=(), tags=[torch.Tag.cudagraph_unsafe])
def _add_row_updates(y: Tensor, x: Tensor, key: Tensor) -> Tensor:
    added = updated(_layers[int(key)], y, x)
    return added.clone() if added is y else added


@_add_row_updates.register_fake
def _(y: Tensor, x: Tensor, key: Tensor) -> Tensor:
    return torch.empty_like(y)


def current() -> RowAdapters | None:
    """The adapters that :func:`set_current` set in this thread and asynchronous task."""
    return _current.get()


def set_current(rows: RowAdapters | None) -> None:
    _current.set(rows)


def _add_products(y: Tensor, x: Tensor, stacked: Stacked, count: int) -> Tensor:
    """Adds the updates of ``count`` rows to ``y``. Repetitions of a row, such as beams, count as further positions of it."""
    A, B = (factor.to(x.device, x.dtype) for factor in stacked[:2])
    rows = None if stacked.rows is None else stacked.rows.to(x.device)
    positions = math.prod(x.shape[:-1]) // count
    seen, added = x.reshape(count, positions, x.shape[-1]), y.reshape(count, positions, y.shape[-1])
    if rows is not None:
        seen = seen.index_select(0, rows)
    hidden = torch.bmm(seen, A.transpose(1, 2))
    if rows is None and (y.device, y.dtype) == (x.device, x.dtype):
        return torch.baddbmm(added, hidden, B).view(y.shape)
    update = torch.bmm(hidden, B).to(y.device, y.dtype)
    return (added + update if rows is None else added.index_add(0, rows.to(y.device), update)).view(y.shape)
