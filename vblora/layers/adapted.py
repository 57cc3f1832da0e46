"""Where factors meet a frozen layer."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import Slot
from . import rows
from .kinds import compute_dtype, kind_of
from .weights import Rounding, exchange, format_of, is_packed, rounding


class Replaced:
    """A tensor of the base model, and a trained or merged one that stands in for it while the two are swapped."""

    def __init__(self, module: nn.Module, name: str, stand_in: Tensor) -> None:
        self.module = module
        self.name = name
        self.in_place = False  # of the stand-in
        self._aside = stand_in

    @property
    def stand_in(self) -> Tensor:
        return getattr(self.module, self.name) if self.in_place else self._aside

    @torch.no_grad()
    def swap(self) -> None:
        """Puts the one that stands aside in place, moved and cast to where the model went meanwhile, and that one aside."""
        self._aside = exchange(self.module, self.name, self._aside)
        self.in_place = not self.in_place


class Update(NamedTuple):
    """What one adapter adds to a layer: its factors' slot, and the probability of dropping an element of their input."""

    slot: Slot
    dropout: float


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class AdaptedLayer(nn.Module):
    """A frozen layer with low-rank updates: ``y = base_layer(x) + Σ dropout(x) Aᵀ B`` over its active adapters.

    Args:
        base_layer: a layer of one of the kinds in ``bases.py``.

    Attributes:
        updates: of each adapter that has this layer for a target, by the adapter's name.
        running: those of them that a forward adds: active, enabled, not merged.
        active: names of the active adapters that have this layer.
        enabled: False leaves all updates out.
        merged: names of the adapters whose updates are in ``base_layer.weight`` (see :func:`vblora.merge`).
        unmerged: the weight without and with those, unless the former was released.
        rounding: what was lost as a merged weight was quantised again; None if none was.
        rows_differ: whether a call may give each row of its batch an adapter of its own.
        key: what graphs know the layer by once that is so.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.kind = kind_of(base_layer)
        self.packed = is_packed(base_layer.weight)
        self.updates: dict[str, Update] = {}
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.merged: tuple[str, ...] = ()
        self.unmerged: Replaced | None = None
        self.rounding: Rounding | None = None
        self.running: dict[str, Update] = {}
        self.rows_differ = False
        self.train(base_layer.training)

    def set(self, *, active: Iterable[str] | None = None, enabled: bool | None = None) -> None:
        """Changes which updates a forward adds. Names of adapters that do not have this layer are passed over."""
        own = vars(self)  # set_adapter does this for each layer, and Module.__setattr__ takes most of its time
        if active is not None:
            own["active"] = tuple([name for name in active if name in self.updates])
        if enabled is not None:
            own["enabled"] = enabled
        running = [name for name in self.active if self.enabled and name not in self.merged]
        own["running"] = {name: self.updates[name] for name in running}

    def let_rows_differ(self) -> None:
        """Lets a call give each row of its batch an adapter of its own."""
        self.rows_differ = True
        self.key = rows.new_key(self)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self.rows_differ:
            self.let_rows_differ()  # a copy has a key of its own

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("weight", "bias"):
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def in_features(self) -> int:
        return self.kind.widths(self.base_layer)[0]

    @property
    def out_features(self) -> int:
        return self.kind.widths(self.base_layer)[1]

    def __call__(self, *args, **kwargs) -> Tensor:
        # A layer that adds nothing, as one that was merged, costs nothing either: Module's own way to the base layer takes as
        # long as a tenth of a small layer. Whoever looks on (hooks, accelerate's own forward) sees this layer called.
        own = self.__dict__
        if own["running"] or own["rows_differ"] or "forward" in own or any(map(own.__getitem__, _HOOKS)):
            return super().__call__(*args, **kwargs)
        return own["_modules"]["base_layer"](*args, **kwargs)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        return rows.updated(self, y, x) if self.rows_differ else self.add_running(y, x)

    def add_running(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output for ``x``, ``y`` so far, with the updates of all adapters that run."""
        for slot, dropout in self.running.values():
            dtype = compute_dtype(x.device, x.dtype if x.is_floating_point() else y.dtype)
            factors = slot.factors(dtype).to(x.device, dtype)
            seen = F.dropout(x, dropout, self.training) if dropout and x.is_floating_point() else x
            y = self.kind.add_update(self.base_layer, y, seen, factors)
        return y

    @torch.no_grad()
    def delta_weight(self, names: Iterable[str]) -> Tensor:
        """The sum of some adapters' updates as a matrix, laid out as ``base_layer.weight`` is, in at least float32."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        total = None
        for name in names:
            slot = self.updates[name].slot
            # From the parameters as they are, not from a forward's factors.
            A, B, *_ = slot.adapter.factors_of(slot.index, dtype).folded()
            delta = self.kind.delta(self.base_layer, A, B)
            total = delta if total is None else total.add_(delta)
        return total.to(self.weight.device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def merged_weight(self, names: Iterable[str]) -> Tensor:
        """The weight with the updates of ``names`` and of those merged before in it, rounded once to its dtype. Not quantised."""
        if self.unmerged is None:
            stored = format_of(self.weight)
            return self.delta_weight(names).add_(stored.read(self.base_layer)).to(stored.dtype(self.base_layer))
        self.unmerged.swap()
        unmerged, self.unmerged = self.unmerged, None
        try:
            return self.merged_weight((*self.merged, *names))
        finally:
            self.unmerged = unmerged
            self.unmerged.swap()

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, names: Iterable[str], release: bool) -> None:
        """Puts updates into a new weight; the old one is kept for :meth:`unmerge`, or released."""
        names = tuple(names)
        weight = self.merged_weight(names)
        if self.unmerged is not None:
            self.unmerged.swap()
        stored = format_of(self.weight)
        merged = stored.stored(self.base_layer, weight)
        self.rounding = None if stored.exact else rounding(self.base_layer, weight, merged)
        replaced = Replaced(self.base_layer, "weight", merged)
        replaced.swap()
        self.unmerged = None if release else replaced
        self.merged += names
        self.set()

    @property
    def released(self) -> bool:
        """Whether something was merged for good."""
        return bool(self.merged) and self.unmerged is None

    def unmerge(self) -> None:
        if self.unmerged is not None:
            self.unmerged.swap()
            self.unmerged = None
            self.rounding = None
            self.merged = ()
            self.set()

    def extra_repr(self) -> str:
        parts = [f"adapters={', '.join(self.updates)}"] if list(self.updates) != ["default"] else []
        parts += [f"{name}: dropout={update.dropout}" for name, update in self.updates.items() if update.dropout]
        parts += [f"merged={', '.join(self.merged)}"] if self.merged else []
        parts += [] if self.enabled else ["disabled"]
        return ", ".join(parts)


def _of_base_layer(name: str) -> property:
    return property(lambda layer: getattr(layer.base_layer, name))


# Models look at these on a layer that they do not call, and tie weights through the first.
for _name in (
    *("weight", "bias", "num_embeddings", "embedding_dim", "padding_idx", "embed_scale"),
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
):
    setattr(AdaptedLayer, _name, _of_base_layer(_name))


def adapted_layers(model: nn.Module) -> list[tuple[str, AdaptedLayer]]:
    """A model's adapted layers by their names.

    Raises:
        ValueError: there are none.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLayer)]
    if not layers:
        raise ValueError("`model` has no adapted layers: call vblora.inject(model, config) first.")
    return layers
