"""One run: an adapter on one task, or a bank on several."""

import math
import random
import time
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from vblora.bank import VectorBank
from vblora.model.learning_rates import WARM_UP

from ..quality.adapting import Optimization, deployed_bytes, mean_losses, round_bank
from ..quality.tasks import Task
from ..quality.training import Settings, _Batches, _loss, _predict
from .adapter import adapt
from .variants import Variant


def run(task: Task, variant: Variant, seed: int, settings: Settings, shared: Tensor | None = None) -> dict[str, Any]:
    """Trains one adapter and scores it on ``task.dev``."""
    tokenizer = _begin(seed, settings)
    own = variant.bank == "own"
    bank = _bank(variant, seed, shared)
    model = _model(task, settings)
    groups = [*adapt(model, variant, seed, bank, train_bank=own).values()]
    begin = time.perf_counter()
    losses = _train([(task, model)], groups, seed, settings, tokenizer)
    seconds = time.perf_counter() - begin
    if variant.int8:
        round_bank(bank, torch.int8)
    score = task.score(_predict(model, _Batches(task.dev, tokenizer, settings), settings))
    return {
        "score": score,
        "metric": task.metric,
        "bytes": user_bytes(model, variant),
        "seconds": seconds,
        "losses": losses,
    }


def train_bank(tasks: list[Task], variant: Variant, seed: int, settings: Settings) -> tuple[Tensor, dict[str, Any]]:
    """Trains a bank and one adapter, with a head for each task, in batches that alternate."""
    tokenizer = _begin(seed, settings)
    bank = _bank(variant, seed, None)
    pairs: list[tuple[Task, nn.Module]] = []
    groups: list[dict] = []
    for task in tasks:
        model = _model(task, settings)
        own = adapt(model, variant, seed, bank, train_bank=True)
        if pairs:
            model.vblora["default"].logits = pairs[0][1].vblora["default"].logits
            own = {"other": own["other"]}  # the head
        groups += own.values()
        pairs.append((task, model))
    losses = _train(pairs, groups, seed, settings, tokenizer)
    scores = {t.name: t.score(_predict(model, _Batches(t.dev, tokenizer, settings), settings)) for t, model in pairs}
    return bank.vectors.detach(), {"scores": scores, "losses": losses}


def user_bytes(model: nn.Module, variant: Variant) -> int:
    return deployed_bytes(model, torch.int8 if variant.int8 else None, variant.bank != "own")


def _begin(seed: int, settings: Settings) -> Any:
    transformers.utils.logging.set_verbosity_error()  # that the head is new is no news
    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(seed)
    return AutoTokenizer.from_pretrained(settings.model)


def _bank(variant: Variant, seed: int, shared: Tensor | None) -> VectorBank:
    if variant.bank == "shared":
        assert shared is not None
        bank = VectorBank(*shared.shape)
        bank.vectors.data.copy_(shared)
        return bank
    bank = VectorBank(variant.num_vectors, variant.vector_length)
    generator = torch.Generator().manual_seed(1000 + (seed if variant.bank == "own" else 0))
    uniform = torch.rand(bank.vectors.shape, generator=generator)
    bank.vectors.data = (2 * uniform - 1) * variant.bound
    return bank


def _model(task: Task, settings: Settings) -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(
        settings.model, num_labels=len(task.labels) or 1, dtype=torch.float32
    )


def _train(
    pairs: list[tuple[Task, nn.Module]], groups: list[dict], seed: int, settings: Settings, tokenizer: Any
) -> list[list[float]]:
    """Trains all models with one optimizer. Returns each task's loss, as means of 25 steps."""
    batches = [_Batches(task.train, tokenizer, settings) for task, _ in pairs]
    steps = settings.epochs * sum(math.ceil(len(task.train) / settings.batch_size) for task, _ in pairs)
    optimization = Optimization(groups, WARM_UP, steps)
    losses: list[list[Tensor]] = [[] for _ in pairs]
    for _, model in pairs:
        model.train()
    for epoch in range(settings.epochs):
        of_task = [list(part.shuffled(random.Random(f"{seed} {epoch}"))) for part in batches]
        order = [index for index, part in enumerate(of_task) for _ in part]
        random.Random(f"order {seed} {epoch}").shuffle(order)
        iterators = [iter(part) for part in of_task]
        for index in order:
            batch, labels = next(iterators[index])
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
                logits = pairs[index][1](**batch).logits.float()
            losses[index].append(optimization.step(_loss(logits, labels)))
    return [mean_losses(of_task, 25) for of_task in losses]
