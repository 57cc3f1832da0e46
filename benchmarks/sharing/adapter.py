"""The adapter of a variant."""

from typing import Any

import torch
from torch import Tensor, nn

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
    start: dict[str, Tensor] | None,
) -> dict[str, dict[str, Any]]:
    """Gives the model an adapter and returns the optimizer's groups by name.

    Args:
        start: logits to begin with, and their candidates, instead of a draw.
    """
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
    if start is not None:
        adapter = model.vblora["default"]
        with torch.no_grad():
            adapter.logits.copy_(start["logits"])
            if adapter.candidates is not None:
                adapter.candidates.copy_(start["candidates"])
            if adapter.scales is not None:
                adapter.scales.fill_(1.0)
    groups = vblora.parameter_groups(
        model,
        lr_bank=variant.lr_bank,
        lr_logits=variant.lr_logits,
        lr_scales=variant.lr_scales,
        lr_other=variant.lr_head,
    )
    return {group.pop("name"): group for group in groups}
