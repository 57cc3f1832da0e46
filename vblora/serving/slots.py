"""Composed adapters in slots of a fixed size: the warm tier of a store."""

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import streams
from ..adapters import Factors, Target
from ..adapters.vblora import scaled
from ..layers.adapted import AdaptedLayer
from ..layers.rows import RowAdapters, Stacked, index_tensors
from .packed import Layout, PackedAdapter, PackedVBLoRA


class _Place(NamedTuple):
    """Where the factors of a layer start within a slot."""

    A: int
    B: int
    target: Target


class Slots:
    """An arena ``(slots, elements)`` that holds, for each layer in turn, A ``(rank, in)`` and B ``(rank, out)``.

    The sub-vectors of a VB-LoRA adapter have the same order, so an adapter of the slots' rank that adapts all layers is
    composed in one call. Other adapters are copied factor by factor; zeros fill up smaller ranks.
    """

    def __init__(
        self, count: int, targets: Sequence[Target], rank: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.rank = rank
        self.targets = tuple(targets)
        widths = [width for target in targets for width in (target.in_features, target.out_features)]
        starts = [0, *itertools.accumulate(rank * width for width in widths)]
        self.places = {
            target.name: _Place(A, B, target) for target, A, B in zip(targets, starts[:-1:2], starts[1::2], strict=True)
        }
        self.arena = torch.zeros(count, starts[-1], device=device, dtype=dtype)
        self._note_new()

    def _note_new(self) -> None:
        self._readers: set[torch.cuda.Stream] = set()
        self._writer = streams.current(self.arena.device)
        self._written = None if self._writer is None else self._writer.record_event()

    def read_here(self) -> None:
        """Has the current stream wait until the slots are filled, and later fills wait for what it reads."""
        stream = streams.current(self.arena.device)
        if stream is not None and self._written is not None:
            self._readers.add(stream)
            if stream != self._writer:
                stream.wait_event(self._written)

    @torch.no_grad()
    def fill(self, adapters: dict[int, PackedAdapter]) -> None:
        """Composes adapters into slots, with one call for all adapters that share a bank and a layout.

        A batch whose forward has returned may still run on another CUDA stream, and read the slots that it had. So the current
        stream waits for all that have read slots.
        """
        stream = streams.current(self.arena.device)
        if stream is None:
            self._compose(adapters)
            return
        self.read_here()
        for reader in self._readers - {stream}:
            stream.wait_event(reader.record_event())
        try:
            self._compose(adapters)
        finally:
            self._writer, self._written = stream, stream.record_event()

    def _compose(self, adapters: dict[int, PackedAdapter]) -> None:
        together: dict[tuple[Layout, int], dict[int, PackedVBLoRA]] = {}
        for slot, adapter in adapters.items():
            if isinstance(adapter, PackedVBLoRA) and self._is_in_order(adapter.layout):
                together.setdefault((adapter.layout, id(adapter.bank)), {})[slot] = adapter
            else:
                self._place(slot, adapter)
        for (layout, _), group in together.items():
            rows = [adapter.deployed() for adapter in group.values()]
            bank = scaled(next(iter(group.values())).bank, layout.config.scaling)
            indices, weights = (torch.cat(parts).to(bank.device) for parts in zip(*rows, strict=True))
            composed = torch.ops.vblora.compose(bank, indices, weights, self.arena.dtype)
            slots = torch.tensor(list(group), device=self.arena.device)
            self.arena.index_copy_(0, slots, composed.view(len(group), -1))

    def _is_in_order(self, layout: Layout) -> bool:
        b = layout.config.vector_length
        return (
            layout.config.r == self.rank
            and layout.targets == self.targets
            and all(t.in_features % b == 0 and t.out_features % b == 0 for t in self.targets)
        )

    def _place(self, slot: int, adapter: PackedAdapter) -> None:
        row = torch.zeros_like(self.arena[slot])  # the slot does not change if this fails
        for target, factors in adapter.factors(torch.float32):
            place = self.places[target.name]
            for start, factor in ((place.A, factors.A), (place.B, factors.B)):
                row[start : start + factor.numel()] = factor.reshape(-1)
        self.arena[slot] = row

    def copy_of(self, slots: Sequence[int | None]) -> "Slots":
        """Slots of their own with the same contents; None is an empty one."""
        self.read_here()
        copied = copy.copy(self)
        copied.arena = torch.zeros(len(slots), self.arena.shape[1], device=self.arena.device, dtype=self.arena.dtype)
        copied._note_new()
        for place, slot in enumerate(slots):
            if slot is not None:
                copied.arena[place] = self.arena[slot]
        return copied


class SlotRows(RowAdapters):
    """Rows that use adapters of a store.

    Args:
        slots: where the adapters are. Those of ``used`` do not change while these rows exist.
        used: the slot of each adapter by its name.
    """

    def __init__(
        self,
        names: Sequence[str | None],
        layers: dict[AdaptedLayer, list[str]],
        slots: Slots,
        used: Mapping[str, int],
    ) -> None:
        super().__init__(names, layers)
        self.slots = slots
        self.used = dict(used)
        indices = [-1 if name is None else used[name] for name in names]
        self._indices = index_tensors(indices, slots.arena.device)
        slots.read_here()

    def factors(self, layer: AdaptedLayer, name: str) -> Factors | None:
        A, B = self._factors_of_all(layer)
        return Factors(A[self.used[name]], B[self.used[name]])

    def stacked(self, layer: AdaptedLayer) -> Stacked | None:
        return Stacked(*self._factors_of_all(layer), *self._indices) if self.used else None

    def _factors_of_all(self, layer: AdaptedLayer) -> tuple[Tensor, Tensor]:
        A, B, target = self.slots.places[self.layers[layer][0]]
        return self._view(A, target.in_features), self._view(B, target.out_features)

    def _view(self, start: int, width: int) -> Tensor:
        rank = self.slots.rank
        return self.slots.arena.narrow(1, start, rank * width).unflatten(1, (rank, width))
