"""One run: an encoder from a folder, adapted, trained on one task, and scored on its development set."""

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

import vblora

from .methods import CONFIGS, Recipe
from .tasks import Example, Task

_BATCHES_SORTED_TOGETHER = 32
STEPS_A_LOSS = 50  # of which the mean is kept


@dataclass(frozen=True)
class Settings:
    model: Path
    epochs: int = 3
    batch_size: int = 16
    max_length: int = 128
    bfloat16: bool = True


def run(task: Task, recipe: Recipe, seed: int, settings: Settings) -> dict:
    """Trains and scores."""
    transformers.utils.logging.set_verbosity_error()  # that the head is new is no news
    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        settings.model, num_labels=len(task.labels) or 1, dtype=torch.float32
    )
    groups = _adapt(model, recipe, seed)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps = steps_of(task, settings)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(recipe.warm_up * steps), steps)
    train = _Batches(task.train, tokenizer, settings)
    trained = [parameter for group in groups for parameter in group["params"]]
    begin, losses = time.perf_counter(), []
    model.train()
    for epoch in range(settings.epochs):
        for batch, labels in train.shuffled(random.Random(f"{seed} {epoch}")):
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
                logits = model(**batch).logits.float()
            loss = _loss(logits, labels)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    seconds = time.perf_counter() - begin
    count = None if recipe.method is None else vblora.count_parameters(model)
    head = sum(p.numel() for p in model.classifier.parameters())
    return {
        "score": task.score(_predict(model, _Batches(task.dev, tokenizer, settings), settings)),
        "metric": task.metric,
        "stored": 0 if count is None else count.stored - head,
        "trainable": 0 if count is None else count.trainable - head,
        "seconds": seconds,
        "steps": steps,
        "losses": [round(float(part.mean()), 4) for part in torch.stack(losses).split(STEPS_A_LOSS)],
        "exhausted": _exhausted(model),
    }


def steps_of(task: Task, settings: Settings) -> int:
    return settings.epochs * math.ceil(len(task.train) / settings.batch_size)


def _adapt(model: nn.Module, recipe: Recipe, seed: int) -> list[dict]:
    if recipe.method is None:
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
        return [{"params": list(model.classifier.parameters()), "lr": recipe.rates.get("lr_other", 1e-3)}]
    fields = dict(recipe.config)
    if recipe.method == "vblora":
        fields.setdefault("seed", seed)
    vblora.inject(model, CONFIGS[recipe.method](modules_to_save=["classifier"], **fields))
    return vblora.parameter_groups(model, **recipe.rates)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.is_floating_point():
        return nn.functional.mse_loss(logits.squeeze(1), labels)
    return nn.functional.cross_entropy(logits, labels)


@torch.inference_mode()
def _predict(model: nn.Module, dev: "_Batches", settings: Settings) -> np.ndarray:
    model.eval()
    predicted = []
    for batch, _ in dev.in_order():
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
            logits = model(**batch).logits.float()
        predicted.append(logits.squeeze(1) if logits.shape[1] == 1 else logits.argmax(1))
    order = np.argsort(dev.by_length)
    return torch.cat(predicted).numpy()[order]


def _exhausted(model: nn.Module) -> int:
    adapters = [m for m in model.modules() if isinstance(m, vblora.adapters.VBLoRAAdapter)]
    return sum(int(a.exhausted.sum()) for a in adapters if a.exhausted is not None)


class _Batches:
    """Tokenised examples, in batches of like length."""

    def __init__(self, examples: list[Example], tokenizer, settings: Settings) -> None:
        texts = zip(*(example.texts for example in examples), strict=True)
        encoded = tokenizer(*map(list, texts), truncation=True, max_length=settings.max_length)
        self.rows = [{name: encoded[name][i] for name in encoded} for i in range(len(examples))]
        self.labels = torch.tensor([example.label for example in examples])
        self.by_length = sorted(range(len(examples)), key=self._length)
        self.tokenizer = tokenizer
        self.size = settings.batch_size

    def _length(self, row: int) -> int:
        return len(self.rows[row]["input_ids"])

    def _batch(self, rows: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        padded = self.tokenizer.pad([self.rows[row] for row in rows], return_tensors="pt")
        return dict(padded), self.labels[rows]

    def shuffled(self, rng: random.Random):
        order = list(range(len(self.rows)))
        rng.shuffle(order)
        together = self.size * _BATCHES_SORTED_TOGETHER
        batches = []
        for start in range(0, len(order), together):
            part = sorted(order[start : start + together], key=self._length)
            batches += [part[i : i + self.size] for i in range(0, len(part), self.size)]
        rng.shuffle(batches)
        yield from map(self._batch, batches)

    def in_order(self):
        size = 4 * self.size
        yield from (self._batch(self.by_length[i : i + size]) for i in range(0, len(self.by_length), size))
