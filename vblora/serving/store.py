"""The adapter store: reads adapters on demand, keeps them packed, and composes those that run into slots."""

import copy
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from ..bank import VectorBank
from ..checkpoint.folder import folder_in
from ..checks import check_count
from ..config import LoraConfig
from ..layers.weights import is_packed
from ..model.inject import wrap_for_store
from .metrics import Metrics, prometheus, timed
from .packed import PackedAdapter, Reader
from .slots import SlotRows, Slots

Source = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | Callable[[str], str | os.PathLike[str]]
BankPath = VectorBank | str | os.PathLike[str]


class AdapterStore:
    """Serves thousands of adapters with one model. Each row of a batch can use a different adapter::

        store = AdapterStore(model, "adapters/", bank="bank.safetensors")
        model.generate(**batch, adapter_names=["user-17", "user-4", None])

    The store reads an adapter when a batch first names it, and keeps it packed in the cold tier: ⌈log₂ h⌉ bits per index and
    k - 1 weights of 16 bits per sub-vector for VB-LoRA. A bank is checked and held once for all adapters that use it. The
    adapters of a batch are composed into slots, the warm tier. When a tier is full, the least recently used adapter leaves it.

    Adapters can use any method and any format that :func:`vblora.load` reads, with different ranks and layers. They run in
    inference only. Several threads can use the store and its model at the same time.

    Args:
        model: the base model. The store wraps its target layers and freezes all its parameters, until :meth:`detach`.
        source: where the adapters are: a directory with one folder per adapter, a mapping from names to folders, or a function
            that takes a name and returns its folder. The function may download the folder first; it raises ``KeyError`` for an
            unknown name.
        bank: the vector bank or its file, or a list of them. Adapter folders without a bank refer to one of them by the SHA-256
            of its file.
        target_modules, exclude_modules: the layers that adapters may adapt, as in :class:`vblora.LoraConfig`. An adapter may
            adapt fewer.
        max_rank: the rank r of a slot. An adapter of a larger rank is refused. One of a smaller rank takes as much time and
            memory as one of this rank.
        slots: the number of warm adapters, which is also how many different adapters one batch can name.
        capacity_bytes: the most bytes that packed adapters may take, without what they share. At least one adapter stays.
        exact: keep all k weights in float32. By default, weights are rounded to steps of 2^-17.
        dtype: the dtype of the slots; by default that of the target layers' weights.

    Raises:
        ValueError: an argument is out of range, the model has adapters, or no layer matches. Nothing is changed.
        TypeError: a layer that matches cannot be adapted. Nothing is changed.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        *,
        bank: BankPath | Sequence[BankPath] = (),
        target_modules: list[str] | str | None = "all-linear",
        exclude_modules: list[str] | str | None = None,
        max_rank: int = 4,
        slots: int = 16,
        capacity_bytes: int = 2**30,
        exact: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("max_rank", max_rank), ("slots", slots), ("capacity_bytes", capacity_bytes)):
            check_count(name, value)
        self._source = Path(source) if isinstance(source, (str, os.PathLike)) else source
        if isinstance(self._source, Path) and not self._source.is_dir():
            raise ValueError(f"`source` is {str(source)!r}, which is not a directory.")
        given = [bank] if isinstance(bank, (VectorBank, str, os.PathLike)) else list(bank)
        # Copies, because other models may train the banks meanwhile.
        banks = [copy.deepcopy(one) if isinstance(one, VectorBank) else VectorBank.from_file(one) for one in given]
        self.capacity_bytes = capacity_bytes
        config = LoraConfig(r=max_rank, target_modules=target_modules, exclude_modules=exclude_modules)
        self._record, targets = wrap_for_store(model, config)
        try:
            weights = [layer.weight for layer in self._record.layers]
            dtypes = [weight.dtype for weight in weights if not is_packed(weight)] or [torch.get_default_dtype()]
            device = weights[0].device
            self._slots = Slots(slots, targets, max_rank, device, dtype or reduce(torch.promote_types, dtypes))
            self._reader = Reader(model, {t.name: t for t in targets}, banks, max_rank, device, exact)
        except BaseException:
            self._record.take_out()
            raise
        # Guards all attributes below. Files are read without it, under the lock of their adapter.
        self._lock = threading.RLock()
        self._loading: dict[str, threading.Lock] = {}
        self._cold: OrderedDict[str, PackedAdapter] = OrderedDict()  # the most recently used last
        self._cold_bytes = 0
        self._warm: OrderedDict[str, int] = OrderedDict()  # slots
        self._free = list(range(slots))
        self._pinned: set[str] = set()
        self._discards = 0
        self._running: weakref.WeakSet[SlotRows] = weakref.WeakSet()  # their slots must not change
        self._metrics = Metrics()
        self._record.row_source = self._rows

    def names(self) -> list[str]:
        """The names of the source's adapters; if the source is a function, of the adapters in memory."""
        if isinstance(self._source, Path):
            return sorted(path.parent.name for path in self._source.glob("*/adapter_config.json"))
        with self._lock:
            return sorted(self._source) if isinstance(self._source, Mapping) else sorted(self._cold)

    def prefetch(self, names: Iterable[str]) -> None:
        """Reads adapters into the cold tier, so that no request waits for their files.

        Raises:
            ValueError: an adapter is unknown, damaged, or does not fit the model. All others are read.
        """
        faults = []
        for name in names:
            try:
                self._packed(name)
            except ValueError as error:
                faults.append(error)
        if faults:
            more = f" ({len(faults) - 1} more adapters are refused.)" if len(faults) > 1 else ""
            raise ValueError(f"{faults[0]}{more}") from faults[0]

    def pin(self, names: str | Sequence[str]) -> None:
        """Keeps adapters in their slots until they are unpinned. If running batches use all slots, an adapter gets its slot with
        the next batch that names it.

        Raises:
            ValueError: as :meth:`prefetch`, or no slot would be left for other adapters. Nothing is pinned then.
        """
        wanted = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        with self._admitted(wanted):
            pinned = self._pinned | set(wanted)
            if len(pinned) == len(self._slots.arena):
                raise ValueError(
                    f"{len(pinned)} pinned adapters would leave no slot for others. Give the store more `slots`."
                )
            self._pinned = pinned

    def unpin(self, names: str | Sequence[str]) -> None:
        """Allows adapters to leave their slots again."""
        with self._lock:
            self._pinned -= {names} if isinstance(names, str) else set(names)

    def discard(self, name: str) -> None:
        """Removes an adapter from memory. The next batch that names it reads it again. Call this after its folder has changed."""
        with self._lock:
            self._discards += 1
            self._pinned.discard(name)
            self._drop_cold(name)
            if name in self._warm:
                self._free.append(self._warm.pop(name))

    def detach(self) -> None:
        """Removes the store from its model, and restores the model."""
        if self._record.row_source is not None:
            self._record.take_out()

    def stats(self) -> dict[str, float | dict[str, float]]:
        """Adapters and bytes per tier, hits, misses, evictions and refusals, and load and compose times in seconds (p50, p99)."""
        with self._lock:
            metrics, counts = self._metrics, self._metrics.counts
            return {
                "adapters": {"cold": len(self._cold), "warm": len(self._warm), "pinned": len(self._pinned)},
                "bytes": {
                    "cold": self._cold_bytes,
                    "shared": self._reader.shared_bytes,
                    "warm": self._slots.arena.nbytes,
                },
                "hits_total": {"cold": counts["cold hits"], "warm": counts["warm hits"]},
                "misses_total": {"cold": counts["cold misses"], "warm": counts["warm misses"]},
                "evictions_total": {"cold": counts["cold evictions"], "warm": counts["warm evictions"]},
                "refusals_total": counts["refusals"],
                "load_seconds": metrics.percentiles("load"),
                "compose_seconds": metrics.percentiles("compose"),
            }

    def prometheus(self) -> str:
        """:meth:`stats` in the text format of Prometheus."""
        return prometheus(self.stats())

    def _rows(self, names: Sequence[str | None]) -> SlotRows:
        """The adapters of a batch's rows, after composing those that have no slot yet."""
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        with self._admitted(wanted) as (slots, used):
            rows = SlotRows(names, self._record.names, slots, used)
            self._running.add(rows)
            return rows

    @contextmanager
    def _admitted(self, wanted: list[str]) -> Iterator[tuple[Slots, dict[str, int]]]:
        """A context in which all ``wanted`` adapters have slots: which, by name. It holds the lock, so no other thread evicts
        them."""
        packed: dict[str, PackedAdapter] = {}
        discards = self._discards
        while True:
            with self._lock:
                if discards != self._discards:  # one of `packed` may be what its folder held before
                    packed, discards = {}, self._discards
                room = len(self._slots.arena) - len(self._pinned - set(wanted))
                if len(wanted) > room:
                    raise ValueError(
                        f"the batch names {len(wanted)} adapters, but only {room} of the store's slots can hold them. "
                        "Give the store more `slots`, unpin adapters, or make the batch smaller."
                    )
                cold = [name for name in wanted if name not in self._warm]
                if packed.keys() >= set(cold):
                    yield self._fill_slots(wanted, {name: packed[name] for name in cold})
                    return
            for name in cold:  # without the lock: files are read
                packed[name] = self._packed(name)

    def _fill_slots(self, wanted: list[str], cold: dict[str, PackedAdapter]) -> tuple[Slots, dict[str, int]]:
        """Composes the ``cold`` ones of the ``wanted`` adapters, in slots of the store if running batches leave enough."""
        counts = self._metrics.counts
        counts["warm hits"] += len(wanted) - len(cold)
        counts["warm misses"] += len(cold)
        if not self._make_room(wanted, len(cold)):
            slots = self._slots.copy_of([self._warm.get(name) for name in wanted])
            places = {name: place for place, name in enumerate(wanted)}
            self._compose(slots, {places[name]: adapter for name, adapter in cold.items()})
            return slots, places
        fresh = dict(zip(cold, self._unused(), strict=False))
        self._compose(self._slots, {fresh[name]: adapter for name, adapter in cold.items()})
        self._free = [slot for slot in self._free if slot not in fresh.values()]
        self._warm |= fresh
        for name in wanted:
            self._warm.move_to_end(name)
        return self._slots, {name: self._warm[name] for name in wanted}

    def _make_room(self, wanted: list[str], count: int) -> bool:
        """Has the least recently used adapters leave until ``count`` slots are free. False: running batches use too many."""
        missing = count - len(self._unused())
        running = self._in_use()
        evictable = [
            name
            for name, slot in self._warm.items()
            if name not in self._pinned and name not in wanted and slot not in running
        ]
        if missing > len(evictable):
            return False
        for name in evictable[: max(missing, 0)]:
            self._free.append(self._warm.pop(name))
            self._metrics.counts["warm evictions"] += 1
        return True

    def _unused(self) -> list[int]:
        running = self._in_use()
        return [slot for slot in self._free if slot not in running]

    def _in_use(self) -> set[int]:
        """The slots of batches that run."""
        return {slot for rows in self._running if rows.slots is self._slots for slot in rows.used.values()}

    def _compose(self, slots: Slots, adapters: dict[int, PackedAdapter]) -> None:
        if adapters:
            with timed() as timer:
                slots.fill(adapters)
            self._metrics.note_duration("compose", timer.seconds / len(adapters))

    def _packed(self, name: str) -> PackedAdapter:
        """An adapter of the cold tier. One thread reads it if it is not there; others that ask for it wait."""
        with self._lock:
            if name in self._cold:
                self._metrics.counts["cold hits"] += 1
                self._cold.move_to_end(name)
                return self._cold[name]
            own = self._loading.setdefault(name, threading.Lock())
        with own:
            with self._lock:
                if name in self._cold:
                    return self._cold[name]
                self._metrics.counts["cold misses"] += 1
                discards = self._discards
            try:
                with timed() as timer:
                    adapter = self._read(name)
            except BaseException:
                with self._lock:
                    self._metrics.counts["refusals"] += 1
                    self._loading.pop(name, None)
                raise
            with self._lock:
                self._metrics.note_duration("load", timer.seconds)
                self._loading.pop(name, None)
                if discards != self._discards:  # its folder may have changed while it was read
                    return adapter
                self._drop_cold(name)  # another thread can have read it, if it was evicted between their turns
                self._cold[name] = adapter
                self._cold_bytes += adapter.nbytes
                while self._cold_bytes > self.capacity_bytes and len(self._cold) > 1:
                    self._drop_cold(next(iter(self._cold)))
                    self._metrics.counts["cold evictions"] += 1
            return adapter

    def _drop_cold(self, name: str) -> None:
        adapter = self._cold.pop(name, None)
        self._cold_bytes -= 0 if adapter is None else adapter.nbytes

    def _read(self, name: str) -> PackedAdapter:
        try:
            return self._reader.read(self._locate(name))
        except (ValueError, OSError) as error:
            raise ValueError(f"adapter {name!r} cannot be used: {error}") from error

    def _locate(self, name: str) -> Path:
        if not isinstance(self._source, Path):
            try:
                return Path(self._source[name] if isinstance(self._source, Mapping) else self._source(name))
            except KeyError:
                self._refuse_unknown(name)
        folder = folder_in(self._source, name)
        if folder is None:
            self._refuse_unknown(name)
        return folder

    def _refuse_unknown(self, name: str) -> NoReturn:
        raise ValueError(f"`source` has no adapter {name!r}.")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a vblora.serving.AdapterStore and its model cannot be copied or pickled. Call `detach` first.")
