"""The three suites: encoders on GLUE, and a language model on E2E or on chats."""

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from vblora.finetune import demo
from vblora.finetune.models import computes_in_bfloat16
from vblora.finetune.task import find_model

from .. import models
from . import language_models, training
from .methods import LANGUAGE_RECIPES, LANGUAGE_SPACES, RECIPES, SPACES, Recipe, Space
from .tasks import Task, read_tasks
from .texts import TextTask, make_chats, read_e2e

AnyTask = Task | TextTask
Settings = training.Settings | language_models.Settings


class Suite(NamedTuple):
    """``options`` are those of the command line that it alone has, ``short`` the values of options that ``--quick`` sets."""

    recipes: dict[str, Recipe]
    spaces: dict[str | None, Space]
    quick: tuple[str, ...]
    short: dict[str, Any]
    options: tuple[str, ...]
    read: Callable[[argparse.Namespace], list[AnyTask]]
    settings: Callable[[argparse.Namespace], Settings]
    run: Callable[[Any, Recipe, int, Any], dict]
    steps_of: Callable[[Any, Any], int]


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were given, by name: the others have the defaults of what they are passed to."""
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def _read_glue(arguments: argparse.Namespace) -> list[AnyTask]:
    return [*read_tasks(arguments.data, arguments.tasks, arguments.max_train, arguments.held_out)]


def _encoder_settings(arguments: argparse.Namespace) -> training.Settings:
    given = _given(arguments, "epochs", "batch_size")
    model = _model(arguments, demo.find_model)
    if model.is_file():
        raise ValueError(f"--model: {model} is a file, but an encoder is read from a folder. Give its folder.")
    return training.Settings(model, computes_in_bfloat16(arguments.precision), **given)


def _model(arguments: argparse.Namespace, default: Callable[[], Path]) -> Path:
    """The model that ``--model`` names, checked.

    Raises:
        CommandError, FileNotFoundError: it is not there, or is something else; named.
    """
    if arguments.model is None:
        return default()
    if not arguments.model.exists():
        raise FileNotFoundError(f"--model: there is no {arguments.model}. Give a model's folder.")
    return Path(find_model(str(arguments.model)))


def _read_e2e(arguments: argparse.Namespace) -> list[AnyTask]:
    lacking = [package for package in ("sacrebleu", "rouge_score") if find_spec(package) is None]
    if lacking and arguments.max_prompts != 0:
        raise ValueError(
            f"{' and '.join(lacking)} cannot be imported, so texts cannot be compared. Install the extra `bench`, or give "
            "--max-prompts 0 for the loss alone."
        )
    sizes = arguments.max_train, arguments.max_dev, arguments.max_prompts
    return [read_e2e(arguments.data, *sizes, held_out=arguments.held_out)]


def _read_chats(arguments: argparse.Namespace) -> list[AnyTask]:
    return [make_chats(arguments.max_train, arguments.max_dev, arguments.held_out)]


def _language_settings(arguments: argparse.Namespace) -> language_models.Settings:
    given = _given(arguments, "steps", "batch_size", "beams")
    if "beams" in given:
        given["beams"] = tuple(given["beams"])
    model = _model(arguments, models.smollm2_file)
    return language_models.Settings(model, computes_in_bfloat16(arguments.precision), **given)


_ENCODERS = Suite(
    RECIPES,
    SPACES,
    ("frozen encoder", "LoRA r=8", "VB-LoRA", "VB-LoRA, the paper's rates"),
    {"max_train": 1000},
    ("tasks", "epochs"),
    _read_glue,
    _encoder_settings,
    training.run,
    training.steps_of,
)
_E2E = Suite(
    LANGUAGE_RECIPES,
    LANGUAGE_SPACES,
    ("frozen, 3 examples", "LoRA r=8", "VB-LoRA"),
    {"steps": 40, "max_dev": 64, "max_prompts": 32, "beams": [1]},
    ("steps", "max_dev", "max_prompts", "beams"),
    _read_e2e,
    _language_settings,
    language_models.run,
    language_models.steps_of,
)
_CHAT = _E2E._replace(
    recipes={name: recipe for name, recipe in LANGUAGE_RECIPES.items() if not recipe.config.get("shots")},
    quick=("frozen", "LoRA r=8", "VB-LoRA"),
    short={"steps": 40, "max_dev": 64},
    options=("steps", "max_dev"),
    read=_read_chats,
)
SUITES = {"glue": _ENCODERS, "e2e": _E2E, "chat": _CHAT}
