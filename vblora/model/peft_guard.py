"""Keeps vblora's adapters and PEFT's off the same model: each would adapt the other's layers and freeze its parameters."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from ..layers.adapted import AdaptedLayer

# PEFT's modules that stand for modules of the base model, by the names of their classes, so that peft need not be installed.
_CLASSES = {("peft.tuners.tuners_utils", "BaseTunerLayer"), ("peft.utils.other", "AuxiliaryTrainingWrapper")}


def refuse_peft_layers(model: nn.Module) -> None:
    """Refuses a model that holds layers of PEFT's.

    Raises:
        ValueError: there is one. The message names it.
    """
    for name, module in model.named_modules():
        if any((kind.__module__, kind.__name__) in _CLASSES for kind in type(module).__mro__):
            raise ValueError(
                f"`model` holds PEFT's adapter: `{name}` is PEFT's {type(module).__qualname__}. To keep that adapter in the "
                "weights, pass what peft_model.merge_and_unload() returns; to drop it, what peft_model.unload() returns. To use "
                "it in vblora, write it with peft_model.save_pretrained(folder), and call vblora.load(base_model, folder)."
            )


def guard_from_peft() -> None:
    """Has PEFT refuse models with adapted layers, if it is imported. This stays, and costs a search of the modules."""
    check_before("peft.tuners.tuners_utils", "BaseTuner", "inject_adapter", _refuse_adapted_layers)
    check_before("peft.peft_model", "PeftModel", "add_adapter", _refuse_prompts_if_adapter_trains)


def check_before(module: str, kind: str, name: str, check: Callable[..., None]) -> None:
    """Has a method of another package call ``check`` first, with the same arguments."""
    owner = getattr(sys.modules.get(module), kind, None)
    own = getattr(owner, name, None)
    if own is None or hasattr(own, "_is_checked_by_vblora"):
        return

    @wraps(own)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return own(*args, **kwargs)

    vars(checked)["_is_checked_by_vblora"] = True
    setattr(owner, name, checked)


def _refuse_adapted_layers(_tuner: object, model: nn.Module, *_: Any, **__: Any) -> None:
    if any(isinstance(module, AdaptedLayer) for module in model.modules()):
        raise ValueError(
            "`model` holds adapters of vblora, which PEFT would freeze and adapt. To add another adapter, call "
            "vblora.inject(model, config, adapter_name=...), which also takes PEFT's config objects. To use PEFT, call "
            "vblora.eject(model) first."
        )


def _refuse_prompts_if_adapter_trains(peft_model: Any, adapter_name: str, peft_config: Any, *_: Any, **__: Any) -> None:
    """Prompt and prefix tuning freeze the model, and save the prompts alone. That is right for an adapter that does not train."""
    if not getattr(peft_config, "is_prompt_learning", False):
        return
    layers = [module for module in peft_model.base_model.modules() if isinstance(module, AdaptedLayer)]
    adapters = {update.slot.adapter for layer in layers for update in layer.updates.values()}
    if any(parameter.requires_grad for adapter in adapters for parameter in adapter.parameters()):
        raise ValueError(
            f"`model` holds an adapter of vblora that trains, which PEFT's {type(peft_config).__name__} would freeze. Train one "
            "after the other: vblora.save(model, folder), then vblora.load(base_model, folder), and PEFT on that."
        )
