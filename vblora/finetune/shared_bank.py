"""``vblora train-bank``: several tables of labelled texts, one bank, an adapter for each."""

import argparse
import json
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import vblora

from ..bank import VectorBank
from ..errors import CommandError
from ..files import write_file
from ..integrations.shared_bank import BANK_FILE, SharedBankTrainer
from ..model.learning_rates import WARM_UP
from . import fitting, injection, models, training
from .baseline import Example
from .fingerprints import fingerprint
from .heads import Head, find_head
from .report import folder_bytes
from .task import Task, as_json, most_frequent, save_results

RESULTS_FILE = "train-bank.json"


class Result(NamedTuple):
    """``most_frequent`` and ``accuracy`` are of the held-out rows, ``adapter_bytes`` of the folder without the bank."""

    train_rows: int
    held_out_rows: int
    most_frequent: float
    accuracy: float
    adapter_bytes: int


def run(arguments: argparse.Namespace, tasks: Mapping[str, Task]) -> int:
    """Trains the bank and the adapters, saves them, and evaluates what was saved. Returns the exit code.

    Raises:
        CommandError: the model or the adapters cannot be made, training diverges or is interrupted, or nothing can be written.
    """
    models.quiet()
    set_seed(arguments.seed)
    tokenizer = models.load_tokenizer(next(iter(tasks.values())).model)
    training.check_fits(arguments, next(iter(tasks.values())).model)
    by_name = _models(arguments, tasks, tokenizer)
    train: dict[str, list[Example]] = {}
    held_out: dict[str, list[Example]] = {}
    for name, model in by_name.items():
        task = tasks[name]
        length = models.max_length(arguments.max_length, training.MAX_LENGTH, tokenizer, model)
        train[name], held_out[name] = training.examples(task, _head(task), tokenizer, model, length, "train-bank")
    steps = arguments.epochs * sum(math.ceil(len(rows) / arguments.batch_size) for rows in train.values())
    settings = _settings(arguments, steps)
    collate = DataCollatorWithPadding(tokenizer)
    trainer = SharedBankTrainer(
        by_name,
        settings,
        train_dataset=train,
        data_collator=collate,
        rates=fitting.rates(arguments) | {"lr_other": arguments.lr_head},
    )
    for name, task in tasks.items():
        task.fingerprint = fingerprint(by_name[name])
    fitting.warn_of_few_steps(arguments, sum(map(len, train.values())), steps, "train-bank")
    _train(arguments, trainer, tasks)
    results = {}
    with fitting.saved_in(arguments.output, "the bank and the adapters are"):
        for name, task in tasks.items():
            fresh = training.load_model(task.model, _head(task), tokenizer)
            vblora.load(fresh, arguments.output / name, bank=arguments.output / BANK_FILE)
            predicted = Trainer(fresh, settings, collate).predict(held_out[name])
            logits = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
            results[name] = Result(
                len(task.train),
                len(task.held_out),
                most_frequent(task.held_out),
                float((logits.argmax(-1) == predicted.label_ids).mean()),
                folder_bytes(arguments.output / name),
            )
        _report(arguments, tasks, results)
    return 0


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


def _settings(arguments: argparse.Namespace, steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(arguments.output),
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=max(64, arguments.batch_size),
        warmup_steps=WARM_UP,
        seed=arguments.seed,
        use_cpu=not torch.accelerator.is_available(),  # without it, bf16 is refused on the CPU
        bf16=models.computes_in_bfloat16(arguments.precision),
        logging_steps=max(1, steps // 10),
        disable_tqdm=False,  # models.quiet turns the progress bar off, too
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _train(arguments: argparse.Namespace, trainer: SharedBankTrainer, tasks: Mapping[str, Task]) -> None:
    """Trains and saves, also after Ctrl-C if a step was done by then."""
    interrupted = False
    fitting.show_progress(trainer)
    try:
        trainer.train()
    except KeyboardInterrupt:
        if not trainer.state.global_step:
            raise
        interrupted = True
        # ends the progress bar's line
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    fitting.check_finite(trainer)
    try:
        trainer.save_model(arguments.output)
        for name, task in tasks.items():  # what `vblora predict` needs besides the adapter
            save_results(
                _of_table(arguments, name, task), task, arguments.output / name, steps=trainer.state.global_step
            )
    except OSError as error:
        raise CommandError(f"--output: the bank cannot be written: {error}.", 1) from None
    if interrupted:
        raise CommandError(
            f"interrupted after step {trainer.state.global_step} of {trainer.state.max_steps}. {arguments.output} has the bank "
            "and the adapters of that step.",
            130,
        )


def _of_table(arguments: argparse.Namespace, name: str, task: Task) -> argparse.Namespace:
    """The arguments with which ``vblora finetune`` would read the table ``name``."""
    columns = {f"{part}_column": column for part, column in task.columns._asdict().items()}
    own = {"task": "classification", "data": dict(arguments.data)[name], **columns}
    return argparse.Namespace(**vars(arguments) | own)


def _report(arguments: argparse.Namespace, tasks: Mapping[str, Task], results: Mapping[str, Result]) -> None:
    bank = arguments.output / BANK_FILE
    report = {
        "model": next(iter(tasks.values())).model,
        "labels": {name: task.labels for name, task in tasks.items()},
        "arguments": as_json(arguments),
        "bank_bytes": bank.stat().st_size,
        "results": {name: result._asdict() for name, result in results.items()},
    }
    write_file(arguments.output / RESULTS_FILE, json.dumps(report, indent=2, default=str).encode() + b"\n")
    table = Table("data", "rows", "held out", "most frequent label", "accuracy", "adapter")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.train_rows:,}",
            f"{result.held_out_rows:,}",
            f"{result.most_frequent:.1%}",
            f"{result.accuracy:.1%}",
            f"{result.adapter_bytes / 1024:,.0f} KiB",
        )
    Console().print(table)
    print(
        f"The bank: {bank}, {report['bank_bytes'] / 1024:,.0f} KiB. An adapter of it: vblora finetune --bank {bank} ..."
    )
