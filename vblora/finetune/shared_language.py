"""Language models that share a bank: one model, and an adapter for each file of texts."""

import argparse
import copy
from collections.abc import Mapping
from typing import Any

import datasets
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, PreTrainedModel, Trainer

import vblora

from ..bank import VectorBank
from ..integrations.shared_bank import BANK_FILE
from . import injection, models
from .fingerprints import fingerprint
from .language import MAX_LENGTH, Rows, TokenLoss, make_encoder, refuse_head
from .shared_bank import Prepared, trainer_settings
from .task import LanguageTask


def prepare(arguments: argparse.Namespace, tasks: Mapping[str, LanguageTask], scratch: str) -> Prepared:
    """The models and rows of the files.

    Args:
        scratch: a folder for the rows as tokens.

    Raises:
        CommandError: the model or the adapters cannot be made, or a file has nothing to learn.
    """
    datasets.disable_progress_bars()
    name_of_base = next(iter(tasks.values())).model
    tokenizer = models.load_tokenizer(name_of_base)
    injection.check_fits(arguments, models.skeleton(AutoModelForCausalLM, name_of_base))
    encoders = {name: make_encoder(arguments, tokenizer, task) for name, task in tasks.items()}
    base = models.load_language_model(name_of_base, arguments.precision)
    length = models.max_length(arguments.max_length, MAX_LENGTH, tokenizer, base)
    by_name = _models(arguments, tasks, base)
    train: dict[str, datasets.Dataset] = {}
    held_out: dict[str, datasets.Dataset] = {}
    for number, (name, task) in enumerate(tasks.items()):
        for part, texts in ((train, task.train), (held_out, task.held_out)):
            rows = Rows(texts)
            part[name] = rows.tokenize(encoders[name], length, f"{scratch}/{number}-{len(part)}-{id(part)}")
            rows.report(length, "train-bank", f" of {name}")
    collate = DataCollatorForSeq2Seq(tokenizer)
    before: dict[str, float] = {}

    def loss(name: str) -> float:
        evaluator = _Evaluator(by_name[name], trainer_settings(arguments), collate, eval_dataset=held_out[name])
        return float(evaluator.evaluate()["eval_loss"])

    for name, model in by_name.items():
        with vblora.disabled(model):
            before[name] = loss(name)

    def measure(name: str) -> dict[str, float]:
        vblora.eject(by_name[name])
        vblora.load(by_name[name], arguments.output / name, bank=arguments.output / BANK_FILE)
        return {"loss_before": before[name], "loss_after": loss(name)}

    columns = {name: (name.replace("_", " "), "{:.4f}".format) for name in ("loss_before", "loss_after")}
    return Prepared(by_name, train, {name: len(rows) for name, rows in held_out.items()}, collate, measure, columns)


class _Evaluator(TokenLoss, Trainer):  # type: ignore[misc]  # transformers is not typed
    pass


def _models(
    arguments: argparse.Namespace, tasks: Mapping[str, LanguageTask], base: PreTrainedModel
) -> dict[str, PreTrainedModel]:
    """A model for each task. Their adapters share a bank, and all use the memory of one model."""
    about = fingerprint(base)
    tensors: dict[int, Any] = {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]}
    bank: VectorBank | None = None
    by_name = {}
    for name, task in tasks.items():
        task.fingerprint = about
        model = copy.deepcopy(base, dict(tensors))  # which are not copied
        injection.inject(arguments, model, bank=bank)
        refuse_head(model)
        bank = model.vblora.default.bank
        by_name[name] = model
    return by_name
