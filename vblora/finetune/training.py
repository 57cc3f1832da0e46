"""The part of ``vblora finetune`` that needs transformers: train, save, evaluate, load into a fresh model, compare."""

import argparse
import inspect
import math
import tempfile
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PredictionOutput

import vblora

from ..adapters.vblora import default_length
from ..errors import CommandError
from ..integrations.transformers import VBLoRACallback
from ..layers.kinds import target_of
from ..model.learning_rates import WARM_UP
from ..model.record import attached_adapter
from ..model.targets import find_targets
from .baseline import Example, frozen_accuracy
from .data import Row
from .report import Results, folder_bytes, lora_bytes, print_table
from .task import Task, most_frequent, save_results

_MAX_LENGTH = 128
# What configurations call the number of positions that a model can tell apart.
_POSITION_LIMITS = ("max_position_embeddings", "max_encoder_position_embeddings", "max_seq_len")


def run(arguments: argparse.Namespace, task: Task) -> int:
    """Trains and evaluates as the arguments of ``vblora finetune`` say. Returns the exit code.

    Raises:
        CommandError: the model or the adapter cannot be made, training diverges or is interrupted, or the saved adapter
            predicts something else than the trained one.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading weights; the Trainer has its own
    set_seed(arguments.seed)
    tokenizer = _load_tokenizer(task.model)
    model = _load_model(task, tokenizer)
    max_length = _max_length(arguments.max_length, tokenizer, model)
    _inject(arguments, model)
    train = _tokenize(task.train, task.labels, tokenizer, model, max_length)
    held_out = _tokenize(task.held_out, task.labels, tokenizer, model, max_length)
    held_out.sort(key=lambda row: len(row["input_ids"]))  # less padding
    collate = DataCollatorWithPadding(tokenizer)
    with tempfile.TemporaryDirectory(prefix="vblora-") as scratch:  # the Trainer requires a folder, and writes nothing
        settings = _training_arguments(arguments, scratch, len(train))
        optimizers = _optimizer(arguments, model, len(train))
        trainer = _Trainer(model, settings, collate, train, optimizers=optimizers, callbacks=[VBLoRACallback()])
        _train(arguments, task, trainer)
        try:
            after = trainer.predict(held_out, metric_key_prefix="eval")
            fresh = _load_model(task, tokenizer)
            frozen = None
            if not arguments.no_baseline:
                fresh.to(settings.device)
                frozen = frozen_accuracy(
                    fresh,
                    _head(fresh),
                    train,
                    held_out,
                    collate,
                    epochs=arguments.epochs,
                    bfloat16=settings.bf16,
                    seed=arguments.seed,
                )
            vblora.load(fresh, arguments.output, bank=arguments.bank)
            again = _Trainer(fresh, settings, collate).predict(held_out, metric_key_prefix="eval")
        except KeyboardInterrupt:
            raise CommandError(f"interrupted; the trained adapter is in {arguments.output}.", 130) from None
    results = _results(arguments, task, trainer, after, frozen)
    save_results(arguments, task, results=vars(results))
    print_table(results, Console())
    return _compare(arguments, after, again)


class _Trainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    def _get_train_sampler(self, train_dataset: list[Example] | None = None) -> LengthGroupedSampler:
        # Batches of similar length need less padding. The Trainer's own option for that was renamed, and also shuffles the
        # evaluation, whose predictions could not be compared row by row then.
        lengths = [len(row["input_ids"]) for row in self.train_dataset]
        return LengthGroupedSampler(self.args.train_batch_size, lengths=lengths)

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The logits alone: some models also return states, such as those of the encoder."""
        loss, outputs, labels = super().prediction_step(*args, **kwargs)
        return loss, outputs[0] if isinstance(outputs, tuple) else outputs, labels


def _train(arguments: argparse.Namespace, task: Task, trainer: Trainer) -> None:
    """Trains and saves the adapter, also after Ctrl-C if a step was done by then."""
    interrupted = False
    try:
        trainer.train()
    except KeyboardInterrupt:
        if not trainer.state.global_step:
            raise
        interrupted = True
        # ends the progress bar's line
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    done = trainer.state.global_step
    if not all(parameter.isfinite().all() for parameter in trainer.model.parameters() if parameter.requires_grad):
        raise CommandError(
            "training diverged: a parameter is no longer finite. Lower --lr-bank, --lr-logits, --lr-head.", 1
        )
    try:
        vblora.save(trainer.model, arguments.output)
        save_results(arguments, task, steps=done)
    except OSError as error:
        raise CommandError(f"--output: the adapter cannot be written: {error}.", 1) from None
    if interrupted:
        raise CommandError(
            f"interrupted after step {done} of {trainer.state.max_steps}; the adapter as it was then is in {arguments.output}.",
            130,
        )


def _results(
    arguments: argparse.Namespace, task: Task, trainer: Trainer, after: PredictionOutput, frozen: float | None
) -> Results:
    adapter = attached_adapter(trainer.model).adapter
    count = vblora.count_parameters(trainer.model)
    own = {id(parameter) for parameter in adapter.parameters()}
    head_size = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad and id(p) not in own)
    layers = [(target.in_features, target.out_features) for target in adapter.targets]
    seconds = next(entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry)
    return Results(
        train_rows=len(task.train),
        held_out_rows=len(task.held_out),
        most_frequent=most_frequent(task.held_out),
        frozen=frozen,
        adapted=float((after.predictions.argmax(-1) == after.label_ids).mean()),
        trainable=count.trainable,
        stored=count.stored,
        file_bytes=folder_bytes(arguments.output),
        lora_bytes=lora_bytes(layers, head_size),
        seconds_per_step=seconds / trainer.state.global_step,
        steps=trainer.state.global_step,
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
        f"Loaded from {arguments.output} into a fresh model: the same logits, to the bit, for {equal:,} of {rows:,} rows."
    )
    return 0


def _load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise CommandError(f"--model: no tokenizer can be loaded from {model!r}: {_first_sentence(error)}") from None
    if tokenizer.pad_token is None:  # as with most decoders
        if tokenizer.eos_token is None:
            raise CommandError(
                f"--model: the tokenizer of {model!r} has neither a padding token nor an end-of-text token to pad with."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_model(task: Task, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            task.model,
            id2label=dict(enumerate(task.labels)),
            label2id={label: index for index, label in enumerate(task.labels)},
            problem_type="single_label_classification",
            ignore_mismatched_sizes=True,  # replaces the head of another task
            dtype=torch.float32,  # the head trains; --precision says what layers compute in
        )
    except (OSError, ValueError, KeyError) as error:
        raise CommandError(
            f"--model: no sequence classifier can be loaded from {task.model!r}: {_first_sentence(error)}"
        ) from None
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False  # nothing is generated
    return model


def _head(model: PreTrainedModel) -> list[str]:
    """The names of the modules that turn the encoder's output into classes: all but the encoder."""
    encoder = model.base_model
    head = [name for name, child in model.named_children() if child is not encoder and list(child.parameters())]
    if encoder is model or not head:
        raise CommandError(
            f"--model: {type(model).__name__} has no head apart from its encoder, which this command needs."
        )
    return head


def _max_length(wanted: int | None, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    limit = min([tokenizer.model_max_length, *_position_limits(model)])
    if wanted is not None and wanted > limit:
        raise CommandError(f"--max-length: is {wanted}, but this model reads at most {limit} tokens.")
    return wanted or min(_MAX_LENGTH, limit)


def _position_limits(model: PreTrainedModel) -> list[int]:
    """How many tokens the model's positions allow; nothing for a model without a limit, such as T5 or XLNet."""
    config = model.config.get_text_config()
    stated = [getattr(config, name, None) for name in _POSITION_LIMITS]
    limits = [limit for limit in stated if isinstance(limit, int) and limit > 0]  # XLNet states -1
    for name, module in model.named_modules():
        # RoBERTa and its like count positions from the one after that of padding.
        if name.endswith("position_embeddings") and isinstance(getattr(module, "padding_idx", None), int):
            limits.append(module.weight.shape[0] - module.padding_idx - 1)
    return limits


def _inject(arguments: argparse.Namespace, model: PreTrainedModel) -> None:
    targets = arguments.target_modules
    try:
        config = vblora.VBLoRAConfig(
            r=arguments.r,
            num_vectors=arguments.num_vectors,
            topk=arguments.topk,
            num_candidates=arguments.num_candidates,
            pad=arguments.pad,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            modules_to_save=_head(model),
        )
        if arguments.vector_length is not None:
            config.vector_length = arguments.vector_length
        else:
            layers = tuple(target_of(names[0], layer) for layer, names in find_targets(model, config).items())
            config.vector_length = default_length(layers, config.pad)
        vblora.inject(model, config, bank=arguments.bank, freeze_bank=arguments.bank is not None)
    except FileNotFoundError as error:
        raise CommandError(f"--bank: {error}") from None
    except (TypeError, ValueError) as error:
        raise CommandError(f"the adapter does not fit {type(model).__name__}: {error}") from None


def _tokenize(
    rows: list[Row], labels: list[str], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, max_length: int
) -> list[Example]:
    pairs = None if rows[0].pair is None else [row.pair for row in rows]
    encoded = tokenizer([row.text for row in rows], pairs, truncation=True, max_length=max_length)
    accepted = inspect.signature(model.forward).parameters  # some tokenizers return more than the model accepts
    names = [name for name in encoded if name in accepted]
    index = {label: number for number, label in enumerate(labels)}
    return [{**{name: encoded[name][i] for name in names}, "labels": index[row.label]} for i, row in enumerate(rows)]


def _training_arguments(arguments: argparse.Namespace, folder: str, rows: int) -> TrainingArguments:
    settings = TrainingArguments(
        output_dir=folder,
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=max(64, arguments.batch_size),
        seed=arguments.seed,
        use_cpu=not torch.accelerator.is_available(),  # without it, bf16 is refused on the CPU
        bf16=arguments.precision == "bfloat16" or (arguments.precision == "auto" and _bfloat16_is_fast()),
        logging_steps=max(1, arguments.epochs * math.ceil(rows / arguments.batch_size) // 10),
        disable_tqdm=False,  # set_verbosity_error turns the progress bar off, too
        save_strategy="no",  # _train saves the adapter at the end
        remove_unused_columns=False,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    settings._n_gpu = min(1, settings.n_gpu)  # nn.DataParallel would copy the adapter at every step
    return settings


def _bfloat16_is_fast() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _optimizer(
    arguments: argparse.Namespace, model: PreTrainedModel, rows: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    groups = vblora.parameter_groups(
        model,
        recipe=arguments.recipe,
        lr_bank=arguments.lr_bank,
        lr_logits=arguments.lr_logits,
        lr_other=arguments.lr_head,
    )
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    steps = arguments.epochs * math.ceil(rows / arguments.batch_size)
    return optimizer, get_linear_schedule_with_warmup(optimizer, math.ceil(WARM_UP * steps), steps)


def _first_sentence(error: Exception) -> str:
    """The cause in a message of transformers, without the advice about the Hub that follows it."""
    text = " ".join(str(error).split())
    return text.split(". ")[0].rstrip(".") + "."
