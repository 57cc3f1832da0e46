"""Warns about entries of a config that match nothing, and about weights that no target can reach."""

import re
import warnings

from torch import nn

from ..config import AdapterConfig
from ..errors import VBLoRAWarning, listed
from ..layers.kinds import has_kind
from .targets import base_modules, is_all_linear, is_in_layers, is_within, matches


def warn_of_unmatched(model: nn.Module, config: AdapterConfig, targets: list[str]) -> None:
    """Warns about each entry of a config that matches nothing, and about weights that it seems to select but cannot reach.

    ``targets``: the names of the layers that the config selects.
    """
    modules = base_modules(model)
    names = [name for name in modules if name]
    unreached = _unreached(modules, config, targets)
    found = _unmatched(names, targets, config)
    for field, entries in found.items():
        beyond = " outside `modules_to_save`" if field == "target_modules" and config.modules_to_save else ""
        warnings.warn(
            f"`{field}` has {listed(entries, repr, 10)}, which matches nothing in this model{beyond}.",
            VBLoRAWarning,
            stacklevel=3,
        )
    if unreached:
        total = sum(parameter.numel() for parameter in model.parameters())
        share = sum(parameter.numel() for parameter in unreached.values()) / total
        warnings.warn(
            f"`target_modules` cannot reach {listed(unreached, most=1)}, {share:.0%} of the model's parameters. They get no "
            "update, because they do not belong to layers that vblora can adapt, such as the fused weights of experts.",
            VBLoRAWarning,
            stacklevel=3,
        )


def _unmatched(names: list[str], targets: list[str], config: AdapterConfig) -> dict[str, list[object]]:
    """The entries that match nothing, by field."""

    def without_match(entries: list[str] | str | None, among: list[str]) -> list[object]:
        if entries is None or is_all_linear(entries):
            return []
        every = [entries] if isinstance(entries, str) else [[entry] for entry in entries]
        unmatched = [entry for entry in every if not any(matches(name, entry) for name in among)]
        return [entry if isinstance(entry, str) else entry[0] for entry in unmatched]

    in_layers = [name for name in names if is_in_layers(name, config)]
    saved = config.modules_to_save or []
    adaptable = [name for name in in_layers if not is_within(name, saved)]
    found = {
        "target_modules": without_match(config.target_modules, adaptable),
        "exclude_modules": without_match(config.exclude_modules, names),
        "modules_to_save": without_match(config.modules_to_save, names),
    }
    wanted, patterns = config.layers_to_transform, config.layers_pattern
    if wanted is not None:
        every = [wanted] if isinstance(wanted, int) else wanted
        found["layers_to_transform"] = [
            index for index in every if not any(is_in_layers(name, config, [index]) for name in targets)
        ]
    if patterns is not None:
        every_pattern = [patterns] if isinstance(patterns, str) else patterns
        found["layers_pattern"] = [
            pattern
            for pattern in every_pattern
            if not any(re.match(rf"(?:.*?\.)??{pattern}\.\d+\.", name) for name in names)
        ]
    return {field: entries for field, entries in found.items() if entries}


def _unreached(modules: dict[str, nn.Module], config: AdapterConfig, targets: list[str]) -> dict[str, nn.Parameter]:
    """Weights that the config seems to select, but whose module is no layer that can be adapted.

    A config selects a weight if it names it. It selects stacked weights (of experts) also if it is "all-linear" or targets a
    layer of the same block.
    """
    wanted, excluded = config.target_modules, config.exclude_modules or []
    all_linear = is_all_linear(wanted)
    entries = wanted if isinstance(wanted, list) else []
    found = {}
    for prefix, module in modules.items():
        if has_kind(module) or type(module).__module__.startswith("torch."):
            continue
        block = prefix.rpartition(".")[0]
        for own, parameter in module._parameters.items():
            name = f"{prefix}.{own}" if prefix else own
            if parameter is None or parameter.dim() < 2 or matches(name, excluded) or matches(prefix, excluded):
                continue
            stacked = parameter.dim() == 3 and min(parameter.shape) > 1
            in_block = bool(block) and any(target.startswith(f"{block}.") for target in targets)
            if matches(name, entries) or (stacked and (all_linear or (in_block and entries))):
                found[name] = parameter
    return found
