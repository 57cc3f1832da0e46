"""Keeps vblora's adapters and PEFT's off the same model: each would adapt the other's layers and freeze its parameters."""

import sys
from functools import wraps
from typing import Any

from torch import nn

from ..layers.adapted import AdaptedLayer

# PEFT's modules that stand for modules of the base model, by the names of their classes, so that peft need not be installed.
_CLASSES = {("peft.tuners.tuners_utils", "BaseTunerLayer"), ("peft.utils.other", "AuxiliaryTrainingWrapper")}
_TUNERS, _TUNER = "peft.tuners.tuners_utils", "BaseTuner"


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
    tuner = getattr(sys.modules.get(_TUNERS), _TUNER, None)
    if tuner is None or hasattr(tuner.inject_adapter, "_refuses_adapted_layers"):
        return
    own = tuner.inject_adapter

    @wraps(own)
    def inject_adapter(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(module, AdaptedLayer) for module in model.modules()):
            raise ValueError(
                "`model` holds adapters of vblora, which PEFT would freeze and adapt. To add another adapter, call "
                "vblora.inject(model, config, adapter_name=...), which also takes PEFT's config objects. To use PEFT, call "
                "vblora.eject(model) first."
            )
        return own(self, model, *args, **kwargs)

    vars(inject_adapter)["_refuses_adapted_layers"] = True
    tuner.inject_adapter = inject_adapter
