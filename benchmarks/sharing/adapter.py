"""The adapter of a variant."""

from typing import Any

from torch import nn

import vblora
from vblora.bank import VectorBank

from .variants import Variant


def adapt(
    model: nn.Module,
    variant: Variant,
    seed: int,
    bank: VectorBank,
    *,
    train_bank: bool,
) -> dict[str, dict[str, Any]]:
    """Gives the model an adapter and returns the optimizer's groups by name."""
    config = vblora.VBLoRAConfig(
        r=variant.r,
        num_vectors=bank.num_vectors,
        vector_length=bank.vector_length,
        topk=variant.topk,
        train_scales=variant.train_scales,
        seed=seed,
        target_modules="all-linear",
        modules_to_save=["classifier"],
    )
    vblora.inject(model, config, bank=bank, freeze_bank=not train_bank)
    groups = vblora.parameter_groups(
        model,
        lr_bank=variant.lr_bank,
        lr_logits=variant.lr_logits,
        lr_scales=variant.lr_scales,
        lr_other=variant.lr_head,
    )
    return {group.pop("name"): group for group in groups}
