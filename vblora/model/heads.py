"""Heads that train with an adapter: those of a task, and new ones that would be left out."""

import dataclasses
import warnings
from collections.abc import Collection

from torch import nn

from ..config import AdapterConfig
from ..errors import VBLoRAWarning
from ..layers.reads import listed
from .targets import base_modules, matches

# PEFT's names of the heads of its task types.
_HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}


def with_task_head(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """The config with the head of its ``task_type`` in ``modules_to_save``.

    That is the head that PEFT takes. Where a transformers model has none of that name, it is whatever has parameters outside
    of the base model.
    """
    names = _HEADS.get(config.task_type or "")
    if names is None:
        return config
    modules = [name for name in base_modules(model) if name]
    heads = [head for head in names if any(matches(name, [head]) for name in modules)] or _outside_base_model(model)
    saved = list(config.modules_to_save or [])
    if not heads and not saved:
        warnings.warn(
            f'`task_type` is "{config.task_type}", but the model has no head called {" or ".join(names)} to train with '
            "the adapter. Name its head in `modules_to_save`.",
            VBLoRAWarning,
            stacklevel=3,
        )
    return dataclasses.replace(config, modules_to_save=[*saved, *(head for head in heads if head not in saved)] or None)


def _outside_base_model(model: nn.Module) -> list[str]:
    base = getattr(model, getattr(model, "base_model_prefix", None) or "base_model", None)
    if not isinstance(base, nn.Module) or base is model:
        return []
    children = {name: child for name, child in model.named_children() if child is not base}
    return [name for name, child in children.items() if any(True for _ in child.parameters())]


def warn_of_new_weights(model: nn.Module, covered: Collection[nn.Parameter]) -> None:
    """Warns of parameters that transformers initialized because the checkpoint lacked them, but for ``covered`` ones.

    It marks those that it has read.
    """
    loaded, new = 0, []
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_is_hf_initialized", False):
            loaded += 1
        elif parameter not in covered and parameter.is_floating_point():
            new.append(name)
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in new))
    if loaded <= len(new) or not new:
        return
    entries = ", ".join(f'"{module.removesuffix(".base_layer")}"' for module in modules)
    warnings.warn(
        f"{listed(modules)} got random weights when the model was loaded, because its checkpoint lacks them. The adapter neither "
        f"trains nor saves them. If they matter, train them with it: `modules_to_save=[{entries}]`"
        ', or `task_type="SEQ_CLS"` for the head of a classifier.',
        VBLoRAWarning,
        stacklevel=4,
    )
