"""Warns if the reference model of TRL's trainers, such as DPOTrainer, is without the adapter that training starts from."""

import inspect
import warnings

from torch import nn
from transformers import Trainer, TrainingArguments

from ..errors import VBLoRAWarning
from ..model.attached import AttachedAdapter
from ..model.lookup import adapted_models


def reference_model(args: TrainingArguments) -> nn.Module | None:
    """The reference model of the trainer with these arguments that is calling; None if it has none.

    A trainer passes its callbacks everything but itself and this model, so look for it among the callers.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and caller.args is args:
            found = getattr(caller, "ref_model", None)
            return found if isinstance(found, nn.Module) else None
        frame = frame.f_back
    return None


def warn_of_reference(model: nn.Module, reference: nn.Module, args: TrainingArguments) -> None:
    """Call it as training begins."""
    if getattr(args, "precompute_ref_log_probs", False):  # by the model itself, before it trains
        return
    theirs = _active(reference)
    for attached in _active(model):
        if attached.has_learned and not any(_is_like(attached, other) for other in theirs):
            ways = ["merge the adapter into the base model and inject a new one"]
            if hasattr(args, "precompute_ref_log_probs"):  # the trainer has an argument `ref_model`, too
                ways = [
                    "pass `ref_model=copy.deepcopy(model)`",
                    "set `precompute_ref_log_probs=True` in the arguments",
                    *ways,
                ]
            warnings.warn(
                f"{type(args).__name__} compares the model with a reference model, which TRL makes from the base model's files: "
                f"without adapter {attached.name!r}, which is already trained. For a reference with it, {', or '.join(ways)}. "
                "See docs/how-to/trainers.md.",
                VBLoRAWarning,
                stacklevel=3,
            )


def _active(model: nn.Module) -> list[AttachedAdapter]:
    return [record.adapters[name] for record in adapted_models(model) for name in record.active]


def _is_like(attached: AttachedAdapter, other: AttachedAdapter) -> bool:
    return type(other.adapter) is type(attached.adapter) and other.adapter.targets == attached.adapter.targets
