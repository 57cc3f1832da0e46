"""Injects an adapter into a model."""

import dataclasses
import os
from typing import cast

import torch
from torch import nn

from ..adapters import Adapter, Target
from ..adapters.base import warn_of_half_precision
from ..adapters.registry import adapter_class
from ..bank import VectorBank
from ..config import CLASS_OF_PEFT_TYPE, AdapterConfig, from_peft
from ..layers.adapted import AdaptedLayer, TensorSwap
from ..layers.kinds import target_of
from ..layers.users import has_other_users
from ..layers.weights import format_name, is_quantised, passes_gradients
from .attached import AttachedAdapter
from .diffusers_guard import guard_diffusers
from .heads import warn_of_new_weights, with_task_head
from .lookup import (
    ADAPTERS_ATTRIBUTE,
    Adapters,
    adapted_model,
    adapted_models,
    base_tensors_in_place,
    refuse_if_disabled,
    refuse_if_merged,
)
from .names_guard import guard_names
from .parts import find_parts
from .peft_guard import guard_from_peft, refuse_peft_layers
from .record import AdaptedModel, ModuleT
from .statistics import warn_of_frozen_statistics
from .targets import base_modules, find_targets, matches
from .unmatched import warn_of_unmatched
from .whole import guard_saving


def inject(
    model: ModuleT,
    config: AdapterConfig,
    *,
    adapter_name: str = "default",
    bank: VectorBank | str | os.PathLike[str] | None = None,
    freeze_bank: bool = False,
) -> ModuleT:
    """Adapts a model in place: wraps its target layers, freezes everything else, and adds one adapter for all targets.

    The adapter becomes the module ``model.vblora[adapter_name]``. Its parameters train (for VB-LoRA, ``logits`` ``(S, M)`` and
    ``bank.vectors`` ``(h, b)``, both float32), and so do copies of the biases and ``modules_to_save`` that the config names.
    :func:`eject` puts the originals back; within :func:`disabled`, the model uses them. Normalization layers with running
    statistics, such as BatchNorm, are frozen, too: they stay in evaluation mode in training, unless ``modules_to_save`` names
    them. If an argument is refused, the model does not change.

    You can inject several adapters into a model, each with its own name, method, config and layers. The first one is active; call
    :func:`set_adapter` to activate another.

    Cast the base model before you inject, not after: then the adapter stays float32. A later cast to half precision would round
    the logits, which then select other bank vectors, so vblora warns about it.

    Args:
        model: any module. For a Hugging Face model, the config may leave ``target_modules`` to the architecture's default.
        config: what to adapt, and how: a :class:`VBLoRAConfig`, :class:`VeraConfig`, :class:`TiedLoraConfig` or
            :class:`LoraConfig`; or PEFT's config object of one of these methods.
        adapter_name: the name with which you activate, merge, save and delete the adapter.
        bank: VB-LoRA only: a bank to share with other adapters, or its path (:meth:`VectorBank.from_file`), instead of a new
            bank. Its size must be that of the config.
        freeze_bank: VB-LoRA only: this adapter does not train the bank. If another model trains the same bank, that stops, too,
            because a parameter has one ``requires_grad``. With a frozen bank, also set ``train_scales=True`` in the config: the
            adapter then learns more. An adapter whose bank is unchanged since it was read from a file is saved without it.

    Returns:
        The same model.

    Raises:
        ValueError: the model already has an adapter of that name, holds one of PEFT's, is merged or is disabled; no layer
            matches; ``vector_length`` does not divide a width (without ``pad``); or ``bank`` has another size, or ``config``
            is of another method.
        TypeError: a matching layer cannot be adapted or passes no gradient to its input, a quantised weight would train, or the
            model cannot be called.
        FileNotFoundError: the file of the bank does not exist.

    Example::

        model = vblora.inject(model, vblora.VBLoRAConfig(r=4, num_vectors=256, vector_length=64))
        optimizer = torch.optim.AdamW(vblora.parameter_groups(model))
    """
    config = from_peft(config, CLASS_OF_PEFT_TYPE) or config
    adapter_class(config)  # refuses what is not a config
    plan = Plan(model, with_task_head(model, config), adapter_name)
    plan.check_trainable()
    warn_of_unmatched(model, plan.config, [target.name for target in plan.targets])
    plan.adapter_class.warn_if_untrainable(plan.config)
    if plan.adapter_class.takes_bank:
        adapter = plan.new_adapter(bank=bank)
    elif bank is not None or freeze_bank:
        given = "bank" if bank is not None else "freeze_bank"
        raise ValueError(
            f"`{given}` applies only to VBLoRAConfig, but `config` is a {type(config).__name__}. Leave it out."
        )
    else:
        adapter = plan.new_adapter()
    warn_of_half_precision({name: parameter.dtype for name, parameter in adapter.named_parameters()})
    attached = plan.apply(adapter)
    if freeze_bank:
        attached.freeze_bank()
    if config.inference_mode:
        attached.requires_grad_(False)
    else:
        warn_of_frozen_statistics(adapted_model(model))
    return model


class Plan:
    """A validated injection that has not been applied yet.

    Attributes:
        adapter_class: the adapter class of the config.
        config: a copy of the config.
        targets: the layers to adapt.
        extra_tensors: copies of the biases and ``modules_to_save`` that will train, by their names in the model: the module, the
            attribute and the copy.
        device: the adapter's device, which is that of the first target whose weight is not offloaded.
    """

    def __init__(self, model: nn.Module, config: AdapterConfig, adapter_name: str = "default") -> None:
        self.adapter_class = adapter_class(config)
        if isinstance(model, (nn.ModuleList, nn.ModuleDict)):
            raise TypeError(
                f"`model` is a {type(model).__name__}, which is never called. Inject the model that contains it."
            )
        if hasattr(model, "_orig_mod"):
            raise TypeError("`model` is compiled. Inject the original model, then call torch.compile.")
        _check_name(adapter_name)
        self.model = model
        self.adapter_name = adapter_name
        self.record = _record_of(model)
        _check_model(model, self.record, adapter_name)
        self.config = dataclasses.replace(config)  # validates again
        modules = base_modules(model)
        self._found = find_targets(model, self.config)
        saved = _find_saved(list(modules), self.config)
        self.targets = tuple(target_of(names[0], layer) for layer, names in self._found.items())
        self.adapter_class.check_targets(self.config, self.targets)
        with base_tensors_in_place(model):  # copies those, not another adapter's
            self.extra_tensors = _extra_tensors(modules, self.config, list(self._found), saved)
        changed = {layer: names[0] for layer, names in self._found.items()}
        changed |= {module: name.rpartition(".")[0] for name, (module, _, _) in self.extra_tensors.items()}
        _refuse_shared(self.record, changed)
        self.device = _device_of(list(self._found))

    def new_adapter(self, **given: object) -> Adapter:
        """A new adapter for the targets. ``given``: further arguments of ``from_config``."""
        return self.adapter_class.from_config(self.config, self.targets, device=self.device, **given)

    def check_trainable(self) -> None:
        """Refuses targets that would pass no gradient to the layers before them.

        Raises:
            TypeError: there is such a layer. The message names it.
        """
        for layer, names in self._found.items():
            weight = cast(torch.Tensor, layer.weight)
            if not passes_gradients(weight):
                raise TypeError(
                    f"`target_modules` matches `{names[0]}`, which also quantises its input ({format_name(weight)}) and "
                    "passes no gradient to the layers before it. Quantise only weights, as torchao's Int8WeightOnlyConfig "
                    "does, or load a trained adapter."
                )

    def apply(self, adapter: Adapter) -> AttachedAdapter:
        """Changes the model. Its first adapter becomes active; a later one does not."""
        model, record = self.model, self.record
        if record is None:
            record = AdaptedModel.install(model)
            guard_saving(record)
            guard_diffusers(record)
            guard_from_peft()
            guard_names()
        extra = {name: TensorSwap(*place) for name, place in self.extra_tensors.items()}
        layers = [record.wrap(layer, names) for layer, names in self._found.items()]
        attached = AttachedAdapter(model, self.adapter_name, self.config, adapter, layers, extra)
        record.add(attached)
        warn_of_new_weights(model, {p for present in record.adapters.values() for p in present.parameters.values()})
        return attached


def wrap_for_store(model: nn.Module, config: AdapterConfig) -> tuple[AdaptedModel, tuple[Target, ...]]:
    """Wraps the layers that ``config`` means, for adapters that are not modules of the model: those of a store.

    Raises:
        ValueError: the model has adapters, or nothing matches.
        TypeError: a match that takes no update.
    """
    record = _record_of(model)
    if record is not None and record.adapters:
        raise ValueError(f"`model` has adapters, {', '.join(record.adapters)}. Take them out with vblora.eject first.")
    _check_model(model, record, "")
    found = find_targets(model, config)
    targets = tuple(target_of(names[0], layer) for layer, names in found.items())
    _refuse_shared(record, {layer: names[0] for layer, names in found.items()})
    record = AdaptedModel.install(model)
    guard_saving(record)
    guard_from_peft()
    guard_names()
    for layer, names in found.items():
        record.wrap(layer, names)
    record.hook_parts(find_parts(model, record.layers))  # to refuse `adapter_names` there
    record.let_rows_differ()
    return record, targets


def _record_of(model: nn.Module) -> AdaptedModel | None:
    """The record of the model itself, not of one within it."""
    return next((record for record in adapted_models(model) if record.model is model), None)


def _check_name(name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"`adapter_name` is {name!r}, but must be a string.")
    if not name or "." in name or hasattr(Adapters(), name):  # of an instance, which has more attributes than the class
        raise ValueError(
            f"`adapter_name` is {name!r}, which cannot name a module. Give a string that is not empty, has no '.', and is not "
            "an attribute of nn.ModuleDict such as 'keys' or 'training', nor 'extra' or 'replaced'."
        )


def _check_model(model: nn.Module, record: AdaptedModel | None, adapter_name: str) -> None:
    refuse_peft_layers(model)
    own = {} if record is None else record.names
    if any(isinstance(module, AdaptedLayer) and module not in own for module in model.modules()):
        raise ValueError(
            "`model` already contains adapted layers: a VBLinear, or an injected submodule. Eject that submodule with "
            "vblora.eject first."
        )
    if record is not None and record.row_source is not None:
        raise ValueError("`model` has a vblora.serving.AdapterStore attached. Call the store's `detach` first.")
    if record is None:
        if hasattr(model, ADAPTERS_ATTRIBUTE):
            raise ValueError(f"`model` has an attribute `{ADAPTERS_ATTRIBUTE}`, where the adapter would go. Rename it.")
        return
    if adapter_name in record.adapters:
        raise ValueError(
            f"`model` already has an adapter {adapter_name!r}. Pass another `adapter_name`, or remove that adapter with "
            "vblora.delete_adapter or vblora.eject."
        )
    refuse_if_disabled(record.layers)
    refuse_if_merged(record.layers)


def _refuse_shared(record: AdaptedModel | None, modules: dict[nn.Module, str]) -> None:
    """Refuses modules, given with their names, of which another model's adapters replace tensors."""
    own = set() if record is None else {*record.names, *record.swaps()}
    for module, name in modules.items():
        if has_other_users(module, own):
            raise ValueError(
                f"`{name}` is also part of another injected model, or of a VBLinear, and both would change its tensors in place. "
                "Give each model a module of its own, such as a copy.deepcopy, or call vblora.eject on the other model first."
            )


def _device_of(layers: list[nn.Module]) -> torch.device:
    """The device of the first weight that is not on the meta device. A layer that accelerate has offloaded is on the meta device
    until it runs; its hook tells where that will be."""
    devices = [cast(torch.Tensor, layer.weight).device for layer in layers]
    hooks = [getattr(layer, "_hf_hook", None) for layer in layers]
    execution_devices = [getattr(hook, "execution_device", None) for hook in hooks]
    devices += [torch.device(device) for device in execution_devices if device is not None]
    return next((device for device in devices if device.type != "meta"), devices[0])


def _find_saved(names: list[str], config: AdapterConfig) -> list[str]:
    entries = config.modules_to_save or []
    saved = [name for entry in entries for name in names if name and matches(name, [entry])]
    if entries and not saved:
        raise ValueError(
            f"`modules_to_save` names {' and '.join(f'`{entry}`' for entry in entries)}, which matches no module of this model."
        )
    return saved


def _extra_tensors(
    modules: dict[str, nn.Module], config: AdapterConfig, targets: list[nn.Module], saved: list[str]
) -> dict[str, tuple[nn.Module, str, torch.Tensor]]:
    """Copies of the biases and ``saved`` modules' tensors, by their names in the model: the module, the attribute, the copy."""
    places: dict[tuple[nn.Module, str], str] = {}
    for root in saved:
        for prefix, module in modules.items():
            if prefix == root or prefix.startswith(f"{root}."):
                for name in (*module._parameters, *module._buffers):
                    if getattr(module, name) is not None:
                        places.setdefault((module, name), f"{prefix}.{name}")
    for prefix, module in modules.items():
        wanted = config.bias == "all" or (config.trains_biases_of_targets and module in targets)
        if wanted and module._parameters.get("bias") is not None:
            places.setdefault((module, "bias"), f"{prefix}.bias" if prefix else "bias")

    copies: dict[torch.Tensor, torch.Tensor] = {}  # tied tensors stay tied
    extra_tensors = {}
    for (module, name), full_name in places.items():
        tensor = getattr(module, name)
        if tensor.is_meta and getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise ValueError(f"`{full_name}` would train, but accelerate has offloaded it. Place it on a device.")
        if is_quantised(tensor):
            raise TypeError(
                f"`{full_name}` would train, but is quantised ({format_name(tensor)}). Leave its module out of the config."
            )
        if tensor not in copies:
            copy = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                copy = nn.Parameter(copy, requires_grad=copy.is_floating_point())
            copies[tensor] = copy
        extra_tensors[full_name] = module, name, copies[tensor]
    return extra_tensors
