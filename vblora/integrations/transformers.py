"""What a ``transformers.Trainer`` should know of an adapter."""

import warnings

import torch
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapters import VBLoRAAdapter
from ..candidates import moves_untouched, stats


class CandidatesCallback(TrainerCallback):
    """Warns, once each, where training with candidates is not what dense training would be: of an optimizer that moves logits
    which were never selected, when training begins, and of exhausted rows, when the Trainer logs or ends."""

    def __init__(self) -> None:
        self._warned = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        optimizer: Optimizer | None = None,
        **_,
    ) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper
        reason = None if optimizer is None or not _has_candidates(model) else moves_untouched(model, optimizer)
        if reason:
            warnings.warn(
                f"{reason} With candidates, training is then not the same as with all logits. "
                "See docs/candidates.md, or set `num_candidates=None`.",
                stacklevel=2,
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: torch.nn.Module, **_
    ) -> None:
        if self._warned or not _has_candidates(model):
            return
        found = stats(model)
        if found.exhausted:
            self._warned = True
            more = min(2 * found.num_candidates, found.num_vectors)
            warnings.warn(
                f"step {state.global_step}: {found.exhausted} of {found.num_subvectors} rows have used up their "
                f"{found.num_candidates} candidates, and may part from what dense training would do. "
                f"Take `num_candidates={more}`, or vblora.grow(model, {more}, optimizer) as it trains.",
                stacklevel=2,
            )

    on_train_end = on_log


def _has_candidates(model: torch.nn.Module) -> bool:
    return any(m.candidates is not None for m in model.modules() if isinstance(m, VBLoRAAdapter))
