"""``vblora train-bank``: several files of rows, one bank, an adapter for each."""

import argparse
import json
import math
import shlex
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, TrainingArguments, set_seed

from ..errors import CommandError
from ..files import write_file
from ..integrations.shared_bank import BANK_FILE, SharedBankTrainer
from ..model.learning_rates import WARM_UP
from . import fitting, models
from .report import folder_bytes
from .task import LanguageTask, Task, as_json, finite, save_results

RESULTS_FILE = "train-bank.json"

Tasks = Mapping[str, Task | LanguageTask]  # by the names of their adapters


class Prepared(NamedTuple):
    """What is trained, by the names of the tables, and how it is measured.

    Attributes:
        held_out: how many rows each table has to evaluate on.
        measure: evaluates the saved adapter of a table.
        columns: of the closing table: for each result of ``measure`` its title, and how it is written.
    """

    models: dict[str, PreTrainedModel]
    train: Mapping[str, Any]
    held_out: dict[str, int]
    collate: Callable[[list[dict[str, Any]]], Any]
    measure: Callable[[str], dict[str, float]]
    columns: Mapping[str, tuple[str, Callable[[float], str]]]


def run(
    arguments: argparse.Namespace,
    tasks: Tasks,
    prepare: Callable[[argparse.Namespace, Any, str], Prepared],
) -> int:
    """Trains the bank and the adapters, saves them, and evaluates what was saved. Returns the exit code.

    Args:
        prepare: makes models and rows from the arguments, the tasks and a folder for temporary files.

    Raises:
        CommandError: the model or the adapters cannot be made, training diverges or is interrupted, or nothing can be written.
    """
    models.quiet()
    set_seed(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="vblora-") as scratch:
        prepared = prepare(arguments, tasks, scratch)
        sizes = [len(rows) for rows in prepared.train.values()]
        steps = arguments.epochs * sum(math.ceil(size / arguments.batch_size) for size in sizes)
        rates = fitting.rates(arguments)
        if arguments.lr_head is not None:
            rates["lr_other"] = arguments.lr_head
        trainer = SharedBankTrainer(
            prepared.models,
            trainer_settings(arguments, steps),
            train_dataset=prepared.train,
            data_collator=prepared.collate,
            rates=rates,
        )
        fitting.warn_of_few_steps(arguments, sum(sizes), steps, "train-bank")
        _train(arguments, trainer, tasks)
        with fitting.saved_in(arguments.output, "the bank and the adapters are"):
            results = {
                name: {
                    "train_rows": len(prepared.train[name]),
                    "held_out_rows": prepared.held_out[name],
                    **prepared.measure(name),
                    "adapter_bytes": folder_bytes(arguments.output / name),
                }
                for name in tasks
            }
            _report(arguments, tasks, results, prepared)
    return 0


def percent(share: float) -> str:
    return f"{share:.1%}"


def trainer_settings(arguments: argparse.Namespace, steps: int = 1) -> TrainingArguments:
    """The settings of the Trainer, which trains for that many steps or only evaluates."""
    return TrainingArguments(
        output_dir=str(arguments.output),
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size
        if arguments.task == "causal-lm"
        else max(64, arguments.batch_size),
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


def _train(arguments: argparse.Namespace, trainer: SharedBankTrainer, tasks: Tasks) -> None:
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


def _of_table(arguments: argparse.Namespace, name: str, task: Task | LanguageTask) -> argparse.Namespace:
    """The arguments with which ``vblora finetune`` would read the table ``name``."""
    columns = task.columns._asdict() if isinstance(task, Task) else task.columns.names
    every = {option for option in vars(arguments) if option.endswith("_column")}
    own = dict.fromkeys(every) | {f"{part}_column": column for part, column in columns.items()}
    return argparse.Namespace(**vars(arguments) | own | {"data": dict(arguments.data)[name]})


def _report(
    arguments: argparse.Namespace,
    tasks: Tasks,
    results: Mapping[str, Mapping[str, Any]],
    prepared: Prepared,
) -> None:
    bank = arguments.output / BANK_FILE
    report = {
        "model": next(iter(tasks.values())).model,
        "labels": {name: task.labels for name, task in tasks.items() if isinstance(task, Task)},
        "arguments": as_json(arguments),
        "bank_bytes": bank.stat().st_size,
        "results": results,
    }
    write_file(arguments.output / RESULTS_FILE, json.dumps(finite(report), indent=2, default=str).encode() + b"\n")
    titles = [title for title, _ in prepared.columns.values()]
    table = Table("data", "rows", "held out", *titles, "adapter")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result['train_rows']:,}",
            f"{result['held_out_rows']:,}",
            *(written(result[column]) for column, (_, written) in prepared.columns.items()),
            f"{result['adapter_bytes'] / 1024:,.0f} KiB",
        )
    Console().print(table)
    options = " --task causal-lm" if arguments.task == "causal-lm" else ""
    if arguments.model is not None:
        options += f" --model {shlex.quote(arguments.model)}"
    place = shlex.quote(str(bank))
    print(f"The bank: {bank}, {report['bank_bytes'] / 1024:,.0f} KiB.")
    print(f"Another adapter of it: vblora finetune{options} --bank {place} --data FILE")
