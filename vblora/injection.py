"""An adapter for a whole model: putting it in, taking it out, and what trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from .adapters import Adapter, Target, VBLoRAAdapter
from .bank import VectorBank
from .config import VBLoRAConfig
from .layers import AdaptedLinear, Replaced, compute_dtype, widths
from .targets import find_targets, matches

ADAPTER_NAME = "vblora"  # of the adapter among an injected model's modules


class Injection:
    """What is remembered of an injected model: to run it, to save it, and to undo it."""

    def __init__(self, model: nn.Module, config: VBLoRAConfig, adapter: Adapter) -> None:
        self.config = config
        self.adapter = adapter
        self.layers: list[AdaptedLinear] = []  # in the order of the adapter's targets
        self.names: list[list[str]] = []  # of each layer; it has several if the model uses it in several places
        self.replaced: dict[str, Replaced] = {}  # what trains beside the adapter, by its name in the model
        self.trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.hooks = [
            model.register_forward_pre_hook(self._begin_forward),
            model.register_forward_hook(self._end_forward, always_call=True),
        ]

    def _begin_forward(self, _model: nn.Module, _args: tuple) -> None:
        first = self.layers[0].weight
        self.adapter.begin_forward(compute_dtype(first.device, first.dtype))

    def _end_forward(self, _model: nn.Module, _args: tuple, _output: object) -> None:
        self.adapter.end_forward()


def injection_of(model: nn.Module) -> Injection:
    """The record of an injected model.

    Raises:
        ValueError: the model has no adapter.
    """
    record = getattr(model, "_vblora_injection", None)
    if record is None:
        raise ValueError("`model` has no adapter: call vblora.inject(model, config) first.")
    return record


def inject(model: nn.Module, config: VBLoRAConfig, *, bank: VectorBank | None = None) -> nn.Module:
    """Adapts a model in place: wraps its target layers, freezes everything else, and adds one adapter for all of them.

    The adapter becomes the module ``model.vblora``, whose parameters ``logits`` ``(S, h)`` and ``bank.vectors`` ``(h, b)``
    train; so do copies of the biases and ``modules_to_save`` that the config names. The originals come back with
    :func:`eject`, and for as long as the adapter is :func:`disabled`. Nothing is changed if anything is refused.

    Args:
        model: any module. For a Hugging Face model the config may leave ``target_modules`` to its architecture's default.
        config: what to adapt, and how.
        bank: a bank to share with other adapters, instead of a new one. Its size must be the config's.

    Returns:
        The same model.

    Raises:
        ValueError: the model is adapted already, nothing matches, a width that ``vector_length`` does not divide, or a
            ``bank`` of another size.
        TypeError: a match that is no linear layer.

    Example::

        model = vblora.inject(model, vblora.VBLoRAConfig(r=4, num_vectors=256, vector_length=64))
        optimizer = torch.optim.AdamW(vblora.parameter_groups(model))
    """
    if not isinstance(config, VBLoRAConfig):
        raise TypeError(f"`config` is a {type(config).__name__}; it must be a vblora.VBLoRAConfig.")
    if getattr(model, "_vblora_injection", None) is not None:
        raise ValueError("`model` has an adapter already. Take it out with vblora.eject(model) first.")
    if hasattr(model, ADAPTER_NAME):
        raise ValueError(f"`model` has an attribute `{ADAPTER_NAME}` of its own, where the adapter would go.")
    found = find_targets(model, config)
    saved = _find_saved(model, config)
    targets = [Target(names[0], *widths(layer)) for layer, names in found.items()]
    adapter = _new_adapter(config, targets, bank, next(iter(found)).weight.device)

    record = Injection(model, config, adapter)
    trained_beside = _trained_beside(model, config, list(found), saved)
    model.requires_grad_(False)
    copies: dict[torch.Tensor, torch.Tensor] = {}  # what is tied stays tied
    for full_name, (module, name) in trained_beside.items():
        tensor = getattr(module, name)
        if tensor not in copies:
            copy = tensor.detach().clone()
            copies[tensor] = nn.Parameter(copy) if isinstance(tensor, nn.Parameter) else copy
        record.replaced[full_name] = Replaced(module, name, copies[tensor])
    for slot, (layer, names) in zip(adapter.slots, found.items(), strict=True):
        wrapper = AdaptedLinear(layer, slot, config.vblora_dropout)
        record.layers.append(wrapper)
        record.names.append(names)
        for name in names:
            _set_module(model, name, wrapper)
    model.add_module(ADAPTER_NAME, adapter)
    model._vblora_injection = record
    return model


def eject(model: nn.Module) -> nn.Module:
    """Takes the adapter out of a model, which is then as it was before :func:`inject`, bit for bit.

    After ``merge(model, release=True)`` it is the merged model instead, with trained biases and ``modules_to_save``.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no adapter.
    """
    record = injection_of(model)
    if not any(_is_released(layer) for layer in record.layers):
        for layer in record.layers:
            layer.unmerge()
        for replaced in record.replaced.values():
            replaced.swap()
    for layer, names in zip(record.layers, record.names, strict=True):
        for name in names:
            _set_module(model, name, layer.base_layer)
    for hook in record.hooks:
        hook.remove()
    delattr(model, ADAPTER_NAME)
    del model._vblora_injection
    model.requires_grad_(False)
    for name in record.trainable:
        model.get_parameter(name).requires_grad_(True)
    return model


def merge(model: nn.Module, *, release: bool = False) -> nn.Module:
    """Adds each layer's update to its weight, so that the model runs at the base model's speed.

    The sum is formed in float32 (float64 for a float64 weight) and rounded once to the weight's dtype. Each merged layer gets
    a weight of its own: one that is tied to another layer's leaves that layer alone.

    Args:
        model: an injected model, or any module that holds :class:`VBLinear` layers.
        release: keep nothing of the old weights. By default they are kept beside the merged ones, so that :func:`unmerge`
            brings them back bit for bit; that costs the memory of the targets' weights once more. A released merge
            cannot be undone; follow it with :func:`eject` for a plain model.

    Returns:
        The same model.

    Raises:
        ValueError: no adapted layers, one that is merged already, or an update with an infinite or NaN element. Nothing
            is merged then.
        TypeError: a base weight that is not floating point.
    """
    layers = _adapted_layers(model)
    for name, layer in layers:
        if layer.merged:
            raise ValueError(f"layer `{name}` is merged already. Call vblora.unmerge(model) first.")
        if not layer.weight.is_floating_point():
            raise TypeError(f"layer `{name}` has a weight of {layer.weight.dtype}, which cannot be merged into.")
        if not layer.delta_weight().isfinite().all():
            raise ValueError(f"the update of layer `{name}` is not finite: its adapter is broken. Nothing was merged.")
    for _, layer in layers:
        layer.merge(release)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Brings back the weights that :func:`merge` set aside, bit for bit. A model that is not merged is left as it is.

    Raises:
        ValueError: the weights were released.
    """
    layers = _adapted_layers(model)
    for name, layer in layers:
        if _is_released(layer):
            raise ValueError(f"layer `{name}` was merged with release=True, which kept nothing to go back to.")
    for _, layer in layers:
        layer.unmerge()
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within it the model is the base model: no updates, merged or not, and the base's own biases and ``modules_to_save``.

    Raises:
        ValueError: no adapted layers, or weights that were merged with ``release=True``.
    """
    layers = [layer for _, layer in _adapted_layers(model)]
    if any(_is_released(layer) for layer in layers):
        raise ValueError("`model` was merged with release=True: its base weights are gone.")
    record = getattr(model, "_vblora_injection", None)
    active = [layer for layer in layers if layer.enabled]
    swapped = [layer.unmerged for layer in active if layer.unmerged is not None]
    if record is not None and active:  # not again where it is disabled already
        swapped += record.replaced.values()
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


def parameter_groups(
    model: nn.Module, *, lr_bank: float = 1e-3, lr_logits: float = 1e-2, lr_other: float = 1e-3
) -> list[dict]:
    """Trainable parameters as optimizer groups, with the paper's learning rates for bank and logits (its appendix B).

    Logits get ``weight_decay=0``: decay moves all of a row's logits, those included that were never selected.

    Args:
        model: an injected model, or any module that holds :class:`VBLinear` layers.
        lr_bank, lr_logits: learning rates of the vector bank and of the logits.
        lr_other: learning rate of everything else that trains: biases, ``modules_to_save``.

    Returns:
        Groups named ``bank``, ``logits`` and ``other``, without those that would be empty.
    """
    adapters = _adapters(model)
    bank = {adapter.bank.vectors: None for adapter in adapters}
    logits = {adapter.logits: None for adapter in adapters}
    other = [parameter for parameter in model.parameters() if parameter not in bank and parameter not in logits]
    groups = [
        {"name": "bank", "params": list(bank), "lr": lr_bank},
        {"name": "logits", "params": list(logits), "lr": lr_logits, "weight_decay": 0.0},
        {"name": "other", "params": other, "lr": lr_other},
    ]
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    return [group for group in groups if group["params"]]


class ParameterCount(NamedTuple):
    trainable: int  # elements that an optimizer updates
    stored: int  # float32 values' worth that a trained adapter comes down to


def count_parameters(model: nn.Module) -> ParameterCount:
    """Trainable parameters, and what is left to store of them after training.

    Stored are the bank, k weights and k bank indices a sub-vector (an index counts as the fraction of a float32 that its
    smallest integer type takes: 1/4 up to 256 vectors, 1/2 up to 32,768, else 1), and all else that trains.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapters = _adapters(model)
    banks = {adapter.bank.vectors: None for adapter in adapters}
    own = {*banks, *(adapter.logits for adapter in adapters)}
    stored = sum(bank.numel() for bank in banks) + sum(p.numel() for p in parameters if p not in own)
    for adapter in adapters:
        index = 0.25 if adapter.bank.num_vectors <= 256 else 0.5 if adapter.bank.num_vectors <= 32768 else 1.0
        stored += round(adapter.num_subvectors * adapter.topk * (1 + index))
    return ParameterCount(sum(parameter.numel() for parameter in parameters), stored)


def _adapted_layers(model: nn.Module) -> list[tuple[str, AdaptedLinear]]:
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]
    if not layers:
        raise ValueError("`model` has no adapted layers: call vblora.inject(model, config) first.")
    return layers


def _adapters(model: nn.Module) -> list[VBLoRAAdapter]:
    adapters = [module for module in model.modules() if isinstance(module, VBLoRAAdapter)]
    if not adapters:
        raise ValueError("`model` has no adapter: call vblora.inject(model, config) first.")
    return adapters


def _is_released(layer: AdaptedLinear) -> bool:
    return layer.merged and layer.unmerged is None


def _new_adapter(
    config: VBLoRAConfig, targets: list[Target], bank: VectorBank | None, device: torch.device
) -> VBLoRAAdapter:
    size = (config.num_vectors, config.vector_length)
    if bank is None:
        bank = VectorBank(*size, config.init_vector_bank_bound, device=device)
    elif (bank.num_vectors, bank.vector_length) != size:
        raise ValueError(
            f"`bank` has {bank.num_vectors} vectors of length {bank.vector_length}, "
            f"but the config says `num_vectors`={size[0]}, `vector_length`={size[1]}."
        )
    return VBLoRAAdapter(targets, bank, r=config.r, topk=config.topk, init_logits_std=config.init_logits_std)


def _find_saved(model: nn.Module, config: VBLoRAConfig) -> list[str]:
    names = [name for name, _ in model.named_modules() if name]
    saved = []
    for entry in config.modules_to_save or []:
        matching = [name for name in names if matches(name, [entry])]
        if not matching:
            raise ValueError(f"`modules_to_save` names `{entry}`, which matches no module of this model.")
        saved += matching
    return saved


def _trained_beside(
    model: nn.Module, config: VBLoRAConfig, targets: list[nn.Module], saved: list[str]
) -> dict[str, tuple[nn.Module, str]]:
    """Parameters and buffers that train beside the adapter, by their names in the model: whose, and called what there."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for root in saved:
        for prefix, module in model.get_submodule(root).named_modules(prefix=root):
            for name in (*module._parameters, *module._buffers):
                if getattr(module, name) is not None:
                    found[f"{prefix}.{name}"] = module, name
    for prefix, module in model.named_modules():
        if module._parameters.get("bias") is None:
            continue
        if config.bias == "all" or (config.bias == "vblora_only" and module in targets):
            found[f"{prefix}.bias" if prefix else "bias"] = module, "bias"
    return found


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
