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
from . import updates
from .kinds import Linear, compute_dtype

if TYPE_CHECKING:
    from .adapted import AdaptedLayer

# Per thread and asynchronous task, so that concurrent calls of one model can use different adapters.
_current: ContextVar[RowAdapters | None] = ContextVar("vblora_row_adapters", default=None)


class Stacked(NamedTuple):
    """The factors of one layer for all rows, with ``d`` and ``e`` multiplied in.

    Attributes:
        A, B: ``(n, r, in)`` and ``(n, r, out)``, of n adapters.
        adapters: int64, the index of each row's adapter; -1 for none.
        adapted: the rows that have one; None if all do.
    """

    A: Tensor
    B: Tensor
    adapters: Tensor
    adapted: Tensor | None

    @classmethod
    def of(cls, A: Tensor, B: Tensor, adapters: Sequence[int]) -> Stacked:
        return cls(A, B, *index_tensors(adapters, A.device))

    def to(self, device: torch.device, dtype: torch.dtype) -> Stacked:
        if self.A.device == device and self.A.dtype == dtype:
            return self
        # Only the factors of these rows: there may be many more adapters.
        used = self.adapters.unique()
        used = used[used >= 0]
        A, B = (factor.index_select(0, used).to(device, dtype) for factor in (self.A, self.B))
        adapters = torch.where(self.adapters < 0, -1, torch.searchsorted(used, self.adapters))
        return Stacked(A, B, adapters.to(device), None if self.adapted is None else self.adapted.to(device))


def index_tensors(adapters: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The last two fields of :class:`Stacked`."""
    adapted = [row for row, adapter in enumerate(adapters) if adapter >= 0]
    all_rows = len(adapted) == len(adapters)
    return torch.tensor(adapters, device=device), None if all_rows else torch.tensor(adapted, device=device)


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
        self._stacked: dict[AdaptedLayer, Stacked | None] = {}

    @abstractmethod
    def factors(self, layer: AdaptedLayer, name: str) -> Factors | None:
        """The factors of one adapter for a layer; None if the adapter does not target that layer."""

    @abstractmethod
    def stacked(self, layer: AdaptedLayer) -> Stacked | None:
        """The factors of all rows; None if no row has an update for the layer. Asked for once."""

    def add_to(self, layer: AdaptedLayer, y: Tensor, x: Tensor, *, in_place: bool) -> Tensor:
        """Adds each row's update to the layer's output ``y`` for ``x``. Rows without an adapter keep the same bits.

        Args:
            in_place: whether nobody else has ``y``, and :func:`updates.is_plain`.
        """
        repeat, rest = divmod(x.size(0), len(self.names)) if x.dim() else (0, 1)
        if rest or repeat not in self.repeats:
            name = self.layers[layer][0]
            raise ValueError(
                f"`adapter_names` names {len(self.names)} rows, but layer `{name}` got an input of shape {tuple(x.shape)}, "
                "whose first dimension is not the rows. Rows cannot use different adapters there: run one adapter at a time."
            )
        if issubclass(layer.kind, Linear) and x.is_floating_point():
            return self._add_products(layer, y, x, in_place)
        dtype = compute_dtype(x.device, x.dtype if x.is_floating_point() else y.dtype)
        names = [name for name in self.names for _ in range(repeat)]
        added = y.clone()
        for name in dict.fromkeys(name for name in names if name is not None):
            factors = self.factors(layer, name)
            if factors is not None:
                rows = torch.tensor([row for row, other in enumerate(names) if other == name], device=x.device)
                part = layer.kind.add_update(layer.base_layer, y[rows], x[rows], factors.to(x.device, dtype))
                added.index_copy_(0, rows, part)
        return added

    def _add_products(self, layer: AdaptedLayer, y: Tensor, x: Tensor, in_place: bool) -> Tensor:
        """:meth:`add_to` for a linear layer. Repetitions of a row, such as beams, count as further positions of it."""
        try:
            stacked = self._stacked[layer]
        except KeyError:
            stacked = self._stacked[layer] = self.stacked(layer)
        if stacked is None:
            return y
        if stacked.A.dtype != y.dtype or stacked.A.device != y.device:
            stacked = self._stacked[layer] = stacked.to(y.device, y.dtype)
        if (in_place or updates.is_plain()) and updates.can_add(y, x, stacked.A):
            return updates.added(y, x, stacked.A, stacked.B, stacked.adapters, in_place=in_place)
        return _add_batched_products(y, x.to(y.device, y.dtype), stacked)

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which layers use these adapters."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


def updated(layer: AdaptedLayer, y: Tensor, x: Tensor, *, in_place: bool = False) -> Tensor:
    """Adds to the layer's output ``y`` for ``x`` the updates of its rows' adapters, or those of the applied adapters.

    In a graph this is one operator that looks up the adapters when it runs, so other names do not recompile. With gradients, the
    rows of a batch cannot use different adapters, and the graph contains the applied updates.

    Args:
        in_place: as for :meth:`RowAdapters.add_to`.
    """
    if torch.compiler.is_compiling():
        if torch.is_grad_enabled():
            return layer.add_applied(y, x)
        return torch.ops.vblora.add_row_updates(y, x, layer.key)
    batch = _current.get()
    if batch is None or not layer.enabled or layer not in batch.layers:
        return layer.add_applied(y, x, in_place=in_place)
    return batch.add_to(layer, y, x, in_place=in_place)


_keys = itertools.count()
_layers: WeakValueDictionary[int, AdaptedLayer] = WeakValueDictionary()  # by key


def new_key(layer: AdaptedLayer) -> Tensor:
    """A key by which graphs refer to a layer: a tensor, because an integer would recompile the graph for each layer."""
    key = next(_keys)
    _layers[key] = layer
    return torch.tensor(key, device="cpu")  # whatever the default device: each call reads it


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


def _add_batched_products(y: Tensor, x: Tensor, stacked: Stacked) -> Tensor:
    A, B, adapters, rows = stacked
    positions = math.prod(x.shape[:-1]) // len(adapters)
    seen, added = x.reshape(len(adapters), positions, x.shape[-1]), y.reshape(len(adapters), positions, y.shape[-1])
    if rows is not None:
        seen, adapters = seen.index_select(0, rows), adapters.index_select(0, rows)
    hidden = torch.bmm(seen, A.index_select(0, adapters).transpose(1, 2))
    B = B.index_select(0, adapters)
    if rows is None:
        return torch.baddbmm(added, hidden, B).view(y.shape)
    return added.index_add(0, rows, torch.bmm(hidden, B)).view(y.shape)
