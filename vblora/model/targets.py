"""Which layers of a model a config means."""

import difflib
import re
import warnings

from torch import nn

from ..config import AdapterConfig
from ..errors import VBLoRAWarning
from ..layers import reads
from ..layers.adapted import AdaptedLayer
from ..layers.kinds import is_linear, kind_of, refusal
from .record import Adapters

# A sequence classifier's output layer, by convention.
_CLASSIFIER_HEADS = ("score", "classifier")


def find_targets(model: nn.Module, config: AdapterConfig) -> dict[nn.Module, list[str]]:
    """The layers to adapt and all their names: a layer that a model uses in two places has two.

    Raises:
        ValueError: nothing matches, or the model's architecture has no default targets.
        TypeError: a match that takes no update.
    """
    modules = base_modules(model)
    everything = is_all_linear(config.target_modules)
    wanted = _wanted_names(model, modules, config)
    readers = reads.readers(modules)
    targets: dict[nn.Module, list[str]] = {}
    left_out: dict[str, list[str]] = {}
    for name in wanted:
        module = modules[name]
        kind = f"a {type(module).__name__}"
        if module in readers:
            why = f"whose weight {readers[module]} reads itself, so that an update of the layer would be left out"
        elif everything and (reason := kind_of(module).refusal(module)):
            why = f"{kind}, which {reason}"
        elif reason := refusal(module):
            raise TypeError(
                f"`target_modules` matches `{name}`, {kind}{reason}. Narrow the match, or name it in `exclude_modules`."
            )
        else:
            targets.setdefault(module, []).append(name)
            continue
        if not everything:
            raise TypeError(f"`target_modules` matches `{name}`, {why}. Name it in `exclude_modules`.")
        left_out.setdefault(why, []).append(name)
    for why, names in left_out.items():
        warnings.warn(f'"all-linear" leaves out {reads.listed(names)}, {why}.', VBLoRAWarning, stacklevel=4)
    if not targets:
        raise ValueError(_nothing_matches(modules, config))
    return targets


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """A model's modules by all their names, as if it had no adapters."""
    modules: dict[str, nn.Module] = {}
    hidden = "\0"
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(hidden):
            continue
        if isinstance(module, (AdaptedLayer, Adapters)):
            hidden = f"{name}."
        if not isinstance(module, Adapters):
            modules[name] = module.base_layer if isinstance(module, AdaptedLayer) else module
    return modules


def matches(name: str, wanted: list[str] | str) -> bool:
    """Whether a module's name is meant: by a list's entry, or an ending after a dot; by a regular expression, in full."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == entry or name.endswith("." + entry) for entry in wanted)


def is_all_linear(target_modules: list[str] | str | None) -> bool:
    return isinstance(target_modules, str) and target_modules.lower() == "all-linear"


def _wanted_names(model: nn.Module, modules: dict[str, nn.Module], config: AdapterConfig) -> list[str]:
    wanted = config.target_modules
    if wanted is None:
        wanted = _default_targets(model, config.default_targets)
    excluded = config.exclude_modules or []
    saved = config.modules_to_save or []
    if is_all_linear(wanted):
        heads = _output_layers(model)
        names = [
            name for name, module in modules.items() if is_linear(module) and not any(module is head for head in heads)
        ]
    else:
        names = [name for name in modules if name and matches(name, wanted)]
    return [
        name
        for name in names
        if name
        and not matches(name, excluded)
        and not any(matches(part, saved) for part in _with_parents(name))
        and is_in_layers(name, config)
    ]


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def is_in_layers(name: str, config: AdapterConfig, indices: list[int] | None = None) -> bool:
    """Whether a module is in a layer of ``layers_to_transform``, or of ``indices``."""
    wanted = config.layers_to_transform if indices is None else indices
    if wanted is None:
        return True
    wanted = [wanted] if isinstance(wanted, int) else wanted
    patterns = config.layers_pattern or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # The first index is the layer's; later ones count something within it, such as experts.
        found = re.match(rf"(?:.*?\.)??{pattern}\.(\d+)\.", name)
        if found:
            return int(found.group(1)) in wanted
    return False


def _default_targets(model: nn.Module, of_types: dict[str, list[str]]) -> list[str]:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in of_types:
        known = ", ".join(sorted(of_types))
        raise ValueError(
            f"`target_modules` is None, and there is no default for a model of type {model_type!r} (there is for {known}). "
            'Give names of layers, or "all-linear".'
        )
    return of_types[model_type]


def _output_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that turn hidden states into scores: of tokens, or of a sequence classifier's classes."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None:
        return [output]
    if not hasattr(model, "config"):
        return []
    heads = [getattr(model, name) for name in _CLASSIFIER_HEADS if isinstance(getattr(model, name, None), nn.Module)]
    return [module for head in heads for module in head.modules()]


def _nothing_matches(modules: dict[str, nn.Module], config: AdapterConfig) -> str:
    wanted = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules or []
    endings = sorted({name.rpartition(".")[2] for name, module in modules.items() if name and is_linear(module)})
    near = [match for entry in wanted for match in difflib.get_close_matches(entry.rpartition(".")[2], endings)]
    hint = (
        f"Nearest names: {', '.join(dict.fromkeys(near))}."
        if near
        else f"Linear layers: {', '.join(endings) or 'none'}."
    )
    return f"`target_modules` is {config.target_modules!r}, which matches no layer of this model. {hint}"
