"""What runs of every kind of model share: the adapter, its optimization, what it takes to store, and batches of like length."""

import math
import random
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

import vblora
from vblora.bank import VectorBank, decode_vectors, encode_vectors
from vblora.checkpoint.save_load import contents_of
from vblora.model.lookup import attached_adapter

from .methods import CONFIGS, Recipe

_BATCHES_SORTED_TOGETHER = 32
STEPS_A_LOSS = 50  # of which the mean is kept
NOTHING = {"stored": 0, "bytes": 0, "trainable": 0}


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


class Optimization:
    """AdamW without weight decay, whose rates rise in a warm-up and then fall to 0, for gradients that are clipped.

    Args:
        warm_up: the share of ``steps``.
    """

    def __init__(self, groups: list[dict], warm_up: float, steps: int) -> None:
        self._trained = [parameter for group in groups for parameter in group["params"]]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self._schedule = get_linear_schedule_with_warmup(self._optimizer, math.ceil(warm_up * steps), steps)

    def step(self, loss: Tensor) -> Tensor:
        """Takes a step, and returns the loss without its graph."""
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return loss.detach()


def as_stored(model: nn.Module, recipe: Recipe, head: int = 0) -> dict[str, int]:
    """What a user stores, without the ``head``'s parameters. A bank that a file holds rounded is rounded in the model, too."""
    dtype = recipe.bank_dtype and getattr(torch, recipe.bank_dtype)
    if dtype:
        round_bank(attached_adapter(model).adapter.bank, dtype)
    count = vblora.count_parameters(model)
    return {
        "stored": count.stored - recipe.shared - head,
        "bytes": deployed_bytes(model, dtype, recipe.frozen_bank),
        "trainable": count.trainable - head,
    }


def round_bank(bank: VectorBank, dtype: torch.dtype) -> None:
    """Makes the bank what is read from a file that ``vblora.save`` wrote with this ``bank_dtype``."""
    bank.vectors.data = decode_vectors(encode_vectors(bank.vectors.data, dtype)).float()


def deployed_bytes(model: nn.Module, bank_dtype: torch.dtype | None, frozen_bank: bool) -> int:
    """What a user stores besides the head: the tensors of a deploy form. A frozen bank is not the user's own."""
    tensors = contents_of(attached_adapter(model)).encode("deploy", bank_dtype, None)
    return sum(tensor.nbytes for name, tensor in tensors.items() if not (frozen_bank and name.startswith("bank.")))


def exhausted(model: nn.Module) -> int:
    """How many rows of VB-LoRA's logits have used up their candidates."""
    adapters = [m for m in model.modules() if isinstance(m, vblora.adapters.VBLoRAAdapter)]
    return sum(int(a.exhausted.sum()) for a in adapters if a.exhausted is not None)


def mean_losses(losses: list[Tensor], steps: int = STEPS_A_LOSS) -> list[float]:
    """The means of ``steps`` losses each."""
    return [round(float(part.mean()), 4) for part in torch.stack(losses).split(steps)] if losses else []


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
