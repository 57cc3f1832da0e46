"""What trains, and what is left to store of it."""

import warnings
from typing import NamedTuple

from torch import nn

from ..adapters import Adapter
from ..distributed import reshard
from ..errors import VBLoRAWarning
from ..layers.adapted import AdaptedLayer
from .idle import frozen, refuse_merged
from .record import adapted_models, refuse_if_disabled

# Learning rates of the two groups of VB-LoRA. docs/training.md has what led to the default.
RECIPES = {
    "default": {"bank": 3e-3, "logits": 0.5},
    "paper": {"bank": 1e-3, "logits": 1e-2},  # its appendix B: for 20 to 80 epochs
}
WARM_UP = 0.02  # share of the steps over which they rise: longer, and a task that starts on a plateau stays there


def parameter_groups(
    model: nn.Module,
    *,
    recipe: str = "default",
    lr_bank: float | None = None,
    lr_logits: float | None = None,
    lr_factors: float = 7e-4,
    lr_vectors: float = 2e-2,
    lr_other: float = 2e-3,
) -> list[dict]:
    """Trainable parameters as optimizer groups, each with a learning rate for AdamW.

    Of several adapters those that are active have parameters to train.

    Logits get ``weight_decay=0``: decay moves all of a row's logits, those included that were never selected.

    Args:
        model: an injected model, or any module that holds :class:`VBLinear` layers.
        recipe: VB-LoRA's learning rates: ``"default"``, with which it learns within a few epochs, or ``"paper"``, those of its
            appendix B, for 20 to 80.
        lr_bank, lr_logits: learning rates of VB-LoRA's vector bank and of its logits, other than the recipe's.
        lr_factors: learning rate of LoRA's factors, and of the pair that Tied-LoRA shares.
        lr_vectors: learning rate of VeRA's and Tied-LoRA's vectors.
        lr_other: learning rate of everything else that trains: biases, ``modules_to_save``.

    Returns:
        Groups named ``bank``, ``logits``, ``factors``, ``vectors`` and ``other``, without those that would be empty.

    Raises:
        ValueError: no such recipe; or a model without an active adapter, with a merged one, or with nothing that trains.
    """
    if recipe not in RECIPES:
        raise ValueError(f"`recipe` is {recipe!r}; allowed are {', '.join(map(repr, RECIPES))}.")
    rates = RECIPES[recipe] | {"factors": lr_factors, "vectors": lr_vectors, "other": lr_other}
    given = {"bank": lr_bank, "logits": lr_logits}
    rates |= {name: rate for name, rate in given.items() if rate is not None}
    reshard(model)
    layers = [module for module in model.modules() if isinstance(module, AdaptedLayer)]
    refuse_if_disabled(layers)
    refuse_merged(layers)
    group_of = {
        parameter: name
        for adapter in _adapters(model)
        for name, parameters in adapter.groups().items()
        for parameter in parameters
    }
    groups = {name: {"name": name, "params": [], "lr": rate} for name, rate in rates.items()}
    groups["logits"]["weight_decay"] = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[group_of.get(parameter, "other")]["params"].append(parameter)
    _check_that_adapters_train(model, found=any(group["params"] for group in groups.values()))
    return [group for group in groups.values() if group["params"]]


def _check_that_adapters_train(model: nn.Module, found: bool) -> None:
    """Raises if no parameter trains, warns of an adapter of which none does."""
    idle = [
        attached.name
        for record in adapted_models(model)
        for attached in record.adapters.values()
        if attached.active and not any(parameter.requires_grad for parameter in attached.adapter.parameters())
    ]
    if not found:
        raise ValueError(f"`model` has no parameter to train: {frozen(idle[0] if idle else 'default')}")
    for name in idle:
        warnings.warn(frozen(name), VBLoRAWarning, stacklevel=3)


class ParameterCount(NamedTuple):
    trainable: int  # elements that an optimizer updates
    stored: int  # float32 values' worth that a trained adapter comes down to


def count_parameters(model: nn.Module) -> ParameterCount:
    """Trainable parameters, and what is left to store of them after training.

    Of VB-LoRA these are the bank, k weights and k bank indices a sub-vector (an index counts as the fraction of a float32 that
    its smallest integer type takes: 1/4 up to 256 vectors, 1/2 up to 32,768, else 1); of the others the adapter's parameters
    (VeRA's projections come from a key). Beside them the biases and ``modules_to_save`` that train, frozen or not. Of the
    adapters of an injected model, the active ones are counted.

    Raises:
        ValueError: the model has no adapter.
    """
    adapters = _adapters(model)
    whole = {tensor: None for adapter in adapters for tensor in adapter.stored_whole()}
    active = [i for record in adapted_models(model) for i in record.adapters.values() if i.active]
    beside = {replaced.stand_in: None for one in active for replaced in one.replaced.values()}
    stored = sum(tensor.numel() for tensor in (*whole, *beside))
    stored += sum(adapter.stored_mixtures() for adapter in adapters)
    return ParameterCount(sum(p.numel() for p in model.parameters() if p.requires_grad), stored)


def _adapters(model: nn.Module) -> list[Adapter]:
    resting = [i.adapter for record in adapted_models(model) for i in record.adapters.values() if not i.active]
    adapters = [m for m in model.modules() if isinstance(m, Adapter) and m not in resting]
    if not adapters:
        raise ValueError("`model` has no active adapter: call vblora.inject(model, config) first.")
    return adapters
