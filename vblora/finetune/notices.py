"""What the programs print besides their results. Of several processes, only the first prints."""

import os
import sys


def is_main_process() -> bool:
    """Whether this process prints and writes; of several that ``accelerate`` or ``torchrun`` started, the first does."""
    return int(os.environ.get("RANK", "0")) == 0


def processes() -> int:
    """How many processes ``accelerate`` or ``torchrun`` started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def say(message: str) -> None:
    if is_main_process():
        print(message, flush=True)


def say_default_model(given: str | None, model: str) -> None:
    """Says which base model is used if none was given."""
    if given is None:
        say(f"The base model is {model}, because --model was not given.")


def print_warning(message: str, command: str = "finetune") -> None:
    if is_main_process():
        print(f"vblora {command}: warning: {message}", file=sys.stderr, flush=True)
