"""Optimizer groups and parameter counts."""

import warnings
from typing import Any, NamedTuple

from torch import nn

from ..adapters import Adapter
from ..distributed import reshard
from ..errors import VBLoRAWarning
from ..layers.adapted import AdaptedLayer
from .attached import AttachedAdapter
from .completeness import check_replacements
from .idle import frozen, refuse_merged
from .learning_rates import RECIPES, rate_of_scales, rates_of
from .lookup import adapted_models, refuse_if_disabled


def parameter_groups(
    model: nn.Module,
    *,
    recipe: str = "auto",
    lr_bank: float | None = None,
    lr_logits: float | None = None,
    lr_scales: float | None = None,
    lr_factors: float | None = None,
    lr_vectors: float | None = None,
    lr_other: float = 2e-3,
) -> list[dict[str, Any]]:
    """Groups the trainable parameters for an optimizer, with learning rates for AdamW.

    Only active adapters have trainable parameters. Logits get ``weight_decay=0``, because decay would also change logits that
    were never selected.

    Args:
        model: an injected model, or a module with :class:`VBLinear` layers.
        recipe: which learning rates the groups get whose rate you do not give. ``"language"`` is for models that generate text;
            its rates are lower for layers that are wider than 576. ``"default"`` is for all others. ``"auto"`` chooses one of
            the two. ``"paper"``, for VB-LoRA alone, is slow: with the rates of its appendix A.1, the paper trains 20 to 160
            epochs on GLUE.
        lr_bank, lr_logits: learning rates of VB-LoRA's bank (3e-3; up to 1.2e-2 for language models; the paper's is 1e-3) and
            logits (0.5; 0.4; 1e-2).
        lr_scales: learning rate of the scales of ``train_scales=True``. By default, it is 0.1 (up to 0.2 for language models)
            for a bank that was drawn up to 0.05, and less for larger vectors, since a step of a scale then moves A and B
            further.
        lr_factors: learning rate of LoRA's A and B (7e-4; up to 4e-3 for language models), and of the A and B that all layers of
            Tied-LoRA share (1.5e-3; up to 3e-3 for language models).
        lr_vectors: learning rate of VeRA's d and e (2e-2; up to 4e-2 for language models), and of Tied-LoRA's u and v (3e-2; at
            most that for language models).
        lr_other: learning rate of all other trainable parameters, such as biases and ``modules_to_save``.

    Returns:
        Parameter groups as torch's optimizers take them, each with ``name``, ``params`` and ``lr``: ``bank``, ``logits``,
            ``scales``, ``factors``, ``vectors`` and ``other``, without empty ones.

    Raises:
        ValueError: the recipe is unknown, the adapters are disabled, the model has no active adapter or a merged one, no
            parameter trains, or something replaced a module that an adapter trains.
    """
    if recipe not in ("auto", *RECIPES):
        raise ValueError(f"`recipe` is {recipe!r}; allowed are 'auto', {', '.join(map(repr, RECIPES))}.")
    reshard(model)
    layers = [module for module in model.modules() if isinstance(module, AdaptedLayer)]
    refuse_if_disabled(layers)
    refuse_merged(layers)
    for record in adapted_models(model):
        check_replacements(record, [attached for attached in record.adapters.values() if attached.active])
    adapters = _adapters(model)
    widths = [target.in_features for adapter in adapters for target in adapter.targets]
    rates = rates_of(recipe, model, map(type, adapters), widths)
    if "scales" in rates and lr_scales is None:
        rates["scales"] = rate_of_scales(rates["scales"], adapters)
    rates["other"] = lr_other
    given = {"bank": lr_bank, "logits": lr_logits, "scales": lr_scales, "factors": lr_factors, "vectors": lr_vectors}
    rates |= {name: rate for name, rate in given.items() if rate is not None}
    group_of = {
        parameter: name
        for adapter in adapters
        for name, parameters in adapter.groups().items()
        for parameter in parameters
    }
    groups: dict[str, dict[str, Any]] = {name: {"name": name, "params": [], "lr": rate} for name, rate in rates.items()}
    if "logits" in groups:
        groups["logits"]["weight_decay"] = 0.0
    idle = {p for attached in _attached(model) if not attached.active for p in attached.adapter.parameters()}
    idle -= group_of.keys()  # what is left requires gradients only for another model, which trains the same bank
    for parameter in model.parameters():
        if parameter.requires_grad and parameter not in idle:
            groups[group_of.get(parameter, "other")]["params"].append(parameter)
    _check_that_adapters_train(model, found=any(group["params"] for group in groups.values()))
    return [group for group in groups.values() if group["params"]]


def _check_that_adapters_train(model: nn.Module, found: bool) -> None:
    """Raises if no parameter trains, warns of an adapter of which none does."""
    idle = [
        attached.name
        for attached in _attached(model)
        if attached.active and not any(parameter.requires_grad for parameter in attached.adapter.parameters())
    ]
    if not found:
        raise ValueError(f"`model` has no parameter to train: {frozen(idle[0] if idle else 'default')}")
    for name in idle:
        warnings.warn(frozen(name), VBLoRAWarning, stacklevel=3)


class ParameterCount(NamedTuple):
    """What :func:`count_parameters` returns.

    Attributes:
        trainable: elements that an optimizer updates.
        stored: size of the trained adapters, as a number of float32 values.
    """

    trainable: int
    stored: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts the trainable parameters, and the values that the trained adapters store.

    VB-LoRA stores the bank, and k weights and k bank indices per sub-vector. An index counts as a fraction of a float32: 1/4 for
    up to 256 vectors, 1/2 for up to 32,768, otherwise 1. The other methods store their parameters, without VeRA's projections,
    which a key generates. Biases and ``modules_to_save`` of the adapters also count, frozen or not. Only active adapters count.

    Returns:
        A tuple ``(trainable, stored)``, with these names.

    Raises:
        ValueError: the model has no active adapter.
    """
    adapters = _adapters(model)
    tensors = {tensor: None for adapter in adapters for tensor in adapter.stored_tensors()}
    active = [attached for attached in _attached(model) if attached.active]
    extra = {swap.replacement: None for attached in active for swap in attached.extra.values()}
    stored = sum(tensor.numel() for tensor in (*tensors, *extra))
    stored += sum(adapter.stored_mixture_size() for adapter in adapters)
    return ParameterCount(sum(p.numel() for p in model.parameters() if p.requires_grad), stored)


def _attached(model: nn.Module) -> list[AttachedAdapter]:
    return [attached for record in adapted_models(model) for attached in record.adapters.values()]


def _adapters(model: nn.Module) -> list[Adapter]:
    """The active adapters of a model, those of :class:`VBLinear` layers included."""
    inactive = [attached.adapter for attached in _attached(model) if not attached.active]
    adapters = [m for m in model.modules() if isinstance(m, Adapter) and m not in inactive]
    if not adapters:
        names = [attached.name for attached in _attached(model)]
        mend = f"vblora.set_adapter(model, {names[0]!r})" if names else "vblora.inject(model, config)"
        raise ValueError(f"`model` has no active adapter: call {mend} first.")
    return adapters
