"""Putting an adapter into a model."""

import dataclasses
import os

import torch
from torch import nn

from ..adapters import Adapter
from ..adapters.base import warn_of_half_precision
from ..adapters.registry import adapter_class
from ..bank import VectorBank
from ..config import CLASS_OF_PEFT_TYPE, AdapterConfig, from_peft
from ..layers.adapted import AdaptedLayer, Replaced
from ..layers.kinds import target_of
from ..layers.weights import format_name, is_quantised, passes_gradients
from .heads import warn_of_new_weights, with_task_head
from .record import (
    ADAPTERS_ATTRIBUTE,
    AdaptedModel,
    Adapters,
    AttachedAdapter,
    adapted_models,
    attached_adapter,
    refuse_if_disabled,
    refuse_if_merged,
)
from .targets import base_modules, find_targets, matches
from .unmatched import warn_of_unmatched


def inject(
    model: nn.Module,
    config: AdapterConfig,
    *,
    adapter_name: str = "default",
    bank: VectorBank | str | os.PathLike | None = None,
    freeze_bank: bool = False,
) -> nn.Module:
    """Adapts a model in place: wraps its target layers, freezes everything else, and adds one adapter for all of them.

    The adapter becomes the module ``model.vblora[adapter_name]``, whose parameters train (of VB-LoRA ``logits`` ``(S, M)`` and
    ``bank.vectors`` ``(h, b)``); so do copies of the biases and ``modules_to_save`` that the config names. The originals come
    back with :func:`eject`, and for as long as the adapter is :func:`disabled`. Nothing is changed if anything is refused.

    A model takes several adapters, of other methods, configs and layers, each with its name. The first is active; another runs
    and trains once it is made so by :func:`set_adapter`.

    Args:
        model: any module. For a Hugging Face model the config may leave ``target_modules`` to its architecture's default.
        config: what to adapt, and how: a :class:`VBLoRAConfig`, :class:`VeraConfig`, :class:`TiedLoraConfig` or
            :class:`LoraConfig`; or PEFT's config object of one of these methods.
        adapter_name: by which the adapter is activated, merged, saved and deleted.
        bank: of VB-LoRA: a bank to share with other adapters, or the path of its file (:meth:`VectorBank.save`), instead of a
            new one. Its size must be the config's.
        freeze_bank: of VB-LoRA: leave the bank as it is; the logits alone train. An adapter whose bank is still its file's is
            saved without it.

    Cast the base model before, not after: the adapter is float32 then, and casting logits changes which vectors are chosen. A
    cast to half precision afterwards warns of that.

    Returns:
        The same model.

    Raises:
        ValueError: the model has an adapter of that name, is merged or disabled; nothing matches; a width that
            ``vector_length`` does not divide (without ``pad``); or a ``bank`` of another size, or for another method.
        TypeError: a match that takes no update or passes no gradient on, a quantised weight that would train, or a model that
            cannot be called.
        FileNotFoundError: there is no such file of a bank.

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
        if freeze_bank:
            adapter.bank.requires_grad_(False)
    elif bank is not None or freeze_bank:
        given = "bank" if bank is not None else "freeze_bank"
        raise ValueError(
            f"`{given}` applies only to VBLoRAConfig, but `config` is a {type(config).__name__}. Leave it out."
        )
    else:
        adapter = plan.new_adapter()
    warn_of_half_precision({name: parameter.dtype for name, parameter in adapter.named_parameters()})
    plan.carry_out(adapter)
    if config.inference_mode:
        attached_adapter(model, adapter_name).requires_grad_(False)
    return model


class Plan:
    """An adapter for a model, checked, without a change to the model so far.

    Attributes:
        adapter_class: of the config's method.
        config: the config, out of reach of what its owner does to it.
        targets: the layers, as an adapter sees them.
        stand_ins: copies of what trains beside the adapter, by their names in the model.
        device: where the adapter goes: that of the first layer whose weight is not offloaded.
    """

    def __init__(self, model: nn.Module, config: AdapterConfig, adapter_name: str = "default") -> None:
        self.adapter_class = adapter_class(config)
        if isinstance(model, (nn.ModuleList, nn.ModuleDict)):
            raise TypeError(
                f"`model` is a {type(model).__name__}, which is never called. Inject the model that holds it."
            )
        if hasattr(model, "_orig_mod"):
            raise TypeError("`model` is a compiled one. Inject the model first, then call torch.compile.")
        _check_name(adapter_name)
        self.model = model
        self.adapter_name = adapter_name
        self.record = next((record for record in adapted_models(model) if record.model is model), None)
        _check_model(model, self.record, adapter_name)
        self.config = dataclasses.replace(config)  # checked again
        modules = base_modules(model)
        self._found = find_targets(model, self.config)
        saved = _find_saved(list(modules), self.config)
        self.targets = tuple(target_of(names[0], layer) for layer, names in self._found.items())
        self.adapter_class.check_targets(self.config, self.targets)
        in_place = [] if self.record is None else self.record.in_place()
        for replaced in in_place:  # what is copied are the base model's
            replaced.swap()
        try:
            self.stand_ins = _stand_ins(modules, self.config, list(self._found), saved)
        finally:
            for replaced in in_place:
                replaced.swap()
        self.device = _device_of(list(self._found))

    def new_adapter(self, **given: object) -> Adapter:
        """An adapter for the targets, with what is ``given`` of it (``from_config`` of its class)."""
        return self.adapter_class.from_config(self.config, self.targets, device=self.device, **given)

    def check_trainable(self) -> None:
        """Refuses layers that would hand no gradient on to those before them.

        Raises:
            TypeError: named.
        """
        for layer, names in self._found.items():
            if not passes_gradients(layer.weight):
                raise TypeError(
                    f"`target_modules` matches `{names[0]}`, which also quantises its input ({format_name(layer.weight)}) and "
                    "passes no gradient on to the layers before it. Quantise weights only, as torchao's Int8WeightOnlyConfig "
                    "does, or load a trained adapter."
                )

    def carry_out(self, adapter: Adapter) -> nn.Module:
        """Changes the model, and returns it. A model's first adapter is active then; later ones wait to be."""
        model, record = self.model, self.record
        if record is None:
            record = AdaptedModel(model)
            model.requires_grad_(False)
            model.add_module(ADAPTERS_ATTRIBUTE, Adapters())
            model._vblora_adapted_model = record
            record.register_hooks()
        replaced = {name: Replaced(*place) for name, place in self.stand_ins.items()}
        layers = [record.wrap(layer, names) for layer, names in self._found.items()]
        record.add(AttachedAdapter(model, self.adapter_name, self.config, adapter, layers, replaced))
        warn_of_new_weights(model, {p for attached in record.adapters.values() for p in attached.parameters.values()})
        return model


def _check_name(name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"`adapter_name` is {name!r}, but must be a string.")
    if not name or "." in name or hasattr(Adapters, name) or name == "training":
        raise ValueError(f"`adapter_name` is {name!r}, which cannot name a module. Choose another.")


def _check_model(model: nn.Module, record: AdaptedModel | None, adapter_name: str) -> None:
    own = {} if record is None else record.names
    if any(isinstance(module, AdaptedLayer) and module not in own for module in model.modules()):
        raise ValueError(
            "`model` holds adapted layers already, of VBLinear or of a model within it that has an adapter. "
            "Take that out with vblora.eject first."
        )
    if record is None:
        if hasattr(model, ADAPTERS_ATTRIBUTE):
            raise ValueError(f"`model` has an attribute `{ADAPTERS_ATTRIBUTE}` of its own, where the adapter would go.")
        return
    if adapter_name in record.adapters:
        raise ValueError(
            f"`model` has an adapter {adapter_name!r} already. Give `adapter_name` to add another beside it, or take it out "
            "with vblora.delete_adapter or vblora.eject."
        )
    refuse_if_disabled(record.layers)
    refuse_if_merged(record.layers)


def _device_of(layers: list[nn.Module]) -> torch.device:
    """Of the first weight that is anywhere. What accelerate has offloaded is on the meta device until the layer runs, and where
    that will be its hook says."""
    devices = [layer.weight.device for layer in layers]
    hooks = [getattr(layer, "_hf_hook", None) for layer in layers]
    devices += [
        torch.device(hook.execution_device) for hook in hooks if getattr(hook, "execution_device", None) is not None
    ]
    return next((device for device in devices if device.type != "meta"), devices[0])


def _find_saved(names: list[str], config: AdapterConfig) -> list[str]:
    entries = config.modules_to_save or []
    saved = [name for entry in entries for name in names if name and matches(name, [entry])]
    if entries and not saved:
        raise ValueError(
            f"`modules_to_save` names {' and '.join(f'`{entry}`' for entry in entries)}, which matches no module of this model."
        )
    return saved


def _stand_ins(
    modules: dict[str, nn.Module], config: AdapterConfig, targets: list[nn.Module], saved: list[str]
) -> dict[str, tuple[nn.Module, str, torch.Tensor]]:
    """Copies of what trains beside the adapter, by their names in the model: whose they are, and called what there."""
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

    copies: dict[torch.Tensor, torch.Tensor] = {}  # what is tied stays tied
    stand_ins = {}
    for (module, name), full_name in places.items():
        tensor = getattr(module, name)
        if tensor.is_meta and getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise ValueError(f"`{full_name}` would train, but accelerate has offloaded it. Keep it on a device.")
        if is_quantised(tensor):
            raise TypeError(
                f"`{full_name}` would train, but is quantised ({format_name(tensor)}). Leave its module out."
            )
        if tensor not in copies:
            copy = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                copy = nn.Parameter(copy, requires_grad=copy.is_floating_point())
            copies[tensor] = copy
        stand_ins[full_name] = module, name, copies[tensor]
    return stand_ins
