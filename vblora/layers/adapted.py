"""The layer that adds low-rank updates to a frozen layer, and merges them into its weight."""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters import Factors, Slot
from ..errors import VBLoRAWarning
from . import fused, rows, updates
from .kinds import Linear, compute_dtype, kind_of
from .reads import Watched
from .users import note_user
from .weights import Rounding, format_of, is_packed, rounding, swap_tensor


class TensorSwap:
    """A tensor of the base model and its replacement, one of them in the model and the other stored here.

    The replacement is a trained copy, a merged weight, or another base tensor that an adapter's file holds (``trains=False``).
    """

    def __init__(self, module: nn.Module, name: str, replacement: Tensor, *, trains: bool = True) -> None:
        self.module = module
        self.name = name
        self.trains = trains
        self.swapped_in = False  # whether the replacement is in the model
        self.stored = replacement

    @property
    def replacement(self) -> Tensor:
        """The replacement, wherever it is."""
        tensor: Tensor = getattr(self.module, self.name) if self.swapped_in else self.stored
        return tensor

    @property
    def original(self) -> Tensor:
        """What it replaces, wherever that is."""
        tensor: Tensor = self.stored if self.swapped_in else getattr(self.module, self.name)
        return tensor

    @torch.no_grad()
    def swap(self) -> None:
        """Swaps the stored tensor with the module's, after matching device and dtype."""
        self.stored = swap_tensor(self.module, self.name, self.stored)
        self.swapped_in = not self.swapped_in


class Update(NamedTuple):
    """One adapter's update of a layer."""

    slot: Slot
    dropout: float  # probability of dropping an element of the update's input


class AdaptedLayer(nn.Module):
    """A frozen layer with low-rank updates: ``y = base_layer(x) + Σ dropout(x) Aᵀ B`` over its active adapters.

    Args:
        base_layer: a layer of one of the kinds in ``kinds.py``.

    Attributes:
        updates: the update of each adapter that targets this layer, by adapter name.
        applied: the updates that a forward adds: active, enabled and not merged.
        active: names of the active adapters that target this layer.
        enabled: False leaves out all updates.
        merged: names of the adapters whose updates are in ``base_layer.weight`` (:func:`vblora.merge`).
        unmerged: swaps the merged weight with the original; None if nothing is merged or the original was released.
        rows_differ: whether a call may use different adapters for the rows of its batch.
        key: identifies the layer in graphs once ``rows_differ`` is True.
        rounding: the error of quantising a merged weight again; None if nothing was quantised.

    Raises:
        TypeError: ``base_layer`` is of no known kind.
    """

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.kind = kind_of(base_layer)
        self.updates: dict[str, Update] = {}
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.merged: tuple[str, ...] = ()
        self.unmerged: TensorSwap | None = None
        self.rounding: Rounding | None = None
        self.applied: dict[str, Update] = {}
        self.rows_differ = False
        self.packed = is_packed(self.weight)
        self.train(base_layer.training)
        note_user(base_layer, self)

    def set(self, *, active: Iterable[str] | None = None, enabled: bool | None = None) -> None:
        """Changes which updates a forward adds. Ignores names of adapters that do not target this layer."""
        own = vars(self)  # set_adapter does this for each layer, and Module.__setattr__ takes most of its time
        if active is not None:
            own["active"] = tuple([name for name in active if name in self.updates])
        if enabled is not None and enabled != self.enabled:
            own["enabled"] = enabled
            for name in self.merged:
                self.updates[name].slot.adapter.disabled_layers += -1 if enabled else 1
        applied = [name for name in self.active if self.enabled and name not in self.merged]
        own["applied"] = {name: self.updates[name] for name in applied}

    def let_rows_differ(self) -> None:
        """Lets a call use different adapters for the rows of its batch."""
        self.rows_differ = True
        self.key = rows.new_key(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if self.rows_differ:
            self.let_rows_differ()  # a copy needs a key of its own
        note_user(self.base_layer, self)

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        if name in ("weight", "bias"):
            if name == "weight" and self.applied and value is not self.base_layer.weight:
                warnings.warn(
                    "the weight of an adapted layer was replaced: the new one becomes the base layer's, to which the layer adds "
                    "the adapter's update as before. Code that folds a normalization or a scale into the weight "
                    "(torch.nn.utils.fusion) leaves out the update: call vblora.merge(model) first.",
                    VBLoRAWarning,
                    stacklevel=2,
                )
            if name == "weight" and self.unmerged is not None and value is self.unmerged.original:
                raise ValueError(
                    "an adapter is merged into this layer, and its original weight would take the place of the merged one, such "
                    "as when a model ties its weights again. Call vblora.unmerge first."
                )
            setattr(self.base_layer, name, value)
        elif name in _SIZES:
            if value != getattr(self, name):
                raise ValueError(
                    f"`{name}` of an adapted layer would change from {getattr(self, name)} to {value}, such as by "
                    "resize_token_embeddings, but the adapter's update has the old size. Load the model again, resize it, and "
                    "then inject."
                )
        else:
            super().__setattr__(name, value)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight. Model code that reads it in a forward leaves out the update, which this notes.

        Raises:
            TypeError: a module without a weight tensor has replaced the base layer.
        """
        weight = cast(Tensor, self.base_layer.weight)
        if callable(weight):  # as torch.ao's quantised modules have it
            base = type(self.base_layer)
            raise TypeError(
                f"after vblora.inject, something such as torch.ao.quantization put a {base.__module__}.{base.__qualname__} in "
                "the place of an adapted layer's base layer. Call vblora.merge(model, release=True) and vblora.eject(model) "
                "before you quantise the model; or quantise the base model with bitsandbytes or torchao before you inject."
            )
        slots = self._note_touch()
        if not slots:
            return weight
        if type(weight) is not nn.Parameter:  # such as a quantised one, whose class Watched cannot stand for
            return weight
        return Watched.of(weight, functools.partial(_note_read, slots))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As in ``nn.Module``. In a forward, this too may be how the model's code gets the weight, in place of a call."""
        self._note_touch()
        return super().named_parameters(*args, **kwargs)

    def _note_touch(self) -> list[Slot]:
        """Notes in a forward that the layer's weight was handed out. Returns the slots that are in a forward."""
        slots = [update.slot for update in self.applied.values() if update.slot.in_forward]
        for slot in slots:
            slot.adapter.weight_reads.setdefault(slot, False)
        return slots

    @property
    def in_features(self) -> int:
        return self.kind.widths(self.base_layer)[0]

    @property
    def out_features(self) -> int:
        return self.kind.widths(self.base_layer)[1]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        # Skips Module.__call__, which takes a tenth of a small layer's time, unless something needs to see the call: a hook, a
        # replaced `forward` (accelerate's) or a graph. In inference, skips that of a plain base layer, too.
        own = self.__dict__
        if "forward" in own or updates.has_hooks(own) or type(self).forward is not AdaptedLayer.forward:
            return super().__call__(*args, **kwargs)
        base = own["_modules"]["base_layer"]
        if not (own["applied"] or own["rows_differ"]):
            return base(*args, **kwargs)
        x = args[0] if args else None
        if type(x) is not Tensor or self._compiled_call_impl is not None or updates.is_seen():
            return super().__call__(*args, **kwargs)
        if torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack():
            return self._forward(x, args[1:], kwargs, seen=False)
        plain = None if args[1:] or kwargs else updates.linear_parameters(base)
        y = base(*args, **kwargs) if plain is None else F.linear(x, *plain)
        in_place = plain is not None or not updates.has_hooks(base.__dict__)
        if own["rows_differ"]:
            return rows.updated(self, y, x, in_place=in_place)
        return self.add_applied(y, x, in_place=in_place)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward(x, args, kwargs, seen=updates.is_seen())

    def _forward(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], *, seen: bool) -> Tensor:
        """``forward``, given whether :func:`updates.is_seen`."""
        if self.rows_differ or args or kwargs or not x.is_floating_point():
            y = self._modules["base_layer"](x, *args, **kwargs)  # type: ignore[misc]
            return rows.updated(self, y, x) if self.rows_differ else self.add_applied(y, x)
        y = None
        for update in self.applied.values():
            y = self._add(update, y, x, seen=seen)
        return self.base_layer(x) if y is None else y

    def add_applied(self, y: Tensor, x: Tensor, *, in_place: bool = False) -> Tensor:
        """Adds the updates of the applied adapters to the base layer's output ``y``.

        Args:
            in_place: whether nobody else has ``y``, and :func:`updates.is_plain`.
        """
        for update in self.applied.values():
            if not (in_place and self._added_in_place(update, y, x)):
                y = self._add(update, y, x)
        return y

    def _added_in_place(self, update: Update, y: Tensor, x: Tensor) -> bool:
        """Adds an update to ``y`` in place if one operator can do it and is faster than several of torch.

        In training only where the fused layer does so, too: what re-entrant checkpointing runs without gradients must round as
        its recomputation does.
        """
        factors = update.slot.ready_factors
        if (
            factors is None
            or factors.d is not None
            or factors.e is not None
            or not issubclass(self.kind, Linear)
            or not updates.can_add(y, x, factors.A, few=True)
            or (self.training and not self._fuses(update, x, factors))
        ):
            return False
        updates.added(y, x, factors.A, factors.B, None, in_place=True)
        return True

    def _fuses(self, update: Update, x: Tensor, factors: Factors) -> bool:
        """Whether the fused layer adds the layer's only update with the same operator, where gradients are recorded."""
        return (
            fused.takes_operators(x, factors.A)
            and not update.dropout
            and len(self.applied) == 1
            and fused.can_fuse(self._modules["base_layer"], x, factors)  # type: ignore[arg-type]
        )

    def _add(self, update: Update, y: Tensor | None, x: Tensor, *, seen: bool = True) -> Tensor:
        """Adds an update to the base layer's output ``y``, which is yet to be computed if it is None; then not by a call of the
        base layer, unless ``seen`` or it needs one."""
        base: nn.Module = self._modules["base_layer"]  # type: ignore[assignment]  # faster than Module.__getattr__
        floating = x.is_floating_point()
        dtype = compute_dtype(x.device, x.dtype if y is None or floating else y.dtype)
        factors = update.slot.factors(dtype).to(x.device, dtype)
        dropout = update.dropout if self.training and floating else 0.0
        if y is None:
            if not (seen or dropout) and fused.can_fuse(base, x, factors) and not x.is_inference():
                return fused.linear(cast(nn.Linear, base), x, factors)
            y = cast(Tensor, base(x))
        return self.kind.add_update(base, y, F.dropout(x, dropout) if dropout else x, factors)

    @torch.no_grad()
    def delta_weight(self, names: Iterable[str]) -> Tensor:
        """The sum of the named adapters' updates, in the layout of ``base_layer.weight`` and at least float32."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        total: Tensor | None = None
        for name in names:
            slot = self.updates[name].slot
            # Composed from the current parameters, not taken from a forward.
            A, B, *_ = slot.adapter.factors_of(slot.index, dtype).folded()
            delta = self.kind.delta(self.base_layer, A, B)
            total = delta if total is None else total.add_(delta)
        assert total is not None  # `names` is never empty
        return total.to(self.weight.device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def merged_weight(self, names: Iterable[str]) -> Tensor:
        """The dense weight plus the updates of ``names`` and of those merged before, rounded once to the weight's dtype."""
        if self.unmerged is None:
            format = format_of(self.weight)
            return self.delta_weight(names).add_(format.read(self.base_layer)).to(format.dtype(self.base_layer))
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
        """Puts a weight with the updates in the layer, and stores the original for :meth:`unmerge` unless ``release``."""
        names = tuple(names)
        weight = self.merged_weight(names)
        if self.unmerged is not None:
            self.unmerged.swap()
        format = format_of(self.weight)
        merged = format.store(self.base_layer, weight)
        self.rounding = None if format.exact else rounding(self.base_layer, weight, merged)
        unmerged = TensorSwap(self.base_layer, "weight", merged)
        unmerged.swap()
        self.unmerged = None if release else unmerged
        self._set_merged(self.merged + names)

    @property
    def released(self) -> bool:
        """Whether updates were merged and the original weight was released."""
        return bool(self.merged) and self.unmerged is None

    def unmerge(self) -> None:
        """Puts the original weight back."""
        if self.unmerged is not None:
            self.unmerged.swap()
            self.unmerged = None
            self.rounding = None
            self._set_merged(())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for update in self.updates.values():
            update.slot.adapter.compute_dtype = None  # this layer may be cast without the others
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _set_merged(self, names: tuple[str, ...]) -> None:
        for name, update in self.updates.items():
            update.slot.adapter.merged_layers += (name in names) - (name in self.merged)
        self.merged = names
        self.set()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes the tensors of the base layer under the names that they have in the base model, too."""
        own = [name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)]
        plain = [name for name in own if name.partition(".")[0] not in self._modules]
        if plain and self.merged:
            args[-1].append(  # the list of errors
                f"`{prefix}{plain[0]}` is the base model's, but an adapter is merged into this layer: its update would be lost. "
                "Call vblora.unmerge first."
            )
        for name in plain:
            state_dict.setdefault(f"{prefix}base_layer.{name}", state_dict.pop(f"{prefix}{name}"))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        parts = []
        for name, update in self.updates.items():
            facts = [f"r={update.slot.adapter.r}"] + [f"dropout={update.dropout}"] * bool(update.dropout)
            facts += ["active"] * (name in self.active) + ["merged"] * (name in self.merged)
            parts.append(f"{name}: {', '.join(facts)}")
        return "; ".join(parts + ["disabled"] * (not self.enabled))


def _note_read(slots: list[Slot]) -> None:
    for slot in slots:
        slot.adapter.weight_reads[slot] = True


def _base_layer_attribute(name: str) -> property:
    return property(lambda layer: getattr(layer.base_layer, name))


_SIZES = ("in_features", "out_features", "num_embeddings", "embedding_dim")  # code that resizes a layer sets them

# Models also read these attributes of a layer.
for _name in (
    *("bias", "num_embeddings", "embedding_dim", "padding_idx", "embed_scale"),
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
):
    setattr(AdaptedLayer, _name, _base_layer_attribute(_name))


def adapted_layers(model: nn.Module) -> list[tuple[str, AdaptedLayer]]:
    """The adapted layers of a model, with their names.

    Raises:
        ValueError: the model has none.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLayer)]
    if not layers:
        raise ValueError("`model` has no adapted layers: call vblora.inject(model, config) first.")
    return layers
