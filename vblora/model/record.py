"""The record of an injected model: its adapters, which of them are active, and how to remove them."""

import functools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adapters import Adapter, Factors, Slot, VBLoRAAdapter
from ..adapters.base import note_living
from ..adapters.vblora import BANK
from ..config import AdapterConfig
from ..errors import VBLoRAWarning
from ..layers.adapted import AdaptedLayer, TensorSwap, Update
from ..layers.kinds import compute_dtype
from ..layers.reads import listed
from ..layers.rows import RowAdapters
from ..layers.weights import disable_packing, enable_packing, is_packed
from . import mixed_batch
from .completeness import BufferSnapshot, Link, check_replacements
from .ddp_guard import refuse_unreduced
from .extra_state import EXTRA, REPLACED, Path, add_extra_tensors, take_extra_tensors
from .idle import warn_if_idle
from .parts import find_parts
from .statistics import FrozenStatistics

ADAPTERS_ATTRIBUTE = "vblora"  # the submodule of an injected model that holds its adapters
_IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"  # the attribute that DistributedDataParallel reads

ModuleT = TypeVar("ModuleT", bound=nn.Module)  # functions that change a model in place return its type


class Adapters(nn.ModuleDict):
    """The adapters of a model, by name."""


for _name in (EXTRA, REPLACED):  # keys of a state dict, which no adapter can have as its name
    setattr(Adapters, _name, Path())


def _host_of(model: nn.Module) -> tuple[str, nn.Module]:
    """The module whose child the adapters become, with its name: the model, or the first within that is not a container.

    A container runs or saves its children one after the other, so it must not get another.
    """
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return next((item for item in model.named_modules() if not isinstance(item[1], containers)), ("", model))


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
        merged = {layer.base_layer: layer for layer in self.layers if layer.merged}
        tensors = {}
        for name, extra in self.extra.items():
            layer = merged.get(extra.module) if extra.name == "weight" and extra.swapped_in else None
            if layer is not None and layer.unmerged is None:
                raise ValueError(
                    f"adapter {self.name!r} was merged with release=True, which freed the `{name}` that its file would hold."
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


class AdaptedModel:
    """The record of an injected model: its adapters, its adapted layers, and how to restore it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapters: dict[str, AttachedAdapter] = {}
        self.names: dict[AdaptedLayer, list[str]] = {}  # a layer that the model uses in several places has several
        self.trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.packing_layers = disable_packing(model)
        self.buffers = BufferSnapshot(model)
        self.statistics = FrozenStatistics(model)
        name, self.host = _host_of(model)  # the module whose child the adapters are
        self.adapters_name = f"{name}.{ADAPTERS_ATTRIBUTE}".lstrip(".")
        self.undo: list[Callable[[], None]] = []  # what else is undone as the adapters are taken out
        self.unwrapped = False  # whether the base layers are in place, to write a plain model
        self._active: tuple[AttachedAdapter, ...] = ()
        self._hooks: list[RemovableHandle] = []
        self._part_hooks: dict[str, list[RemovableHandle]] = {}
        self._rows_differ = False
        self.row_source: Callable[[Sequence[str | None]], RowAdapters] | None = None  # of a store that is attached

    @classmethod
    def install(cls, model: nn.Module) -> "AdaptedModel":
        """Freezes a base model and gives it an empty record."""
        record = cls(model)
        model.requires_grad_(False)
        adapters = Adapters()
        record.host.add_module(ADAPTERS_ATTRIBUTE, adapters)
        if record.host is not model:
            vars(model)[ADAPTERS_ATTRIBUTE] = adapters
        vars(model)["_vblora_adapted_model"] = record
        record.register_hooks()
        record.statistics.settle(set())
        return record

    @property
    def layers(self) -> list[AdaptedLayer]:
        return list(self.names)

    @property
    def present_layers(self) -> list[AdaptedLayer]:
        """Those that the model still has: you may have taken out blocks since, to make it smaller."""
        return [module for module in self.model.modules() if module in self.names]

    @property
    def active(self) -> list[str]:
        return [attached.name for attached in self._active]

    def register_hooks(self) -> None:
        self._hooks = [
            self.model.register_forward_pre_hook(self._begin_forward, with_kwargs=True),
            self.model.register_forward_hook(self._end_forward, always_call=True),
            self.model.register_state_dict_post_hook(functools.partial(add_extra_tensors, self)),
            self.model.register_load_state_dict_pre_hook(functools.partial(take_extra_tensors, self)),
        ]
        mixed_batch.install_generate(self)

    def __getstate__(self) -> dict[str, Any]:
        # Without the handles of hooks on modules that are no longer in the model. They cannot be copied once those are freed.
        present = {id(module._forward_pre_hooks) for module in self.model.modules()}
        handles = {part: own for part, own in self._part_hooks.items() if id(own[0].hooks_dict_ref()) in present}
        return self.__dict__ | {"_part_hooks": handles}

    def _begin_forward(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and self.model.training and torch.is_grad_enabled():
            warn_if_idle(self.model, self._active)
            check_replacements(self, self._active)
        refuse_unreduced(self._active)
        # mixed_batch removes its argument from `kwargs`. Until a model first gets that argument, its graph has no trace of this.
        if (mixed_batch.ARGUMENT in kwargs or self._rows_differ) and mixed_batch.begin_forward(self, args, kwargs):
            return
        for attached in self._active:
            attached.begin_forward()

    def _end_forward(self, _model: nn.Module, _args: tuple[object, ...], output: object) -> None:
        mixed = self._rows_differ and mixed_batch.end_forward(self)
        # A mixed batch does not use the slots of the active adapters, so it does not show which layers are uncalled.
        for attached in self._active:
            attached.end_forward(complete=output is not None and not mixed)

    def hook_parts(self, parts: Iterable[str]) -> None:
        """Has the forwards of these submodules noticed."""
        for part in set(parts).difference(self._part_hooks):
            module = self.model.get_submodule(part)
            self._part_hooks[part] = [
                module.register_forward_pre_hook(functools.partial(self._begin_part, part), with_kwargs=True),
                module.register_forward_hook(functools.partial(self._end_part, part), always_call=True),
            ]

    def _unhook_parts(self, parts: Iterable[str]) -> None:
        """Removes the hooks of those of ``parts`` that no adapter has any more."""
        for part in parts:
            if not any(part in attached.parts for attached in self.adapters.values()):
                for hook in self._part_hooks.pop(part, ()):
                    hook.remove()

    def _begin_part(self, part: str, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if mixed_batch.ARGUMENT in kwargs:
            raise ValueError(
                f"`{mixed_batch.ARGUMENT}` was passed to the submodule `{part}`. Pass it to the injected "
                f"{type(self.model).__name__}, which gives the rows to its layers."
            )
        if not self._rows_differ:
            for attached in self._active:
                attached.begin_part(part)

    def _end_part(self, part: str, *_: object) -> None:
        for attached in self._active:
            attached.end_part(part)

    def rows(self, names: Sequence[str | None]) -> RowAdapters:
        """The adapters of a batch's rows, given their names."""
        refuse_if_disabled(self.layers)
        refuse_if_merged(self.layers)
        if self.row_source is not None:
            return self.row_source(names)
        return mixed_batch.attached_rows(self, names)

    @functools.cached_property
    def sequence_first(self) -> str | None:
        """The name of a layer of torch's transformers whose input has the rows in its second dimension, if it is adapted."""
        layers = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer
        found = [(name, module) for name, module in self.model.named_modules() if isinstance(module, layers)]
        found = [item for item in found if not getattr(item[1].self_attn, "batch_first", True)]
        return next((name for name, module in found if any(inner in self.names for inner in module.modules())), None)

    def let_rows_differ(self) -> None:
        """Makes layers check from now on whether the rows of a batch use different adapters."""
        if not self._rows_differ:
            self._rows_differ = True
            for layer in self.layers:
                layer.let_rows_differ()

    def swapped_in(self) -> list[TensorSwap]:
        """The extra tensors that are in the model now."""
        every = [extra for attached in self.adapters.values() for extra in attached.extra.values()]
        return [extra for extra in every if extra.swapped_in]

    def wrap(self, layer: nn.Module, names: list[str]) -> AdaptedLayer:
        """The adapted layer around a layer of the base model: a new one, unless another adapter also targets the layer."""
        present = self.model.get_submodule(names[0])
        if isinstance(present, AdaptedLayer):
            return present
        adapted = AdaptedLayer(layer)
        if self._rows_differ:
            adapted.let_rows_differ()
        self.names[adapted] = names
        vars(self).pop("sequence_first", None)
        for name in names:
            _set_module(self.model, name, adapted)
        return adapted

    def add(self, attached: AttachedAdapter) -> None:
        """Adds an adapter to its layers. The first adapter becomes active."""
        self.adapters[attached.name] = attached
        note_living(attached.adapter)
        for slot, layer in zip(attached.adapter.slots, attached.layers, strict=True):
            layer.updates[attached.name] = Update(slot, attached.config.dropout)
        getattr(self.model, ADAPTERS_ATTRIBUTE)[attached.name] = attached.adapter
        attached.note_trainable_names()
        attached.note_idle_bank()
        self.activate([attached.name] if len(self.adapters) == 1 else self.active, added=[attached])
        self.hook_parts(attached.parts)
        self._keep_from_ddp(attached)

    def activate(self, names: Sequence[str], added: Sequence[AttachedAdapter] = ()) -> None:
        """Makes these adapters the active ones. Only their parameters require gradients.

        Looks at the adapters that were active and those that become so, and at ``added`` ones, however many others there are.
        """
        for attached in self._active:
            others = [other for other in self._active if other is not attached]
            attached.note_trainable_names({p for other in others for p in other.adapter.parameters()})
            for extra in attached.extra.values():
                extra.swap()
        for attached in (*self._active, *added):
            attached.active = attached.adapter.active = False
        for attached in (*self._active, *added):
            for parameter in set(attached.parameters.values()) - attached.parameters_in_use:
                parameter.requires_grad_(False)
        self._active = tuple(self.adapters[name] for name in names)
        for attached in self._active:
            attached.active = attached.adapter.active = True
            parameters = attached.parameters
            for trainable in attached.adapter.trainable_names:
                parameters[trainable].requires_grad_(True)
            for extra in attached.extra.values():
                extra.swap()
        for layer in self.layers:
            layer.set(active=names)
        swaps = [swap for attached in self._active for swap in attached.extra.values()]
        self.statistics.settle({swap.module for swap in swaps if swap.name == "running_mean"})

    def remove(self, name: str) -> None:
        """Removes one adapter, and unwraps the layers that no other adapter targets."""
        self.activate([other for other in self.active if other != name])
        attached = self.adapters.pop(name)
        del getattr(self.model, ADAPTERS_ATTRIBUTE)[name]
        for layer in attached.layers:
            del layer.updates[name]
        self._unwrap([layer for layer in attached.layers if not layer.updates])
        self._unhook_parts(attached.parts)
        self._return_to_ddp(f"{self.adapters_name}.{name}.")

    def take_out(self) -> None:
        """Removes all adapters, hooks and wrappers from the model."""
        for undo in self.undo:
            undo()
        self.undo = []
        self._unwrap(self.layers)
        for hook in self._hooks:
            hook.remove()
        enable_packing(self.packing_layers)
        self.statistics.release()
        mixed_batch.remove_generate(self.model)
        delattr(self.host, ADAPTERS_ATTRIBUTE)
        vars(self.model).pop(ADAPTERS_ATTRIBUTE, None)
        del self.model._vblora_adapted_model
        self.adapters, self._active, self.row_source = {}, (), None
        self._unhook_parts([*self._part_hooks])
        self._return_to_ddp(f"{self.adapters_name}.")
        self.model.requires_grad_(False)
        for name, parameter in self.model.named_parameters():
            if name in self.trainable:
                parameter.requires_grad_(True)

    def _unwrap(self, layers: list[AdaptedLayer]) -> None:
        """Puts the base layers in the places of ``layers``, wherever the user has moved those since."""
        unwrapped = set(layers)
        for module in self.model.modules():
            for name, child in module._modules.items():
                if isinstance(child, AdaptedLayer) and child in unwrapped:
                    module._modules[name] = child.base_layer
        for layer in layers:
            del self.names[layer]

    def _keep_from_ddp(self, attached: AttachedAdapter) -> None:
        """Keeps DDP from broadcasting an adapter's buffers in every forward: they are equal in all processes."""
        names = [f"{self.adapters_name}.{attached.name}.{name}" for name, _ in attached.adapter.named_buffers()]
        if names:
            vars(self.model)[_IGNORED_BY_DDP] = [*getattr(self.model, _IGNORED_BY_DDP, ()), *names]

    def _return_to_ddp(self, prefix: str) -> None:
        """Undoes :meth:`_keep_from_ddp` for names with this prefix."""
        names = [name for name in getattr(self.model, _IGNORED_BY_DDP, ()) if not name.startswith(prefix)]
        if names:
            vars(self.model)[_IGNORED_BY_DDP] = names
        else:
            vars(self.model).pop(_IGNORED_BY_DDP, None)


def adapted_models(model: nn.Module) -> list[AdaptedModel]:
    """The records of a model and of its submodules. This does not search the adapters, so their number does not matter."""
    found, pending = {}, [model]  # modules seen, with their records
    while pending:
        module = pending.pop()
        if module is not None and module not in found and type(module) is not Adapters:
            own = vars(module)
            found[module] = own.get("_vblora_adapted_model")
            pending += reversed(own["_modules"].values())
    return [record for record in found.values() if record is not None]


@contextmanager
def base_tensors_in_place(model: nn.Module) -> Iterator[None]:
    """Within it the base model's tensors are in the places of the extra ones. Not for a merged model."""
    swapped_in = [extra for record in adapted_models(model) for extra in record.swapped_in()]
    for extra in swapped_in:
        extra.swap()
    try:
        yield
    finally:
        for extra in swapped_in:
            extra.swap()


def adapted_model(model: nn.Module) -> AdaptedModel:
    """The record of an injected model, which may be wrapped in another one (DDP, torch.compile).

    Raises:
        ValueError: the model has no record, or several.
    """
    records = adapted_models(model)
    if not records:
        raise ValueError("`model` has no adapter: call vblora.inject(model, config) first.")
    if len(records) > 1:
        raise ValueError(f"`model` contains {len(records)} injected models. Pass one of them.")
    return records[0]


def attached_adapter(model: nn.Module, adapter_name: str | None = None) -> AttachedAdapter:
    """The adapter with the given name; without a name, the active one.

    Raises:
        ValueError: no adapter has that name, or the name is None and not exactly one adapter is active.
    """
    record = adapted_model(model)
    if adapter_name is None:
        if len(record.active) != 1:
            active = f"the active ones are {', '.join(record.active)}" if record.active else "none is active"
            raise ValueError(
                f"`adapter_name` is None, which means the active adapter, but {active}. "
                f"Name one of {', '.join(record.adapters)}."
            )
        return record.adapters[record.active[0]]
    return record.adapters[check_adapter_name(record, adapter_name)]


def check_adapter_name(record: AdaptedModel, name: str) -> str:
    if name not in record.adapters:
        raise ValueError(f"`adapter_name` is {name!r}; the model's adapters are {', '.join(record.adapters)}.")
    return name


def refuse_if_disabled(layers: list[AdaptedLayer]) -> None:
    """Refuses calls that would read or write the base model's tensors instead of the adapted model's."""
    if not all(layer.enabled for layer in layers):
        raise ValueError(
            "the adapters of `model` are disabled. Call this outside the block of `with vblora.disabled(model)`."
        )


def refuse_if_merged(layers: list[AdaptedLayer]) -> None:
    """Refuses calls that would change which adapters are merged."""
    if any(layer.merged for layer in layers):
        raise ValueError("`model` is merged. Call vblora.unmerge(model) first.")


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


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
