"""Learning rates by what the model is, and a warning for optimizers far below VB-LoRA's, such as the Trainer's default."""

import math
import statistics
import warnings
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..adapters import Adapter, VBLoRAAdapter
from ..adapters.base import living_adapters
from ..distributed import gather_to_cpu
from ..errors import VBLoRAWarning

# The names of sets of rates; "paper" is VB-LoRA's alone. docs/training.md and docs/quality.md explain them.
RECIPES = tuple(VBLoRAAdapter.RATES)
_TUNED_WIDTH = 576  # of SmolLM2-135M
# The root mean square of a bank that is drawn up to 0.05. The rates of scales in RATES are for such a bank.
_SIZE_FOR_SCALES = 0.05 / math.sqrt(3)
WARM_UP = 0.02  # share of the steps that warm up; with more, a task that starts on a plateau stays there

# A learning rate is too low below this share of the lowest recipe's. The paper's logits need 20 epochs and more at 1e-2.
_TOO_LOW = 0.2

_checked: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()
_idle: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()
_stale: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()


def rates_of(
    recipe: str, model: nn.Module, methods: Iterable[type[Adapter]], widths: Sequence[int]
) -> dict[str, float]:
    """The learning rate of each group, by a recipe or by what the model is.

    Args:
        recipe: ``"auto"`` means that for what the model is. So do rates that a recipe lacks.
        methods: the classes of the adapters. Of two that have the same group, the lower rate counts.
        widths: numbers of input features of the adapted layers.
    """
    usual = "language" if _generates(model) else "default"
    narrowness = min(1.0, _TUNED_WIDTH / statistics.mode(widths)) if widths else 1.0
    rates: dict[str, float] = {}
    for method in methods:
        own = method.RATES.get(recipe, {})
        for name, rate in {**method.RATES[usual], **own}.items():
            if recipe == "language" or (usual == "language" and name not in own):
                rate *= narrowness ** method.FALLS.get(name, 0.0)
            rates[name] = min(rate, rates.get(name, rate))
    return rates


def rate_of_scales(rate: float, adapters: Iterable[Adapter]) -> float:
    """The learning rate of scales, from that for a bank drawn up to 0.05: a step of a scale moves A and B by a vector, so the
    largest bank decides. A collective call if a bank is sharded."""
    scaled = [adapter for adapter in adapters if isinstance(adapter, VBLoRAAdapter) and adapter.scales is not None]
    sizes = [gather_to_cpu(adapter.bank.vectors).float().square().mean().sqrt().item() for adapter in scaled]
    return min(1.0, rate * _SIZE_FOR_SCALES / max(sizes)) if any(sizes) else rate


def _generates(model: nn.Module) -> bool:
    """Whether the model, or a part of it, generates text."""
    asked = (getattr(module, "can_generate", None) for module in model.modules())  # transformers' name for it
    return any(can() for can in asked if callable(can))


def _check_step(optimizer: Optimizer, _args: tuple[object, ...], _kwargs: dict[str, object]) -> None:
    if torch.compiler.is_compiling():
        return
    # In each step: another adapter may have become the active one since the last.
    if not any(parameter.requires_grad for group in optimizer.param_groups for parameter in group["params"]):
        if optimizer not in _idle and any(living_adapters()):
            _idle.add(optimizer)
            warnings.warn(
                f"{type(optimizer).__name__} trains nothing: all its parameters are frozen. An optimizer that was made before "
                "vblora.inject, or for another adapter, does not train the active one. Build it from "
                "vblora.parameter_groups(model).",
                VBLoRAWarning,
                stacklevel=2,
            )
        return
    if optimizer not in _checked:
        _check_rates(optimizer)
    _check_inactive(optimizer)


def _check_inactive(optimizer: Optimizer) -> None:
    """Warns once of an adapter that is not active but has gradients, perhaps of zeros: momentum and decay still change it."""
    inactive = [adapter for adapter in living_adapters() if adapter.active is False]
    stale = {p for adapter in inactive for p in adapter.parameters() if p.grad is not None and not p.requires_grad}
    if (
        stale
        and optimizer not in _stale
        and any(p in stale for group in optimizer.param_groups for p in group["params"])
    ):
        _stale.add(optimizer)
        warnings.warn(
            f"{type(optimizer).__name__} has also changed an adapter that is not active, because its parameters still have "
            "gradients: of an earlier backward, or zeros, which momentum and weight decay do not stop at. Call "
            "optimizer.zero_grad(set_to_none=True) before vblora.set_adapter.",
            VBLoRAWarning,
            stacklevel=3,
        )


def _check_rates(optimizer: Optimizer) -> None:
    rates = [rate for group in optimizer.param_groups if (rate := _highest_rate(group)) is not None]
    if rates and max(rates) == 0:
        return  # the first step of a warm-up: the next one tells
    _checked.add(optimizer)
    group_of: dict[nn.Parameter, str] = {}
    for adapter in living_adapters():
        for name, parameters in adapter.groups().items():
            group_of.update(dict.fromkeys(parameters, name))
    low: dict[str, float] = {}
    for group in optimizer.param_groups:
        rate = _highest_rate(group)
        for parameter in group["params"]:
            name = group_of.get(parameter, "") if parameter.requires_grad else ""
            # None for scales, whose rate depends on the bank's size.
            lowest = VBLoRAAdapter.RATES["paper"].get(name, 0.0)
            if rate is not None and rate < _TOO_LOW * lowest:
                low[name] = rate
    if low:
        found = " and ".join(f"the {name} at {rate:.2g}" for name, rate in low.items())
        usual = VBLoRAAdapter.RATES["default"], VBLoRAAdapter.RATES["language"]
        wanted = " and ".join(
            f"the {name} at {min(rates[name] for rates in usual):.2g} to {max(rates[name] for rates in usual):.2g}"
            for name in low
        )
        warnings.warn(
            f"{type(optimizer).__name__} trains {found}, far below the recipe's learning rates ({wanted}): the adapter will "
            "hardly learn. Build the optimizer from vblora.parameter_groups(model); for transformers' Trainer, "
            "pass **vblora.integrations.transformers.trainer_arguments(model).",
            VBLoRAWarning,
            stacklevel=3,
        )


def _highest_rate(group: dict[str, object]) -> float | None:
    """The learning rate that a parameter group has, or the one from which its schedule starts or to which it rises."""
    rates = [group.get(name) for name in ("lr", "initial_lr", "max_lr")]
    return max((float(rate) for rate in rates if isinstance(rate, (int, float, torch.Tensor))), default=None)


register_optimizer_step_post_hook(_check_step)
