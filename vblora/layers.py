"""Where factors meet a frozen layer."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters import Slot, VBLoRAAdapter
from .adapters.vblora import default_length
from .bank import VectorBank
from .bases import compute_dtype, is_linear, kind_of, refusal, target_of
from .quantised import Rounding, exchange, format_of, is_packed, keep_unpacked, rounding
from .reads import Watched


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
        self.train(base_layer.training)

    def set(self, *, active: Iterable[str] | None = None, enabled: bool | None = None) -> None:
        """Changes which updates a forward adds. Names of adapters that do not have this layer are passed over."""
        if active is not None:
            self.active = tuple(name for name in active if name in self.updates)
        if enabled is not None:
            self.enabled = enabled
        running = [name for name in self.active if self.enabled and name not in self.merged]
        self.running = {name: self.updates[name] for name in running}

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("weight", "bias"):
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def weight(self) -> Tensor:
        """The base layer's. Whoever reads it in a forward, past the layer, leaves the update out, and is noticed."""
        weight = self.base_layer.weight
        slots = [update.slot for update in self.running.values() if update.slot.in_forward]
        if not slots:
            return weight
        for slot in slots:
            slot.adapter.past.setdefault(slot, False)
        if type(weight) is not nn.Parameter:  # such as a quantised one, which has ways of its own
            return weight
        return Watched.of(weight, functools.partial(_notice, slots))

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
        if own["running"] or "forward" in own or any(map(own.__getitem__, _HOOKS)):
            return super().__call__(*args, **kwargs)
        return own["_modules"]["base_layer"](*args, **kwargs)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
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


def _notice(slots: list[Slot]) -> None:
    for slot in slots:
        slot.adapter.past[slot] = True


def _of_base_layer(name: str) -> property:
    return property(lambda layer: getattr(layer.base_layer, name))


# Models look at these on a layer, too.
for _name in (
    *("bias", "num_embeddings", "embedding_dim", "padding_idx", "embed_scale"),
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


class VBLinear(AdaptedLayer):
    """A linear layer with a VB-LoRA adapter of its own, for models that are written by hand.

    Like ``nn.Linear(in_features, out_features)``, or around a layer that is there: ``VBLinear(base_layer=layer)``. The base
    layer is frozen; what trains is ``adapter.bank.vectors`` ``(h, b)`` and ``adapter.logits`` ``(S, M)``. Give several
    layers the same ``bank`` to share it: like any tied parameter it is then trained once and found under each. A whole model
    is better served by :func:`vblora.inject`, which composes the factors of all layers in one go.

    Args:
        in_features, out_features, bias: of a new ``nn.Linear``. Not together with ``base_layer``.
        base_layer: the ``nn.Linear`` or ``Conv1D`` to adapt.
        r: rank of the update.
        topk: k, bank vectors mixed into a sub-vector.
        bank: the vector bank. Without it a new one is made from ``num_vectors`` and ``vector_length``.
        num_vectors, vector_length: h and b of a new bank. ``vector_length`` must divide both widths unless ``pad``; by
            default it is the largest such length up to 256.
        num_candidates: M, bank vectors that a sub-vector may choose from while it trains (:class:`VBLoRAConfig`).
        dropout: probability of dropping an element of the update's input while training.
        init_logits_std: logits start normal with this standard deviation.
        init, scaling: how the adapter starts, and the factor of its update (:class:`VBLoRAConfig`).
        pad: let ``vector_length`` be any (:class:`VBLoRAConfig`); by default it is 256, or the larger width if that is less.
        seed: of that draw; from torch's generator if None.
        device, dtype: of a new ``nn.Linear``. Adapter parameters go to the layer's device and are float32.

    Raises:
        ValueError: arguments that contradict each other or are out of range.
        TypeError: a ``base_layer`` of another type.

    Shape:
        ``(*, in_features)`` to ``(*, out_features)``.

    Example::

        layer = vblora.VBLinear(768, 3072, r=4, num_vectors=256, vector_length=256)
        y = layer(torch.randn(2, 768))
    """

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int | None = None,
        bias: bool | None = None,
        *,
        base_layer: nn.Module | None = None,
        r: int = 4,
        topk: int = 2,
        bank: VectorBank | None = None,
        num_vectors: int | None = None,
        vector_length: int | None = None,
        num_candidates: int | None = 128,
        dropout: float = 0.0,
        init_logits_std: float = 0.1,
        init: str = "paper",
        scaling: float = 1.0,
        pad: bool = False,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        new = {"in_features": in_features, "out_features": out_features, "bias": bias, "device": device, "dtype": dtype}
        given = [name for name, value in new.items() if value is not None]
        if base_layer is not None and given:
            raise ValueError(f"`{given[0]}` is of a new layer, but `base_layer` was given. Give one of the two.")
        if base_layer is None and (in_features is None or out_features is None):
            raise ValueError("Give `in_features` and `out_features`, or a `base_layer` to adapt.")
        if bank is not None and (num_vectors is not None or vector_length is not None):
            raise ValueError(
                "`num_vectors` and `vector_length` are of a new bank, but `bank` was given. Give one of the two."
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"`dropout` is {dropout}, but must be at least 0 and below 1.")
        if base_layer is None:
            base_layer = nn.Linear(in_features, out_features, bias is not False, device=device, dtype=dtype)
        elif not is_linear(base_layer):
            raise TypeError(f"`base_layer` is a {type(base_layer).__name__}; allowed are nn.Linear and Conv1D.")
        elif reason := refusal(base_layer):
            raise TypeError(f"`base_layer` is a {type(base_layer).__name__}{reason}.")
        target = target_of("base_layer", base_layer)
        if bank is None:
            bank = VectorBank(
                256 if num_vectors is None else num_vectors,
                default_length((target,), pad) if vector_length is None else vector_length,
                pairs=init == "noop",
                device=base_layer.weight.device,
            )
        adapter = VBLoRAAdapter(
            [target],
            bank,
            r=r,
            topk=topk,
            num_candidates=num_candidates,
            init_logits_std=init_logits_std,
            init=init,
            scaling=scaling,
            pad=pad,
            seed=seed,
        )
        super().__init__(base_layer)
        self.base_layer.requires_grad_(False)
        keep_unpacked(self)
        self.adapter = adapter
        self.updates["default"] = Update(adapter.slots[0], dropout)
        self.set(active=["default"])
