"""An adapter for a whole model: putting it in, switching it off, taking it out."""

import dataclasses
import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .adapters import Target, VBLoRAAdapter
from .adapters.vblora import Deployed, Trained, check_widths
from .bank import VectorBank
from .config import VBLoRAConfig
from .layers import AdaptedLinear, Replaced, adapted_layers, compute_dtype, widths
from .targets import find_targets, matches

ADAPTER_NAME = "vblora"  # of the adapter among an injected model's modules


class Injection:
    """What is remembered of an injected model: to run it, to save it, and to undo it."""

    def __init__(self, model: nn.Module, config: VBLoRAConfig, adapter: VBLoRAAdapter) -> None:
        self.model = model
        self.config = config
        self.adapter = adapter
        self.layers: list[AdaptedLinear] = []  # in the order of the adapter's targets
        self.names: list[list[str]] = []  # of each layer; it has several if the model uses it in several places
        self.replaced: dict[str, Replaced] = {}  # what trains beside the adapter, by its name in the model
        self.trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.hooks: list[RemovableHandle] = []

    def register_hooks(self) -> None:
        self.hooks = [
            self.model.register_forward_pre_hook(self._begin_forward),
            self.model.register_forward_hook(self._end_forward, always_call=True),
        ]

    def _begin_forward(self, _model: nn.Module, _args: tuple) -> None:
        if not any(layer.active for layer in self.layers):
            return
        self.adapter.begin_forward(compute_dtype(self.layers[0].weight.device, self._layers_dtype()))

    def _layers_dtype(self) -> torch.dtype:
        """The widest among the layers' dtypes. Remembered, but not in a graph, which would be another one then."""
        remember = not torch.compiler.is_compiling()
        dtype = self.adapter.compute_dtype if remember else None
        if dtype is None:
            dtype = functools.reduce(torch.promote_types, [layer.weight.dtype for layer in self.layers])
            if remember:
                self.adapter.compute_dtype = dtype
        return dtype

    def _end_forward(self, _model: nn.Module, _args: tuple, _output: object) -> None:
        self.adapter.end_forward()


def injections(model: nn.Module) -> list[Injection]:
    """The records of a model and of all within it."""
    return [module._vblora_injection for module in model.modules() if hasattr(module, "_vblora_injection")]


def injection_of(model: nn.Module) -> Injection:
    """The one record of an injected model, which may be wrapped in another (DDP, torch.compile).

    Raises:
        ValueError: there is none, or there are several.
    """
    records = injections(model)
    if not records:
        raise ValueError("`model` has no adapter: call vblora.inject(model, config) first.")
    if len(records) > 1:
        raise ValueError(f"`model` holds {len(records)} models with an adapter each. Pass one of those.")
    return records[0]


def refuse_if_disabled(layers: list[AdaptedLinear]) -> None:
    """For what would read or write the base model's tensors in the place of the adapted model's."""
    if not all(layer.enabled for layer in layers):
        raise ValueError("the adapter of `model` is disabled. Leave the block of `with vblora.disabled(model)` first.")


def inject(
    model: nn.Module,
    config: VBLoRAConfig,
    *,
    bank: VectorBank | str | os.PathLike | None = None,
    freeze_bank: bool = False,
) -> nn.Module:
    """Adapts a model in place: wraps its target layers, freezes everything else, and adds one adapter for all of them.

    The adapter becomes the module ``model.vblora``, whose parameters ``logits`` ``(S, M)`` and ``bank.vectors`` ``(h, b)``
    train; so do copies of the biases and ``modules_to_save`` that the config names. The originals come back with
    :func:`eject`, and for as long as the adapter is :func:`disabled`. Nothing is changed if anything is refused.

    Args:
        model: any module. For a Hugging Face model the config may leave ``target_modules`` to its architecture's default.
        config: what to adapt, and how.
        bank: a bank to share with other adapters, or the path of its file (:meth:`VectorBank.save`), instead of a new one. Its
            size must be the config's.
        freeze_bank: leave the bank as it is; the logits alone train. An adapter whose bank is still its file's is saved
            without it.

    Cast the base model before, not after: bank and logits are float32 then, and casting logits changes which vectors are
    chosen.

    Returns:
        The same model.

    Raises:
        ValueError: the model is adapted already, nothing matches, a width that ``vector_length`` does not divide (without
            ``pad``), or a ``bank`` of another size.
        TypeError: a match that is no linear layer, or a model that cannot be called.
        FileNotFoundError: there is no such file of a bank.

    Example::

        model = vblora.inject(model, vblora.VBLoRAConfig(r=4, num_vectors=256, vector_length=64))
        optimizer = torch.optim.AdamW(vblora.parameter_groups(model))
    """
    plan = Plan(model, config)
    config = plan.config
    if config.topk == 1:
        warnings.warn(
            "`topk` is 1: the weight of a single bank vector is always 1, so logits get no gradient and never train. Take 2.",
            stacklevel=2,
        )
    size = (config.num_vectors, config.vector_length)
    if bank is None:
        pairs = config.init == "noop"
        bank = VectorBank(*size, config.init_vector_bank_bound, pairs=pairs, device=plan.device)
    elif not isinstance(bank, VectorBank):
        bank = VectorBank.from_file(bank, device=plan.device)
    if (bank.num_vectors, bank.vector_length) != size:
        raise ValueError(
            f"`bank` has {bank.num_vectors} vectors of length {bank.vector_length}, "
            f"but the config says `num_vectors`={size[0]}, `vector_length`={size[1]}."
        )
    return plan.carry_out(plan.new_adapter(bank), freeze_bank=freeze_bank)


class Plan:
    """An injection that has been checked and not been made.

    Attributes:
        config: the config, out of reach of what its owner does to it.
        targets: the layers, as an adapter sees them.
        stand_ins: copies of what trains beside the adapter, by their names in the model.
        device: where the adapter goes: that of the first layer whose weight is not offloaded.
    """

    def __init__(self, model: nn.Module, config: VBLoRAConfig) -> None:
        if not isinstance(config, VBLoRAConfig):
            raise TypeError(f"`config` is a {type(config).__name__}; it must be a vblora.VBLoRAConfig.")
        if isinstance(model, (nn.ModuleList, nn.ModuleDict)):
            raise TypeError(
                f"`model` is a {type(model).__name__}, which is never called. Inject the model that holds it."
            )
        if hasattr(model, "_orig_mod"):
            raise TypeError("`model` is a compiled one. Inject the model first, then call torch.compile.")
        if any(isinstance(module, AdaptedLinear) for module in model.modules()):
            raise ValueError("`model` has adapted layers already. Take them out with vblora.eject(model) first.")
        if hasattr(model, ADAPTER_NAME):
            raise ValueError(f"`model` has an attribute `{ADAPTER_NAME}` of its own, where the adapter would go.")
        self.model = model
        self.config = dataclasses.replace(config)  # checked again
        self._found = find_targets(model, self.config)
        saved = _find_saved(model, self.config)
        self.targets = tuple(Target(names[0], *widths(layer)) for layer, names in self._found.items())
        check_widths(self.targets, self.config.vector_length, self.config.pad)
        self.stand_ins = _stand_ins(model, self.config, list(self._found), saved)
        self.device = _device_of(list(self._found))

    def new_adapter(self, bank: VectorBank, rows: Trained | Deployed | None = None) -> VBLoRAAdapter:
        """An adapter for the targets, with ``rows`` that a file holds, or drawn ones."""
        config = self.config
        return VBLoRAAdapter(
            list(self.targets),
            bank,
            r=config.r,
            topk=config.topk,
            num_candidates=config.num_candidates,
            init_logits_std=config.init_logits_std,
            init=config.init,
            scaling=config.scaling,
            pad=config.pad,
            seed=config.seed,
            rows=rows,
        )

    def carry_out(self, adapter: VBLoRAAdapter, *, freeze_bank: bool = False) -> nn.Module:
        """Changes the model, and returns it."""
        model = self.model
        record = Injection(model, self.config, adapter)
        for slot, (layer, names) in zip(adapter.slots, self._found.items(), strict=True):
            record.layers.append(AdaptedLinear(layer, slot, self.config.vblora_dropout))
            record.names.append(names)
        # All is checked and made: from here on the model changes.
        model.requires_grad_(False)
        for full_name, (module, name, stand_in) in self.stand_ins.items():
            record.replaced[full_name] = Replaced(module, name, stand_in)
        for layer, names in zip(record.layers, record.names, strict=True):
            for name in names:
                _set_module(model, name, layer)
        if freeze_bank:
            adapter.bank.requires_grad_(False)
        model.add_module(ADAPTER_NAME, adapter)
        model._vblora_injection = record
        _keep_from_ddp(model, [f"{ADAPTER_NAME}.{name}" for name, _ in adapter.named_buffers()])
        record.register_hooks()
        return model


def eject(model: nn.Module) -> nn.Module:
    """Takes the adapter out of a model, whose parameters are then those from before :func:`inject`, bit for bit.

    After ``merge(model, release=True)`` it is the merged model instead, with trained biases and ``modules_to_save``. Buffers
    that forwards update, such as BatchNorm's statistics, stay as they are, but for those within ``modules_to_save``.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no adapter, it is disabled, or some layers only were merged with ``release=True``.
    """
    record = injection_of(model)
    refuse_if_disabled(record.layers)
    released = [layer.released for layer in record.layers]
    if any(released) and not all(released):
        raise ValueError("some layers of `model` are merged for good and some are not. Merge the others first.")
    if not any(released):
        for layer in record.layers:
            layer.unmerge()
        for replaced in record.replaced.values():
            replaced.swap()
    for layer, names in zip(record.layers, record.names, strict=True):
        for name in names:
            _set_module(record.model, name, layer.base_layer)
    for hook in record.hooks:
        hook.remove()
    delattr(record.model, ADAPTER_NAME)
    del record.model._vblora_injection
    _keep_from_ddp(record.model, [])
    record.model.requires_grad_(False)
    for name, parameter in record.model.named_parameters():
        if name in record.trainable:
            parameter.requires_grad_(True)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within it the model is the base model: no updates, merged or not, and the base's own biases and ``modules_to_save``.

    Do not copy or pickle the model within it: the copy would stay disabled.

    Raises:
        ValueError: no adapted layers, or weights that were merged with ``release=True``.
    """
    layers = [layer for _, layer in adapted_layers(model)]
    if any(layer.released for layer in layers):
        raise ValueError("`model` was merged with release=True: its base weights are gone.")
    active = [layer for layer in layers if layer.enabled]
    swapped = [layer.unmerged for layer in active if layer.unmerged is not None]
    if active:  # not again where it is disabled already
        swapped += [replaced for record in injections(model) for replaced in record.replaced.values()]
    for layer in active:
        layer.enabled = False
    for replaced in swapped:
        replaced.swap()
    try:
        yield model
    finally:
        for replaced in swapped:
            replaced.swap()
        for layer in active:
            layer.enabled = True


def _device_of(layers: list[nn.Module]) -> torch.device:
    """Of the first weight that is anywhere. What accelerate has offloaded is on the meta device until the layer runs, and where
    that will be its hook says."""
    devices = [layer.weight.device for layer in layers]
    hooks = [getattr(layer, "_hf_hook", None) for layer in layers]
    devices += [
        torch.device(hook.execution_device) for hook in hooks if getattr(hook, "execution_device", None) is not None
    ]
    return next((device for device in devices if device.type != "meta"), devices[0])


def _find_saved(model: nn.Module, config: VBLoRAConfig) -> list[str]:
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    saved = []
    for entry in config.modules_to_save or []:
        matching = [name for name in names if matches(name, [entry])]
        if not matching:
            raise ValueError(f"`modules_to_save` names `{entry}`, which matches no module of this model.")
        saved += matching
    return saved


def _stand_ins(
    model: nn.Module, config: VBLoRAConfig, targets: list[nn.Module], saved: list[str]
) -> dict[str, tuple[nn.Module, str, torch.Tensor]]:
    """Copies of what trains beside the adapter, by their names in the model: whose they are, and called what there."""
    places: dict[tuple[nn.Module, str], str] = {}
    for root in saved:
        for prefix, module in model.get_submodule(root).named_modules(prefix=root):
            for name in (*module._parameters, *module._buffers):
                if getattr(module, name) is not None:
                    places.setdefault((module, name), f"{prefix}.{name}")
    for prefix, module in model.named_modules():
        wanted = config.bias == "all" or (config.bias == "vblora_only" and module in targets)
        if wanted and module._parameters.get("bias") is not None:
            places.setdefault((module, "bias"), f"{prefix}.bias" if prefix else "bias")

    copies: dict[torch.Tensor, torch.Tensor] = {}  # what is tied stays tied
    stand_ins = {}
    for (module, name), full_name in places.items():
        tensor = getattr(module, name)
        if tensor.is_meta and getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise ValueError(f"`{full_name}` would train, but accelerate has offloaded it. Keep it on a device.")
        if tensor not in copies:
            copy = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                copy = nn.Parameter(copy, requires_grad=copy.is_floating_point())
            copies[tensor] = copy
        stand_ins[full_name] = module, name, copies[tensor]
    return stand_ins


def _keep_from_ddp(model: nn.Module, names: list[str]) -> None:
    """Has DDP leave the adapter's buffers alone, which it would send around at every forward: all processes have the same."""
    others = [
        name
        for name in getattr(model, "_ddp_params_and_buffers_to_ignore", ())
        if not name.startswith(f"{ADAPTER_NAME}.")
    ]
    if others + names:
        model._ddp_params_and_buffers_to_ignore = others + names
    else:
        vars(model).pop("_ddp_params_and_buffers_to_ignore", None)


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
