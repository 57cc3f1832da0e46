"""Finds the layers that a config selects in a model."""

import difflib
import re
import warnings

from torch import nn

from ..config import AdapterConfig
from ..errors import VBLoRAWarning, listed
from ..layers import reads
from ..layers.adapted import AdaptedLayer
from ..layers.kinds import is_linear, kind_of, refusal
from .lookup import Adapters

# Usual names of a sequence classifier's output layer.
_CLASSIFIER_HEADS = ("score", "classifier")


def find_targets(model: nn.Module, config: AdapterConfig) -> dict[nn.Module, list[str]]:
    """The layers to adapt, each with all its names: a layer that the model uses in two places has two.

    Raises:
        ValueError: no layer matches, or there are no default targets for the model's architecture.
        TypeError: a layer matches that cannot be adapted.
    """
    modules = base_modules(model)
    all_linear = is_all_linear(config.target_modules)
    wanted = _wanted_names(model, modules, config)
    readers = reads.readers(modules)
    targets: dict[nn.Module, list[str]] = {}
    left_out: dict[str, list[str]] = {}
    for name in wanted:
        module = modules[name]
        kind = f"a {type(module).__name__}"
        if module in readers:
            why = f"whose weight {readers[module]} reads itself, which would leave out the layer's update"
        elif all_linear and (reason := kind_of(module).refusal(module)):
            why = f"{kind}, which {reason}"
        elif reason := refusal(module):
            raise TypeError(
                f"`target_modules` matches `{name}`, {kind}{reason}. Narrow the match, or name it in `exclude_modules`."
            )
        else:
            targets.setdefault(module, []).append(name)
            continue
        if not all_linear:
            raise TypeError(f"`target_modules` matches `{name}`, {why}. Name it in `exclude_modules`.")
        left_out.setdefault(why, []).append(name)
    for why, names in left_out.items():
        warnings.warn(f'"all-linear" leaves out {listed(names)}, {why}.', VBLoRAWarning, stacklevel=4)
    if not targets:
        raise ValueError(_no_match_message(modules, config))
    return targets


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model under all their names, as if it had no adapters."""
    modules: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        if isinstance(module, Adapters):
            return
        if isinstance(module, AdaptedLayer):
            modules[name] = module.base_layer
            return
        modules[name] = module
        for child_name, child in module._modules.items():
            if child is not None:
                visit(f"{name}.{child_name}".lstrip("."), child)

    visit("", model)
    return modules


def matches(name: str, wanted: list[str] | str) -> bool:
    """Whether ``name`` equals an entry of a list or ends in one after a dot, or fully matches a regular expression."""
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
        if name and not matches(name, excluded) and not is_within(name, saved) and is_in_layers(name, config)
    ]


def is_within(name: str, entries: list[str]) -> bool:
    """Whether a module, or one that contains it, matches an entry."""
    parts = name.split(".")
    return any(matches(".".join(parts[: count + 1]), entries) for count in range(len(parts)))


def is_in_layers(name: str, config: AdapterConfig, indices: list[int] | None = None) -> bool:
    """Whether a module is in one of the layers ``layers_to_transform``, or ``indices``."""
    wanted = config.layers_to_transform if indices is None else indices
    if wanted is None:
        return True
    wanted = [wanted] if isinstance(wanted, int) else wanted
    patterns = config.layers_pattern or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # The first index is the layer's; later ones are within it, such as an expert's.
        found = re.match(rf"(?:.*?\.)??{pattern}\.(\d+)\.", name)
        if found:
            return int(found.group(1)) in wanted
    return False


def _default_targets(model: nn.Module, defaults: dict[str, list[str]]) -> list[str]:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if type(model).__module__.startswith("timm."):
        model_type = "timm"
    # The text part of a model has a type of its own: "llama4_text" in "llama4".
    found = next((name for name in (model_type, str(model_type).removesuffix("_text")) if name in defaults), None)
    if found is None:
        known = ", ".join(sorted(defaults))
        raise ValueError(
            f"`target_modules` is None, but there is no default for a model of type {model_type!r} (only for {known}). "
            'Pass names of layers, or "all-linear".'
        )
    return defaults[found]


def embedding_layers(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The input and the output embeddings of a model of transformers, each None if there are none."""
    found: list[nn.Module | None] = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layer = getattr(model, name, lambda: None)()
        except (AttributeError, NotImplementedError):  # transformers' default method knows common names alone
            layer = None
        found.append(getattr(layer, "base_layer", layer))
    return found[0], found[1]


def _output_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that map hidden states to scores, of tokens or of a sequence classifier's classes."""
    _, output = embedding_layers(model)
    if output is not None:
        return [output]
    if callable(get_classifier := getattr(model, "get_classifier", None)):  # timm's, which may return several layers
        found = get_classifier()
        heads = list(found) if isinstance(found, tuple) else [found]
    elif hasattr(model, "config"):
        heads = [getattr(model, name, None) for name in _CLASSIFIER_HEADS]
    else:
        return []
    return [module for head in heads if isinstance(head, nn.Module) for module in head.modules()]


def _no_match_message(modules: dict[str, nn.Module], config: AdapterConfig) -> str:
    wanted = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules or []
    if is_all_linear(wanted[0] if wanted else None) and isinstance(config.target_modules, list):
        return f'`target_modules` is {config.target_modules!r}, a list of names. Pass the string "all-linear" instead.'
    fields = ("layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save")
    limits = {name: value for name in fields if (value := getattr(config, name)) is not None}
    if limits and any(name and matches(name, config.target_modules or []) for name in modules):
        left = " and ".join(f"`{name}` {value!r}" for name, value in limits.items())
        return f"`target_modules` is {config.target_modules!r}, but {left} leaves no layer of this model."
    endings = sorted({name.rpartition(".")[2] for name, module in modules.items() if name and is_linear(module)})
    near = [match for entry in wanted for match in difflib.get_close_matches(entry.rpartition(".")[2], endings)]
    hint = (
        f"Nearest names: {', '.join(dict.fromkeys(near))}."
        if near
        else f"Linear layers: {', '.join(endings) or 'none'}."
    )
    return f"`target_modules` is {config.target_modules!r}, which matches no layer of this model. {hint}"
