"""What runs of every kind of model share: the adapter and its optimizer's groups, the precision, and batches of like length."""

import random
from collections.abc import Iterator

import torch
from torch import nn

import vblora

from .methods import CONFIGS, Recipe

_BATCHES_SORTED_TOGETHER = 32
STEPS_A_LOSS = 50  # of which the mean is kept


def adapt(model: nn.Module, recipe: Recipe, seed: int, head: list[str] | None = None) -> list[dict]:
    """Adapts the model as the recipe says. ``head`` names modules that train in full. Returns the optimizer's groups."""
    fields = dict(recipe.config)
    if recipe.method == "vblora":
        fields.setdefault("seed", seed)
    config = CONFIGS[recipe.method](modules_to_save=head, **fields)
    bank = _frozen_bank(config) if recipe.frozen_bank else None
    vblora.inject(model, config, bank=bank, freeze_bank=recipe.frozen_bank)
    return vblora.parameter_groups(model, **recipe.rates)


def _frozen_bank(config: vblora.VBLoRAConfig) -> vblora.VectorBank:
    bound = config.init_vector_bank_bound
    bank = vblora.VectorBank(config.num_vectors, config.vector_length)
    nn.init.uniform_(bank.vectors, -bound, bound, generator=torch.Generator().manual_seed(0))
    return bank


def exhausted(model: nn.Module) -> int:
    """How many rows of VB-LoRA's logits have used up their candidates."""
    adapters = [m for m in model.modules() if isinstance(m, vblora.adapters.VBLoRAAdapter)]
    return sum(int(a.exhausted.sum()) for a in adapters if a.exhausted is not None)


def mean_losses(losses: list[torch.Tensor]) -> list[float]:
    """The mean of each ``STEPS_A_LOSS`` steps."""
    return [round(float(part.mean()), 4) for part in torch.stack(losses).split(STEPS_A_LOSS)] if losses else []


def shuffled(lengths: list[int], size: int, rng: random.Random) -> Iterator[list[int]]:
    """An epoch: the indices of rows in batches of like length, in random order."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    together = size * _BATCHES_SORTED_TOGETHER
    batches = []
    for start in range(0, len(order), together):
        part = sorted(order[start : start + together], key=lengths.__getitem__)
        batches += [part[i : i + size] for i in range(0, len(part), size)]
    rng.shuffle(batches)
    yield from batches
