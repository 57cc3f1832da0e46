"""One adapter of an injected model."""

import functools
import warnings
from collections.abc import Collection
from typing import cast

import torch
from torch import Tensor, nn

from ..adapters import Adapter, Factors, Slot, VBLoRAAdapter
from ..adapters.vblora import BANK
from ..config import AdapterConfig
from ..errors import VBLoRAWarning, listed
from ..layers.adapted import AdaptedLayer, TensorSwap
from ..layers.kinds import compute_dtype
from ..layers.weights import is_packed
from .completeness import Link
from .lookup import ADAPTERS_ATTRIBUTE, base_tensors_in_place
from .parts import find_parts


class AttachedAdapter:
    """One adapter of a model.

    Attributes:
        layers: the adapted layers, in the order of the adapter's targets.
        extra: the biases and ``modules_to_save`` that the adapter trains, and base tensors of its file that differ from the
            model's, by their names in the model.
        parts: the parts of the model that are called by themselves, and the positions of their layers in ``layers``.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        config: AdapterConfig,
        adapter: Adapter,
        layers: list[AdaptedLayer],
        extra: dict[str, TensorSwap],
    ) -> None:
        self.model = model
        self.name = name
        self.config = config
        self.adapter = adapter
        self.layers = layers
        self.extra = extra
        self.parts = find_parts(model, layers)
        self.active = False
        self.checked_for_training: bool | None = None  # whether it was merged when a training forward was last checked
        self.ran = False  # whether a forward of the model has completed
        self.links: list[Link] = []  # of check_replacements
        self.has_learned = False  # whether its values come from a file or from a trainer that has ended

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the adapter and its extra parameters that can train."""
        extra_tensors = {name: extra.replacement for name, extra in self.extra.items() if extra.trains}
        extra = {f"extra.{name}": tensor for name, tensor in extra_tensors.items() if isinstance(tensor, nn.Parameter)}
        return dict(self.adapter.named_parameters()) | extra

    def bring(self, tensors: dict[str, Tensor], modules: dict[str, nn.Module]) -> None:
        """Has the adapter replace base tensors, by their names in the model, and those tied to them. They do not train.

        Args:
            modules: the modules of the base model under all their names.
        """
        swaps: dict[str, TensorSwap] = {}
        with base_tensors_in_place(self.model):
            for name, tensor in tensors.items():
                prefix, _, attribute = name.rpartition(".")
                own = getattr(modules[prefix], attribute)
                copy = nn.Parameter(tensor.to(own.device, own.dtype, copy=True), requires_grad=False)
                for prefix, module in modules.items():
                    for attribute, parameter in module._parameters.items():
                        tied = f"{prefix}.{attribute}"
                        if parameter is own and tied not in self.extra | swaps:
                            swaps[tied] = TensorSwap(module, attribute, copy, trains=False)
        self.extra |= swaps
        if self.active:
            for swap in swaps.values():
                swap.swap()

    def extra_tensors(self) -> dict[str, Tensor]:
        """The extra tensors by their names in the model, without what is merged into them.

        Raises:
            ValueError: one was merged into with ``release=True``.
        """
        adapted = (module for module in self.model.modules() if isinstance(module, AdaptedLayer))  # by any adapter
        merged = {layer.base_layer: layer for layer in adapted if layer.merged}
        tensors = {}
        for name, extra in self.extra.items():
            layer = merged.get(extra.module) if extra.name == "weight" and extra.swapped_in else None
            if layer is not None and layer.unmerged is None:
                raise ValueError(
                    f"`{name}` was merged into with release=True, which freed what the file of adapter {self.name!r} would hold."
                )
            tensors[name] = extra.replacement if layer is None else cast(TensorSwap, layer.unmerged).original
        return tensors

    def requires_grad_(self, requires_grad: bool) -> None:
        """Makes all parameters require gradients, or none. An inactive adapter changes once it becomes active."""
        if self.active:
            for parameter in self.parameters.values():
                parameter.requires_grad_(requires_grad and parameter.is_floating_point())
        else:
            self.adapter.trainable_names = [
                name for name, p in self.parameters.items() if requires_grad and p.is_floating_point()
            ]

    def freeze_bank(self) -> None:
        """Keeps this adapter from training its bank. Another active one of this model still trains it, if they share it."""
        if BANK in self.adapter.trainable_names:
            self.adapter.trainable_names.remove(BANK)
        if self.active:
            self.parameters[BANK].requires_grad_(False)

    def note_trainable_names(self, of_others: Collection[nn.Parameter] = ()) -> None:
        """Notes which parameters require gradients.

        Args:
            of_others: parameters of other active adapters, which do not count if this adapter did not train them before.
        """
        known = self.adapter.trainable_names
        self.adapter.trainable_names = [
            name for name, p in self.parameters.items() if p.requires_grad and (name in known or p not in of_others)
        ]

    def note_idle_bank(self) -> None:
        """Notes that it trains a bank which is frozen only because the adapters that train it are inactive."""
        adapter = self.adapter
        if isinstance(adapter, VBLoRAAdapter) and not adapter.bank.vectors.requires_grad:
            idle = [other for other in adapter.others_of_bank() if other.active is False]
            if any(BANK in other.trainable_names for other in idle):
                adapter.trainable_names.append(BANK)

    @property
    def parameters_in_use(self) -> set[nn.Parameter]:
        """Those of its parameters that active adapters use, too: of other models, and VBLinear layers. They share its bank."""
        adapter = self.adapter
        if not isinstance(adapter, VBLoRAAdapter):
            return set()
        return {adapter.bank.vectors for other in adapter.others_of_bank() if other.active is not False}

    def begin_forward(self) -> None:
        if any(self.name in layer.applied for layer in self.layers):
            self.adapter.begin_forward(self._compute_dtype())

    def begin_part(self, part: str) -> None:
        """Begins the forward of a part of the model, unless it belongs to a forward in progress."""
        if (span := self.parts.get(part)) is None:
            return
        current = self.adapter.slots[span.start].current
        if current is not None and current.part != part:  # an equal one is left from a forward that an interrupt ended
            return
        if any(self.name in layer.applied for layer in self.layers[span.start : span.stop]):
            self.adapter.begin_forward(self._compute_dtype(), part, span)

    def end_part(self, part: str) -> None:
        """Ends what :meth:`begin_part` has begun."""
        if (span := self.parts.get(part)) is None:
            return
        current = self.adapter.slots[span.start].forward_factors
        if current is not None and current.part == part:
            self.adapter.end_forward(span)
            if not torch.compiler.is_compiling():
                self._note_reads(self._pop_reads())

    def composed(self) -> list[Factors]:
        """The factors of its layers, for inference."""
        return self.adapter.all_factors(self._compute_dtype())

    def _compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.layers[0].weight.device, self._layers_dtype())

    def end_forward(self, complete: bool) -> None:
        """Clears the factors; after a ``complete`` forward, warns about layers that it did not call or whose weight it read."""
        adapter = self.adapter
        adapter.end_forward()
        if torch.compiler.is_compiling():
            return
        reads = self._pop_reads()
        first, self.ran = complete and not self.ran, complete or self.ran
        if first and not adapter.traced and not any(map(_is_compiled, self.model.modules())):
            layer_of = dict(zip(adapter.slots, self.layers, strict=True))
            uncalled = [slot for slot in adapter.slots if self.name in layer_of[slot].applied and not slot.was_called]
            reads |= {slot: True for slot in uncalled if slot in reads}
            _warn_of_uncalled([adapter.targets[slot.index].name for slot in uncalled if slot not in reads])
        self._note_reads(reads)

    def _pop_reads(self) -> dict[Slot, bool]:
        reads, self.adapter.weight_reads = self.adapter.weight_reads, {}
        return reads

    def _note_reads(self, reads: dict[Slot, bool]) -> None:
        found = [slot for slot, used in reads.items() if used and not slot.weight_read]
        for slot in found:
            slot.weight_read = True
        _warn_of_reading([self.adapter.targets[slot.index].name for slot in found])

    def _layers_dtype(self) -> torch.dtype:
        """The widest dtype of the layers, or of the model if all layers are packed.

        It is cached, but not while compiling, because a guard on the cache would cause a recompilation.
        """
        use_cache = not torch.compiler.is_compiling()
        dtype = self.adapter.compute_dtype if use_cache else None
        if dtype is None:
            dtypes = [layer.weight.dtype for layer in self.layers if not layer.packed] or _dtypes_of(self.model)
            dtype = functools.reduce(torch.promote_types, dtypes)
            if use_cache:
                self.adapter.compute_dtype = dtype
        return dtype


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")


def _warn_of_uncalled(names: list[str]) -> None:
    if names:
        warnings.warn(
            f"the first forward did not call {listed(names)}, so their updates had no effect. List layers that no input "
            "reaches in `exclude_modules`.",
            VBLoRAWarning,
        )


def _warn_of_reading(names: list[str]) -> None:
    if names:
        warnings.warn(
            f"the model's code read the weight of {listed(names)} itself, which leaves out the adapter's update. vblora.merge "
            "refuses, because merging would add it. List such layers in `exclude_modules`.",
            VBLoRAWarning,
        )


def _dtypes_of(model: nn.Module) -> list[torch.dtype]:
    """The dtypes of the base model's parameters, without packed ones, whose dtype is only that of their storage."""
    if torch.compiler.is_compiling():
        return [torch.float32]  # each layer then casts its factors, which is free in a graph
    own = set(getattr(model, ADAPTERS_ATTRIBUTE).parameters())
    return [p.dtype for p in model.parameters() if p not in own and not is_packed(p)] or [torch.get_default_dtype()]
