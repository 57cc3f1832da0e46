"""Classifiers that share a bank: one encoder, and for each table an adapter with a head of its own."""

import argparse
from collections.abc import Mapping

import torch
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase, Trainer

import vblora

from ..bank import VectorBank
from ..integrations.shared_bank import BANK_FILE
from . import injection, models, training
from .baseline import Example
from .fingerprints import fingerprint
from .heads import Head, find_head
from .shared_bank import Prepared, percent, trainer_settings
from .task import Task, most_frequent


def prepare(arguments: argparse.Namespace, tasks: Mapping[str, Task], scratch: str) -> Prepared:
    """The models and rows of the tables.

    Raises:
        CommandError: the model or the adapters cannot be made.
    """
    base = next(iter(tasks.values())).model
    tokenizer = models.load_tokenizer(base)
    training.check_fits(arguments, base)
    by_name = _models(arguments, tasks, tokenizer)
    train: dict[str, list[Example]] = {}
    held_out: dict[str, list[Example]] = {}
    for name, model in by_name.items():
        task = tasks[name]
        task.fingerprint = fingerprint(model)
        length = models.max_length(arguments.max_length, training.MAX_LENGTH, tokenizer, model)
        train[name], held_out[name] = training.examples(task, _head(task), tokenizer, model, length, "train-bank")
    collate = DataCollatorWithPadding(tokenizer)

    def measure(name: str) -> dict[str, float]:
        fresh = training.load_model(base, _head(tasks[name]), tokenizer)
        vblora.load(fresh, arguments.output / name, bank=arguments.output / BANK_FILE)
        predicted = Trainer(fresh, trainer_settings(arguments), collate).predict(held_out[name])
        logits = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
        accuracy = float((logits.argmax(-1) == predicted.label_ids).mean())
        return {"most_frequent": most_frequent(tasks[name].held_out), "accuracy": accuracy}

    columns = {"most_frequent": ("most frequent label", percent), "accuracy": ("accuracy", percent)}
    return Prepared(by_name, train, {name: len(rows) for name, rows in held_out.items()}, collate, measure, columns)


def _head(task: Task) -> Head:
    return find_head(task.labels, task.scale)


def _models(
    arguments: argparse.Namespace, tasks: Mapping[str, Task], tokenizer: PreTrainedTokenizerBase
) -> dict[str, PreTrainedModel]:
    """A model for each task. Their adapters share a bank, and all use one encoder's memory."""
    by_name: dict[str, PreTrainedModel] = {}
    bank: VectorBank | None = None
    first: dict[str, nn.Parameter] = {}
    for name, task in tasks.items():
        model = training.load_model(task.model, _head(task), tokenizer)
        first = first or dict(model.named_parameters())
        for key, parameter in model.base_model.named_parameters(prefix=model.base_model_prefix):
            if torch.equal(parameter, first[key]):
                parameter.data = first[key].data
        injection.inject(arguments, model, modules_to_save=training.head_modules(model), bank=bank)
        bank = model.vblora.default.bank
        by_name[name] = model
    return by_name
