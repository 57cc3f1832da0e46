"""What all tasks do with a Trainer: its settings, checkpoints, Ctrl-C, resuming, and the warning of too few steps."""

import argparse
import math
import shlex
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import vblora

from ..adapters import VBLoRAAdapter
from ..checkpoint.folder import read
from ..checkpoint.vblora import VBLoRAContents
from ..errors import CommandError
from ..files import is_failed_file
from ..model.learning_rates import WARM_UP
from ..model.lookup import attached_adapter
from ..model.parameters import ParameterCount
from . import pictures
from .bank_use import bank_use
from .checkpoints import incomplete, last_checkpoint, step_of
from .models import computes_in_bfloat16
from .notices import is_main_process, print_warning, processes, say
from .task import RESULTS_FILE, LanguageTask, Task, save_results

# On 300 rows the default recipe was 10 points below the frozen encoder after 10 steps, and 8 above it after 60.
_FEW_STEPS = 60
_FEW_EPOCHS = 20  # of a classifier with the paper's rates: its appendix A.1 trains 20 to 160 epochs on GLUE


def training_arguments(kind: type[TrainingArguments], arguments: argparse.Namespace, **options: Any) -> Any:
    """The Trainer's settings for the arguments of the command line: evaluates and saves after each epoch, keeps the best."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers has renamed gradient_checkpointing; TRL has not
        settings = _settings(kind, arguments, **options)
    settings._n_gpu = min(1, settings.n_gpu)  # nn.DataParallel would copy the adapter at every step
    return settings


def _settings(kind: type[TrainingArguments], arguments: argparse.Namespace, **options: Any) -> Any:
    return kind(
        output_dir=str(arguments.output),
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.accumulate,
        gradient_checkpointing=arguments.gradient_checkpointing,
        warmup_steps=WARM_UP,
        lr_scheduler_type="linear",
        seed=arguments.seed,
        use_cpu=not torch.accelerator.is_available(),  # without it, bf16 is refused on the CPU
        bf16=computes_in_bfloat16(arguments.precision),
        disable_tqdm=False,  # set_verbosity_error turns the progress bar off, too
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,  # the best, and the last to go on from
        load_best_model_at_end=True,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        **options,
    )


def rates(arguments: argparse.Namespace) -> dict[str, Any]:
    """The learning rates of the adapter, as :func:`vblora.parameter_groups` takes them."""
    return {name: getattr(arguments, name) for name in ("recipe", "lr_bank", "lr_logits", "lr_scales")}


def warn_of_few_steps(
    arguments: argparse.Namespace, rows: int, steps: int, command: str = "finetune", *, language: bool = False
) -> str | None:
    """Says so where training will be too short for the recipe's learning rates. Returns what it said.

    Args:
        language: whether it is a language model that trains. The paper trains these for 1 to 5 epochs.
    """
    if arguments.recipe == "paper" and not language:
        if arguments.epochs >= _FEW_EPOCHS:
            return None
        message = (
            "the paper's learning rates are slow: with them, it trains 20 to 160 epochs on GLUE, and this run has "
            f"{arguments.epochs}. Give --epochs {_FEW_EPOCHS}, or leave out --recipe paper."
        )
    else:
        if steps >= _FEW_STEPS:
            return None
        an_epoch = max(1, steps // arguments.epochs)
        message = (
            f"{steps} steps are few: the adapter may end below the model without it. Give --epochs "
            f"{math.ceil(_FEW_STEPS / an_epoch)} for {_FEW_STEPS} steps"
        )
        batches = getattr(arguments, "accumulate", 1) * processes()  # in each step
        smaller = rows * arguments.epochs // (_FEW_STEPS * batches)
        message += f", or --batch-size {smaller}." if 1 <= smaller < arguments.batch_size else "."
    print_warning(message, command)
    return message


def fit(
    arguments: argparse.Namespace, task: Task | LanguageTask, trainer: Trainer, checkpoint: str | None
) -> float | None:
    """Trains, from a checkpoint if there is one, and saves the adapter: the best of all epochs, or after Ctrl-C the last.

    Returns:
        Seconds a step, without evaluating and saving; None if nothing was left to train.

    Raises:
        CommandError: training diverged or was interrupted, or the adapter cannot be written.
    """
    output: Path = arguments.output
    stop = _Stop(arguments, task, trainer)
    progress = show_progress(trainer)
    trainer.add_callback(stop)
    trainer.add_callback(_Best(arguments.patience))
    if is_main_process():  # --overwrite: the Trainer would take old checkpoints for its own
        for folder in output.glob("checkpoint-*") if checkpoint is None else incomplete(output):
            shutil.rmtree(folder)
    interrupted = False
    try:
        with stop.on_signals(), _without_incomplete(output):
            trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        if not trainer.state.global_step:
            raise
        interrupted = True
        # ends the progress bar's line
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    except Exception as error:
        if not is_failed_file(error):
            raise
        raise CommandError(f"--output: a checkpoint cannot be written: {error}.", 1) from None
    check_finite(trainer)
    if checkpoint is not None and not progress.steps and not interrupted:
        print_warning(
            f"nothing was left to train: the run in {output} had reached its end. Give more --epochs to continue it."
        )
    done = trainer.state.global_step
    if is_main_process():
        try:
            with stop.on_signals():
                (output / RESULTS_FILE).unlink(missing_ok=True)  # its labels are of the adapter that this one replaces
                vblora.save(trainer.model, output)
                save_results(arguments, task, steps=done)
        except OSError as error:
            raise CommandError(f"--output: the adapter cannot be written: {error}.", 1) from None
    trainer.accelerator.wait_for_everyone()
    if interrupted or stop.stopped:
        raise CommandError(
            f"interrupted after step {done} of {trainer.state.max_steps}. {output} has the adapter of that step."
            + _go_on(trainer),
            130,
        )
    if stop.asked:
        raise CommandError(
            f"interrupted at the end of training. {output} has the trained adapter. Give the same command with --resume to "
            "evaluate it.",
            130,
        )
    return progress.seconds / progress.steps if progress.steps else None


@contextmanager
def _without_incomplete(output: Path) -> Iterator[None]:
    """Removes a checkpoint that is half written if the block raises."""
    try:
        yield
    except BaseException:
        if is_main_process():
            for folder in incomplete(output):
                shutil.rmtree(folder, ignore_errors=True)
        raise


def print_next(arguments: argparse.Namespace, command: str, what: str) -> None:
    """Prints the command that uses the trained adapter."""
    bank = "" if arguments.bank is None else f" --bank {shlex.quote(str(arguments.bank))}"
    print(f"Use it with: vblora {command} --adapter {shlex.quote(str(arguments.output))}{bank} {what}")


def _go_on(trainer: Trainer) -> str:
    """What --resume would do after an interruption."""
    last = last_checkpoint(Path(trainer.args.output_dir))
    if last is None:
        return ""
    step = step_of(last)
    what = "evaluate it" if step == trainer.state.max_steps else f"continue from step {step}"
    return f" Give the same command with --resume to {what}."


@contextmanager
def saved_in(output: Path, what: str = "the trained adapter is") -> Iterator[None]:
    """Within it, Ctrl-C ends the command with the message that what was trained is saved."""
    try:
        yield
    except KeyboardInterrupt:
        raise CommandError(f"interrupted; {what} in {output}.", 130) from None


def show_progress(trainer: Trainer) -> "_Progress":
    """Has a Trainer show a progress bar with the loss, in place of what it prints itself."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    progress = _Progress()
    trainer.add_callback(progress)
    return progress


def draw(arguments: argparse.Namespace, trainer: Trainer) -> dict[str, Any]:
    """Draws training.png and bank.png into the output folder, if matplotlib is installed. Returns numbers on the bank's use."""
    contents, _ = read(
        arguments.output, None if arguments.bank is None else vblora.VectorBank.from_file(arguments.bank)
    )
    assert isinstance(contents, VBLoRAContents)
    use = bank_use(contents)
    if pictures.can_draw():
        pictures.draw_training(trainer.state.log_history, arguments.output / "training.png")
        pictures.draw_bank(use, arguments.output / "bank.png")
    else:
        say("No pictures: they need pip install 'vblora[plot]'.")
    return use.summary()


def best_epoch(trainer: Trainer) -> float | None:
    """The epoch whose adapter the Trainer keeps, the first of equally good ones; None if it evaluated none."""
    state = trainer.state
    found = [entry["epoch"] for entry in state.log_history if entry["step"] == state.best_global_step]
    return float(found[0]) if found and state.best_global_step else None


def stored(arguments: argparse.Namespace, model: nn.Module, count: ParameterCount) -> int:
    """How many parameters the adapter's own file stores. The bank of ``--bank`` is in another file."""
    adapter = attached_adapter(model).adapter
    if arguments.bank is None or not isinstance(adapter, VBLoRAAdapter):
        return count.stored
    return count.stored - adapter.bank.vectors.numel()


def check_finite(trainer: Trainer) -> None:
    if all(parameter.isfinite().all() for parameter in trainer.model.parameters() if parameter.requires_grad):
        return
    raise CommandError(
        "training diverged: a parameter is no longer finite. Lower --lr-bank, --lr-logits, --lr-scales, --lr-head.", 1
    )


class _Progress(ProgressCallback):  # type: ignore[misc]  # transformers is not typed
    """A bar with the training loss, and a line for each evaluation; it also takes the time of the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.seconds = 0.0
        self._began = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        self.steps += 1
        self.seconds += time.perf_counter() - self._began
        super().on_step_end(args, state, control, **more)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4g}", refresh=False)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **more: Any
    ) -> None:
        super().on_evaluate(args, state, control, **more)
        name = args.metric_for_best_model
        if self.training_bar is not None and metrics and name in metrics:
            self.training_bar.write(
                f"epoch {state.epoch:.4g}: held-out {name.removeprefix('eval_')} {metrics[name]:.4f}"
            )


class _Best(TrainerCallback):  # type: ignore[misc]
    """Ends training after ``patience`` epochs without progress, and finds the best epoch's checkpoint, also in a resumed run.

    transformers' EarlyStoppingCallback counts anew after a resumption.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.best_global_step:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"  # the folder may have been moved since
        if folder.is_dir():
            state.best_model_checkpoint = str(folder)
        else:
            state.best_model_checkpoint = state.best_metric = state.best_global_step = None
            print_warning(f"{folder}, the best epoch until now, is missing. The best of the others counts.")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        name, sign = args.metric_for_best_model, 1 if args.greater_is_better else -1
        scores = [sign * entry[name] for entry in state.log_history if name in entry and entry["step"]]
        if self.patience is not None and scores and len(scores) - scores.index(max(scores)) > self.patience:
            control.should_training_stop = True


class _Stop(TrainerCallback):  # type: ignore[misc]
    """Ends training between two steps after Ctrl-C or SIGTERM, with a checkpoint; stops where parameters are not finite.

    Attributes:
        asked: whether there was a signal.
        stopped: whether training ended because of it. After the last step, there is nothing to stop.
    """

    def __init__(self, arguments: argparse.Namespace, task: Task | LanguageTask, trainer: Trainer) -> None:
        self.arguments = arguments
        self.task = task
        self.trainer = trainer
        self.asked = False
        self.stopped = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Within it, the first signal asks to stop after the step; the second ends the process as usual."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: object) -> None:
            self.asked = True
            signal.signal(number, before[signal.Signals(number)])
            print_warning("stopping once this step is saved. Press Ctrl-C again to stop at once.")

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.trainer.accelerator.num_processes > 1:  # all stop after the same step
            asked = torch.tensor([float(self.asked)], device=args.device)
            self.asked = bool(self.trainer.accelerator.reduce(asked, "sum").item())
        if self.asked and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
            args.load_best_model_at_end = False  # what is saved is where training goes on

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        check_finite(self.trainer)
        if self.stopped and state.epoch % 1:  # an epoch that is complete would not be evaluated later
            control.should_evaluate = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if is_main_process():
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_results(self.arguments, self.task, folder, steps=state.global_step)
