"""The options of transformers' TrainingArguments for activation checkpointing, by the name that the installed release uses."""

import inspect

from transformers import TrainingArguments

_NAMES = inspect.signature(TrainingArguments).parameters
_NAME = "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"


def checkpointing(**options: bool) -> dict[str, bool | dict[str, bool]]:
    """``options``: those of ``torch.utils.checkpoint``, such as ``use_reentrant``."""
    return {_NAME: True} | ({f"{_NAME}_kwargs": options} if options else {})
