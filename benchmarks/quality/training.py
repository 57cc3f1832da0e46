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
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from .adapting import NOTHING, Optimization, adapt, as_stored, exhausted, mean_losses, shuffled
from .methods import Recipe
from .tasks import Example, Task


@dataclass(frozen=True)
class Settings:
    model: Path
    bfloat16: bool
    epochs: int = 3
    batch_size: int = 16
    max_length: int = 128


def run(task: Task, recipe: Recipe, seed: int, settings: Settings) -> dict:
    """Trains and scores."""
    transformers.utils.logging.set_verbosity_error()  # that the head is new is no news
    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        settings.model, num_labels=len(task.labels) or 1, dtype=torch.float32
    )
    groups = _train_the_head(model, recipe) if recipe.method is None else adapt(model, recipe, seed, ["classifier"])
    steps = steps_of(task, settings)
    optimization = Optimization(groups, recipe.warm_up, steps)
    train = _Batches(task.train, tokenizer, settings)
    begin, losses = time.perf_counter(), []
    model.train()
    for epoch in range(settings.epochs):
        for batch, labels in train.shuffled(random.Random(f"{seed} {epoch}")):
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
                logits = model(**batch).logits.float()
            losses.append(optimization.step(_loss(logits, labels)))
    seconds = time.perf_counter() - begin
    head = sum(p.numel() for p in model.classifier.parameters())
    stored = NOTHING if recipe.method is None else as_stored(model, recipe, head)
    score = task.score(_predict(model, _Batches(task.dev, tokenizer, settings), settings))
    return {
        "score": score,
        "scores": {task.metric: score},
        **stored,
        "seconds": seconds,
        "steps": steps,
        "losses": mean_losses(losses),
        "exhausted": exhausted(model),
    }


def steps_of(task: Task, settings: Settings) -> int:
    return settings.epochs * math.ceil(len(task.train) / settings.batch_size)


def _train_the_head(model: nn.Module, recipe: Recipe) -> list[dict]:
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    return [{"params": list(model.classifier.parameters()), "lr": recipe.rates["lr_other"]}]


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
        lengths = [self._length(row) for row in range(len(self.rows))]
        yield from map(self._batch, shuffled(lengths, self.size, rng))

    def in_order(self):
        size = 4 * self.size
        yield from (self._batch(self.by_length[i : i + size]) for i in range(0, len(self.by_length), size))
