"""Warns if the reference model of TRL's trainers, such as DPOTrainer, is without the adapter that training starts from."""

import warnings
from typing import Any

from torch import nn

from ..adapters.base import Adapter, living_adapters
from ..errors import VBLoRAWarning
from ..model.record import AttachedAdapter, adapted_models


def warn_of_reference(model: nn.Module, args: Any) -> None:
    """Call it as training begins.

    Args:
        args: the trainer's arguments. A callback sees neither the trainer nor its reference model. So this takes a copy of the
            adapter in another model for that of a reference model.
    """
    if not getattr(args, "beta", 0.0) or not hasattr(args, "sync_ref_model"):  # there is no reference
        return
    if getattr(args, "precompute_ref_log_probs", False):  # by the model itself, before it trains
        return
    active = [record.adapters[name] for record in adapted_models(model) for name in record.active]
    own = {attached.adapter for attached in active}
    others = [adapter for adapter in living_adapters() if adapter not in own]
    for attached in active:
        if attached.has_learned and not any(_is_like(attached, other) for other in others):
            ways = ["merge the adapter into the base model and inject a new one"]
            if hasattr(args, "precompute_ref_log_probs"):  # the trainer has an argument `ref_model`, too
                ways = [
                    "pass `ref_model=copy.deepcopy(model)`",
                    "set `precompute_ref_log_probs=True` in the arguments",
                    *ways,
                ]
            warnings.warn(
                f"{type(args).__name__} compares the model with a reference model, which TRL makes from the base model's files: "
                f"without adapter {attached.name!r}, which has learned before. For a reference with it, {', or '.join(ways)}. "
                "See docs/how-to/trainers.md.",
                VBLoRAWarning,
                stacklevel=3,
            )


def _is_like(attached: AttachedAdapter, other: Adapter) -> bool:
    return type(other) is type(attached.adapter) and other.targets == attached.adapter.targets
