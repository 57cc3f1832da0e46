"""``vblora finetune`` for classes and scores: train, save, evaluate, load into a fresh model, compare."""

import argparse
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PredictionOutput

import vblora

from ..errors import CommandError
from ..integrations.transformers import trainer_arguments
from ..model.lookup import attached_adapter
from . import fitting, injection, models
from .baseline import Example, frozen_score
from .checkpoints import check_base
from .data import Row
from .fingerprints import fingerprint
from .heads import Head, find_head
from .notices import is_main_process, print_warning, processes
from .report import Results, folder_bytes, lora_bytes, print_table
from .task import Task, most_frequent, save_results

MAX_LENGTH = 128


def run(arguments: argparse.Namespace, task: Task, checkpoint: str | None) -> int:
    """Trains and evaluates as the arguments of ``vblora finetune`` say. Returns the exit code.

    Args:
        checkpoint: to go on from.

    Raises:
        CommandError: the model or the adapter cannot be made, training diverges or is interrupted, or the saved adapter
            predicts something else than the trained one.
    """
    models.quiet()
    set_seed(arguments.seed)
    tokenizer = models.load_tokenizer(task.model)
    head = find_head(task.labels, task.scale)
    check_fits(arguments, task.model)
    model = load_model(task.model, head, tokenizer)
    max_length = models.max_length(arguments.max_length, MAX_LENGTH, tokenizer, model)
    task.fingerprint = fingerprint(model)
    check_base(checkpoint, task)
    injection.inject(arguments, model, modules_to_save=head_modules(model))
    train, held_out = examples(task, head, tokenizer, model, max_length)
    held_out.sort(key=lambda row: len(row["input_ids"]))  # less padding
    collate = DataCollatorWithPadding(tokenizer)
    rows_of_a_step = arguments.batch_size * arguments.accumulate * processes()
    steps = arguments.epochs * math.ceil(len(train) / rows_of_a_step)
    settings = _training_arguments(arguments, head, steps)
    few = fitting.warn_of_few_steps(arguments, len(train), steps)
    how = trainer_arguments(model, **fitting.rates(arguments), lr_other=arguments.lr_head)

    def metrics(evaluation: EvalPrediction) -> dict[str, float]:
        return head.measure(evaluation.predictions, evaluation.label_ids)

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        # The mean over the rows of all batches of a step. A model's own loss for scores is that of one batch, and the Trainer
        # adds those up.
        mean: Tensor = head.loss(outputs.logits, labels)
        return mean if num_items_in_batch is None else mean * (len(labels) / num_items_in_batch)

    trainer = _Trainer(
        model, settings, collate, train, held_out, compute_metrics=metrics, compute_loss_func=loss, **how
    )
    seconds = fitting.fit(arguments, task, trainer, checkpoint)
    with fitting.saved_in(arguments.output):
        after = trainer.predict(held_out, metric_key_prefix="eval")
        fresh = load_model(task.model, head, tokenizer)
        frozen = None
        if arguments.baseline:
            fresh.to(settings.device)
            frozen = frozen_score(
                fresh,
                head_modules(fresh),
                train,
                held_out,
                collate,
                head,
                epochs=arguments.epochs,
                bfloat16=settings.bf16,
                seed=arguments.seed,
            )
        vblora.load(fresh, arguments.output, bank=arguments.bank)
        again = _Trainer(fresh, settings, collate, None, held_out).predict(held_out, metric_key_prefix="eval")
        if not is_main_process():
            return 0
        results = _results(arguments, task, head, trainer, after, frozen, seconds)
        results.warnings = [few] if few else []
        bank = fitting.draw(arguments, trainer)
        save_results(arguments, task, bank=bank, results=vars(results), log=trainer.state.log_history)
        print_table(results, Console())
        return _compare(arguments, after, again)


class _ByLength(LengthGroupedSampler):  # type: ignore[misc]  # transformers is not typed
    """Rows in an order in which batches are of similar length, which needs less padding.

    The seed and the epoch alone determine the order. So a resumed run continues with the rows that are left, and several
    processes agree on which rows are whose, whatever random numbers they have drawn for dropout. The Trainer's own option for
    that was renamed, and also shuffles the evaluation, whose predictions could not be compared row by row then.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(
            trainer.args.train_batch_size, lengths=[len(row["input_ids"]) for row in trainer.train_dataset]
        )
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        epoch = int(self.trainer.state.epoch or 0)
        self.generator = torch.Generator().manual_seed(self.trainer.args.seed + epoch)
        return iter(super().__iter__())


class _Trainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    def _get_train_sampler(self, train_dataset: list[Example] | None = None) -> "_ByLength":
        return _ByLength(self)

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The logits alone: some models also return states, such as those of the encoder."""
        loss, outputs, labels = super().prediction_step(*args, **kwargs)
        return loss, outputs[0] if isinstance(outputs, tuple) else outputs, labels


def _results(
    arguments: argparse.Namespace,
    task: Task,
    head: Head,
    trainer: Trainer,
    after: PredictionOutput,
    frozen: float | None,
    seconds: float | None,
) -> Results:
    adapter = attached_adapter(trainer.model).adapter
    count = vblora.count_parameters(trainer.model)
    own = {id(parameter) for parameter in adapter.parameters()}
    head_size = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad and id(p) not in own)
    layers = [(target.in_features, target.out_features) for target in adapter.targets]
    return Results(
        train_rows=len(task.train),
        held_out_rows=len(task.held_out),
        metric=head.metric,
        most_frequent=None if task.labels is None else most_frequent(task.held_out),
        frozen=frozen,
        adapted=head.measure(after.predictions, after.label_ids)[head.metric],
        metrics=head.measure(after.predictions, after.label_ids),
        trainable=count.trainable,
        stored=fitting.stored(arguments, trainer.model, count),
        file_bytes=folder_bytes(arguments.output),
        lora_bytes=lora_bytes(layers, head_size),
        seconds_per_step=seconds,
        steps=trainer.state.global_step,
        best_epoch=fitting.best_epoch(trainer),
    )


def _compare(arguments: argparse.Namespace, after: PredictionOutput, again: PredictionOutput) -> int:
    """Checks that the saved adapter in a fresh model predicts the same bits as the trained model. Returns the exit code."""
    rows = len(after.predictions)
    equal = int((after.predictions == again.predictions).all(-1).sum())
    same = int((after.predictions.argmax(-1) == again.predictions.argmax(-1)).sum())
    if equal < rows:
        raise CommandError(
            f"the adapter in {arguments.output}, loaded into a fresh model, gives other logits for {rows - equal} of {rows} "
            f"held-out rows and another label for {rows - same}.",
            1,
        )
    print(
        f"Loaded from {arguments.output} into a fresh model: the same logits, bit for bit, for {equal:,} of {rows:,} rows."
    )
    fitting.print_next(arguments, "predict", "--data FILE")
    return 0


def load_model(name: str, head: Head, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """An encoder with a head for these classes or scores."""
    model = models.load_model(
        AutoModelForSequenceClassification,
        name,
        "sequence classifier",
        **head.model_options(),
        ignore_mismatched_sizes=True,  # replaces the head of another task
        dtype=torch.float32,  # the head trains; --precision says what layers compute in
    )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False  # nothing is generated
    return model


def check_fits(arguments: argparse.Namespace, model: str) -> None:
    """Refuses an adapter that does not fit a model, before its weights are read.

    Raises:
        CommandError: it does not.
    """
    skeleton = models.skeleton(AutoModelForSequenceClassification, model)
    injection.check_fits(arguments, skeleton, None if skeleton is None else head_modules(skeleton))


def head_modules(model: PreTrainedModel) -> list[str]:
    """The names of the modules that turn the encoder's output into classes: all but the encoder."""
    encoder = model.base_model
    head = [name for name, child in model.named_children() if child is not encoder and list(child.parameters())]
    if encoder is model or not head:
        raise CommandError(
            f"--model: {type(model).__name__} has no head apart from its encoder, which this command needs."
        )
    return head


def tokenize(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, max_length: int
) -> tuple[list[Example], int]:
    """The model's inputs for each row, and how many rows were longer than ``max_length`` tokens."""
    pairs = None if rows[0].pair is None else [row.pair for row in rows]
    encoded = tokenizer([row.text for row in rows], pairs, truncation=True, max_length=max_length)
    accepted = inspect.signature(model.forward).parameters  # some tokenizers return more than the model accepts
    names = [name for name in encoded if name in accepted]
    cut = sum(bool(one.overflowing) for one in encoded.encodings or [])  # tokenizers in Python do not count
    return [{name: encoded[name][i] for name in names} for i in range(len(rows))], cut


def examples(
    task: Task,
    head: Head,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    max_length: int,
    command: str = "finetune",
) -> tuple[list[Example], list[Example]]:
    """The model's inputs and what its head is to learn, for each row to train and to evaluate on. Says how many were cut."""
    rows = task.train + task.held_out
    inputs, cut = tokenize(rows, tokenizer, model, max_length)
    warn_of_cut(cut, len(rows), max_length, command)
    found = [of_row | {"labels": head.target(row)} for of_row, row in zip(inputs, rows, strict=True)]
    return found[: len(task.train)], found[len(task.train) :]


def warn_of_cut(cut: int, rows: int, max_length: int, command: str) -> None:
    if cut:
        print_warning(
            f"{cut:,} of {rows:,} rows are longer than {max_length} tokens (--max-length), and the rest of them is not read.",
            command,
        )


def _training_arguments(arguments: argparse.Namespace, head: Head, steps: int) -> TrainingArguments:
    return fitting.training_arguments(
        TrainingArguments,
        arguments,
        per_device_eval_batch_size=max(64, arguments.batch_size),
        logging_steps=max(1, steps // 100),
        metric_for_best_model=f"eval_{head.metric}",
        greater_is_better=True,
        remove_unused_columns=False,
    )
