"""The record of an injected model: its adapters, which of them are active, and how to remove them."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..adapters.base import note_living
from ..layers.adapted import AdaptedLayer, TensorSwap, Update
from ..layers.rows import RowAdapters
from ..layers.users import forget_user, note_user
from ..layers.weights import disable_packing, enable_packing
from . import mixed_batch
from .attached import AttachedAdapter
from .completeness import BufferSnapshot, check_replacements, warn_of_thawed
from .ddp_guard import refuse_unreduced
from .extra_state import add_extra_tensors, take_extra_tensors
from .idle import warn_if_idle
from .lookup import ADAPTERS_ATTRIBUTE, Adapters, refuse_if_disabled, refuse_if_merged
from .statistics import FrozenStatistics

_IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"  # the attribute that DistributedDataParallel reads

# Classes of transformers that transpose the rows to the second dimension.
_SEQUENCE_FIRST = {"FSMTDecoder", "FSMTEncoder", "LEDEncoderSelfAttention", "LongformerSelfAttention", "XLNetModel"}

ModuleT = TypeVar("ModuleT", bound=nn.Module)  # functions that change a model in place return its type


def _host_of(model: nn.Module) -> tuple[str, nn.Module]:
    """The module whose child the adapters become, with its name: the model, or the first within that is not a container.

    A container runs or saves its children one after the other, so it must not get another.
    """
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return next((item for item in model.named_modules() if not isinstance(item[1], containers)), ("", model))


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
        self.training_forwards = 0  # until `warned_of_thawed`
        self.warned_of_thawed = False  # that parameters of the base model train
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
        # A partial, so that copies and pickles of the model refer to their own record.
        vars(self.model).setdefault("zero_grad", functools.partial(_zero_grad, self))

    def __getstate__(self) -> dict[str, Any]:
        # Without the handles of hooks on modules that are no longer in the model. They cannot be copied once those are freed.
        present = {id(module._forward_pre_hooks) for module in self.model.modules()}
        handles = {part: own for part, own in self._part_hooks.items() if id(own[0].hooks_dict_ref()) in present}
        return self.__dict__ | {"_part_hooks": handles}

    def _begin_forward(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and self.model.training and torch.is_grad_enabled():
            warn_if_idle(self.model, self._active)
            warn_of_thawed(self)
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
        """The name of a module known to have the rows in the second dimension of its layers' inputs, if it is adapted."""
        found = [(name, module) for name, module in self.model.named_modules() if _is_sequence_first(module)]
        adapted = (item for item in found if any(inner in self.names for inner in item[1].modules()))
        return next((name or type(module).__name__ for name, module in adapted), None)

    def let_rows_differ(self) -> None:
        """Makes layers check from now on whether the rows of a batch use different adapters."""
        if not self._rows_differ:
            self._rows_differ = True
            for layer in self.layers:
                layer.let_rows_differ()

    def swapped_in(self) -> list[TensorSwap]:
        """The extra tensors that are in the model now."""
        return [extra for extra in self.swaps() if extra.swapped_in]

    def swaps(self) -> list[TensorSwap]:
        """The extra tensors of all adapters."""
        return [extra for attached in self.adapters.values() for extra in attached.extra.values()]

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
        for extra in attached.extra.values():
            note_user(extra.module, extra)
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
        if getattr(vars(self.model).get("zero_grad"), "func", None) is _zero_grad:
            del vars(self.model)["zero_grad"]
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
            forget_user(layer.base_layer, layer)

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


def _is_sequence_first(module: nn.Module) -> bool:
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return not getattr(module.self_attn, "batch_first", True)
    return type(module).__name__ in _SEQUENCE_FIRST


def _zero_grad(record: AdaptedModel, set_to_none: bool = True) -> None:
    """The model's own ``zero_grad``, also for the extra tensors of inactive adapters, which are not in the model then."""
    model: nn.Module = record.model
    type(model).zero_grad(model, set_to_none)
    stored = (swap.stored for swap in record.swaps())
    nn.ParameterList(tensor for tensor in stored if isinstance(tensor, nn.Parameter)).zero_grad(set_to_none)


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
