"""Task heads that train with an adapter, and a warning about new weights that would not train."""

import dataclasses
import warnings
from collections.abc import Collection
from typing import Any

from torch import nn

from ..config import AdapterConfig
from ..errors import VBLoRAWarning, listed
from .targets import base_modules, embedding_layers, matches

# PEFT's names for the heads of its task types.
_HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}


def with_task_head(model: nn.Module, config: AdapterConfig) -> AdapterConfig:
    """The config, with the head of its ``task_type`` added to ``modules_to_save``.

    The heads have the names that PEFT uses. If the model has none of them, the head is every child with parameters outside
    transformers' base model.
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
    """Warns about parameters, other than ``covered`` ones, that transformers initialized because the checkpoint lacked them.

    transformers marks the parameters that it has loaded.
    """
    module_of: dict[nn.Parameter, str] = {}
    for name, module in base_modules(model).items():
        for parameter in module.parameters(recurse=False):
            module_of.setdefault(parameter, name)
    loaded = {parameter for parameter in module_of if getattr(parameter, "_is_hf_initialized", False)}
    new = [p for p in module_of if p not in loaded and p not in covered and p.is_floating_point()]
    if new and is_resized(model):  # `save` stores the embeddings then
        embeddings = {p for layer in embedding_layers(model) if layer is not None for p in layer.parameters()}
        new = [parameter for parameter in new if parameter not in embeddings]
    modules = list(dict.fromkeys(module_of[parameter] for parameter in new))
    if len(loaded) <= len(new) or not new:
        return
    entries = ", ".join(f'"{module}"' for module in modules)
    warnings.warn(
        f"{listed(modules)} got random weights when the model was loaded, because its checkpoint lacks them. The adapter neither "
        f"trains nor saves them. If they matter, train them with it: `modules_to_save=[{entries}]`"
        ', or `task_type="SEQ_CLS"` for the head of a classifier.',
        VBLoRAWarning,
        stacklevel=4,
    )


def is_resized(model: nn.Module) -> bool:
    """Whether a model of transformers has another vocabulary than its checkpoint. Asks no server."""
    config: Any = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    if not name or not hasattr(config, "get_text_config"):
        return False
    try:
        written, _ = type(config).get_config_dict(name, local_files_only=True)
        if not written:  # no config.json, as in the folder of a GGUF file
            return False
        saved = type(config).from_dict(written)
        sizes = [own.get_text_config().vocab_size for own in (config, saved)]
    except (OSError, ValueError, AttributeError):
        return False
    return sizes[0] != sizes[1]
