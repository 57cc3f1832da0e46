"""Writing whole models: a merged one as a plain model, the trained tensors of any; an injected one is refused."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adapters.base import MERGED
from ..layers.adapted import AdaptedLayer
from .extra_state import REPLACED, take_turns
from .lookup import ADAPTERS_ATTRIBUTE, Adapters, adapted_models, refuse_if_disabled
from .record import AdaptedModel
from .targets import embedding_layers

_METHOD = "save_pretrained"
# The classes that define it, by their modules: a model may be put into one of theirs after it was injected.
_CLASSES = {
    "transformers.modeling_utils": "PreTrainedModel",
    "diffusers.models.modeling_utils": "ModelMixin",
    "huggingface_hub.hub_mixin": "ModelHubMixin",
}


def guard_saving(record: AdaptedModel) -> None:
    """Has ``save_pretrained`` write the merged model, and refuse one that is not merged.

    This holds for the model, for modules within it, and for models around it of packages that are imported.
    """
    for module in record.model.modules():
        if callable(getattr(type(module), _METHOD, None)) and _METHOD not in vars(module):
            # A partial object, because a copied or pickled model takes it along, and it refers to the copy then.
            vars(module)[_METHOD] = partial(save_whole, record, module)
    record.undo.append(partial(_unguard_saving, record))
    for module_name, class_name in _CLASSES.items():
        kind = getattr(sys.modules.get(module_name), class_name, None)
        if kind is not None and not hasattr(getattr(kind, _METHOD), "_guards_what_is_within"):
            setattr(kind, _METHOD, _guarded(getattr(kind, _METHOD)))


def _guarded(write: Callable[..., Any]) -> Callable[..., Any]:
    """A class's method that takes care of injected models within. It stays, and costs a search of the modules."""

    @wraps(write)
    def save_pretrained(module: Any, *args: Any, **kwargs: Any) -> Any:
        records = [record for record in adapted_models(module) if not record.unwrapped]
        return _save(records, module, write, *args, **kwargs)

    vars(save_pretrained)["_guards_what_is_within"] = True
    return save_pretrained


def _unguard_saving(record: AdaptedModel) -> None:
    for module in record.model.modules():
        if getattr(vars(module).get(_METHOD), "func", None) is save_whole:
            del vars(module)[_METHOD]


def is_plain(record: AdaptedModel) -> bool:
    """Whether the weights alone are what the model computes: all that is active is merged."""
    return all(layer.enabled and not layer.applied for layer in record.present_layers)


def save_whole(record: AdaptedModel, module: Any, *args: Any, **kwargs: Any) -> Any:
    """``module.save_pretrained`` as its class has it, with the base model's names.

    Raises:
        ValueError: an active adapter is not merged, the adapters are disabled, the folder holds an adapter, or tied weights that
            merging has parted would be tied again by whoever loads the model.
    """
    records = [] if record.unwrapped else [record]
    return _save(records, module, getattr(type(module), _METHOD), *args, **kwargs)


def _save(records: list[AdaptedModel], module: Any, write: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    for record in records:
        refuse_if_disabled(record.layers)
        if not is_plain(record):
            raise ValueError(
                "`save_pretrained` would write the model without its adapters, or with names that no model loads. To write the "
                "adapter: vblora.save(model, directory). To write the merged model: vblora.merge(model), then "
                "model.save_pretrained(directory). In a Trainer, pass "
                "**vblora.integrations.transformers.trainer_arguments(model)."
            )
        _refuse_parted_ties(record, module)
    if records:
        _refuse_adapter_folder(*args[:1], **kwargs)
    if records and kwargs.get("state_dict") is not None:
        kwargs["state_dict"] = _with_base_names(module, kwargs["state_dict"])
    with ExitStack() as stack:
        for record in records:
            stack.enter_context(unwrapped(record))
        return write(module, *args, **kwargs)


def _refuse_adapter_folder(save_directory: str | os.PathLike[str], **_: object) -> None:
    file = Path(save_directory) / "adapter_config.json"
    if file.exists():
        raise ValueError(
            f"`save_directory` holds an adapter: {file}. Whoever loads a model from that folder, such as from_pretrained, would "
            "try to add that adapter to the merged weights. Write the merged model into another folder."
        )


@contextmanager
def unwrapped(record: AdaptedModel) -> Iterator[None]:
    """Within it the model has its base layers in the places of the adapted ones, and no adapters."""
    if record.unwrapped:
        yield
        return
    modules = [*record.model.modules()]
    children = {module: dict(module._modules) for module in modules}
    record.unwrapped = True
    try:
        for module in modules:
            for name, child in children[module].items():
                if child in record.names:
                    module._modules[name] = child.base_layer
        record.host._modules.pop(ADAPTERS_ATTRIBUTE, None)
        yield
    finally:
        record.unwrapped = False
        for module, own in children.items():
            module._modules.clear()
            module._modules.update(own)


def _with_base_names(module: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    layers = [name for name, layer in module.named_modules(remove_duplicate=False) if isinstance(layer, AdaptedLayer)]
    prefixes = {f"{name}.base_layer.": f"{name}." for name in layers}
    found = {}
    for name, tensor in state_dict.items():
        inner = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if f".{ADAPTERS_ATTRIBUTE}." not in f".{name}":
            found[name if inner is None else prefixes[inner] + name.removeprefix(inner)] = tensor
    return found


def _refuse_parted_ties(record: AdaptedModel, module: Any) -> None:
    if not getattr(getattr(module, "config", None), "tie_word_embeddings", False):
        return
    merged = {layer.base_layer for layer in record.layers if layer.merged}
    first, last = embedding_layers(module)
    if first is None or last is None or first.weight is last.weight:
        return
    if first in merged or last in merged:
        raise ValueError(
            "the model's input and output embeddings are tied, but merging changed one of them, and loading the model would tie "
            "them again. Set model.config.tie_word_embeddings = False first."
        )


def adapter_state_dict(model: nn.Module) -> dict[str, Any]:
    """``model.state_dict()`` without the frozen base model: for checkpoints of another package, such as Lightning.

    It holds the adapters, what else trains, buffers of the base model that changed since the injection, such as batch
    statistics, and everything outside the injected models. ``model.load_state_dict(part, strict=False)`` restores it, in a model
    that was injected in the same way, whichever adapters are active in either. To write an adapter to files, use
    :func:`vblora.save`.

    Args:
        model: an injected model, or a module that holds some.

    Raises:
        ValueError: there is no adapter.
    """
    records = adapted_models(model)
    if not records:
        raise ValueError("`model` has no adapter: call vblora.inject(model, config) first.")
    prefixes = {module: f"{name}." if name else "" for name, module in model.named_modules()}
    injected = tuple(prefixes[record.model] for record in records)
    adapters = tuple(prefix for module, prefix in prefixes.items() if isinstance(module, Adapters))
    changing = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for record in records:
        changing |= {id(module._buffers[name]) for module, name in record.buffers.changed()}
        extra = {id(extra.replacement) for extra in record.swapped_in()}
        changing = changing - extra if take_turns(record) else changing | extra  # they are among the adapters' then
    left_out = tuple(f"{prefix}{REPLACED}." for prefix in adapters)
    # The base weights, which it leaves out, are what may be merged.
    left_out += tuple(
        f"{prefixes[attached.adapter]}{MERGED}" for record in records for attached in record.adapters.values()
    )
    return {
        name: value.detach() if isinstance(value, Tensor) else value
        for name, value in model.state_dict(keep_vars=True).items()
        if (name.startswith(adapters) and not name.startswith(left_out))
        or id(value) in changing
        or not name.startswith(injected)
    }
