"""Batches whose rows have adapters of their own: which ones, for as long as one call of the model runs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..adapters.base import Factors
from .kinds import Linear, compute_dtype

if TYPE_CHECKING:
    from .adapted import AdaptedLayer

# Of this thread and this asynchronous task alone, so that calls with different adapters can run on one model at a time.
_current: ContextVar[RowAdapters | None] = ContextVar("vblora_row_adapters", default=None)


class Stacked(NamedTuple):
    """Factors of several rows: A ``(n, r, in)`` and B ``(n, r, out)``, and which rows these are; None: all."""

    A: Tensor
    B: Tensor
    rows: Tensor | None


class RowAdapters(ABC):
    """The adapters of a batch's rows.

    Args:
        names: of each row its adapter, or None for the base model's output.
        layers: the model's adapted layers, with their names.

    Attributes:
        repeats: how often a layer may see each row in sequence: 1, and in ``generate`` also the number of beams or of sequences.
        outlasts_forwards: whether these are the adapters of all forwards within ``running``, or of one forward.
        outer: what was current when that forward began.
    """

    def __init__(self, names: Sequence[str | None], layers: dict[AdaptedLayer, list[str]]) -> None:
        self.names = tuple(names)
        self.layers = layers
        self.repeats: Collection[int] = (1,)
        self.outlasts_forwards = False
        self.outer: RowAdapters | None = None

    @abstractmethod
    def factors(self, layer: AdaptedLayer, name: str) -> Factors | None:
        """One adapter's factors of a layer; None if it does not have that layer."""

    @abstractmethod
    def stacked(self, layer: AdaptedLayer) -> Stacked | None:
        """The factors of all rows, with ``d`` and ``e`` in them; None if no row has an update there."""

    def add_to(self, layer: AdaptedLayer, y: Tensor, x: Tensor) -> Tensor:
        """A layer's output ``y`` for ``x``, with each row's own update. Rows without an adapter keep their very bits."""
        repeat, rest = divmod(x.shape[0], len(self.names)) if x.dim() else (0, 1)
        if rest or repeat not in self.repeats:
            name = self.layers[layer][0]
            raise ValueError(
                f"`adapter_names` names {len(self.names)} rows, but layer `{name}` got an input of shape {tuple(x.shape)}, "
                "whose first dimension does not count rows. Rows cannot have adapters of their own there: run one at a time."
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
        """Within it, layers use these adapters."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


def current() -> RowAdapters | None:
    """What :func:`set_current` set in this thread and asynchronous task."""
    return _current.get()


def set_current(rows: RowAdapters | None) -> None:
    _current.set(rows)


def _add_products(y: Tensor, x: Tensor, stacked: Stacked, count: int) -> Tensor:
    """``y`` with the updates of ``count`` rows. What repeats a row, such as beams, counts as more positions of it."""
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
