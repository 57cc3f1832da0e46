"""Adapters of a model for the model within it, such as an encoder, or for one around it: names differ by a prefix."""

import re
import warnings
from collections.abc import Collection
from dataclasses import replace
from typing import TypeVar

from torch import nn

from ..errors import VBLoRAWarning, listed
from ..model.targets import base_modules, matches
from .contents import Contents

_Contents = TypeVar("_Contents", bound=Contents)


def fit_names(contents: _Contents, model: nn.Module) -> _Contents:
    """The contents with their layers named as in ``model``, if all names there have one more prefix, or lack one.

    Extra parameters that the model within does not have, such as a head's, are left out with a warning. If no prefix fits, the
    contents are returned as they are.

    Raises:
        ValueError: several prefixes fit.
    """
    every = base_modules(model)
    modules = [name for name in every if name]
    names = [target.name for target in contents.targets]
    if not names or set(names) <= set(modules):
        return contents
    places = {
        tuple(every[added + name.removeprefix(removed)] for name in names): (removed, added)
        for removed, added in reversed(_prefixes(names, modules))  # of a part with several names, the first
    }
    found = [*reversed(places.values())]
    if not found:
        return contents
    if len(found) > 1:
        parts = " or ".join(f"`{added}`" for _, added in found)
        raise ValueError(
            f"it fits several parts of the model: layers that begin with {parts}. Load it into one of those."
        )
    removed, added = found[0]

    def fitted(name: str) -> str:
        return added + name.removeprefix(removed)

    targets = tuple(replace(target, name=fitted(target.name)) for target in contents.targets)
    present = {name for name in contents.extra_parameters if fitted(name).rpartition(".")[0] in modules}
    missing = [name for name in contents.extra_parameters if name not in present or not name.startswith(removed)]
    if missing:
        warnings.warn(
            f"the adapter also holds {listed(missing)}, which the model does not have; it is loaded without them.",
            VBLoRAWarning,
            stacklevel=4,
        )
    extra = {fitted(name): tensor for name, tensor in contents.extra_parameters.items() if name not in missing}
    saved = [entry.removeprefix(removed) for entry in contents.config.modules_to_save or []]
    config = replace(
        contents.config,
        target_modules="|".join(re.escape(target.name) for target in targets),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=[entry for entry in saved if any(matches(name, [entry]) for name in modules)] or None,
    )
    return replace(contents, targets=targets, extra_parameters=extra, config=config)


def _prefixes(names: list[str], modules: Collection[str]) -> list[tuple[str, str]]:
    """What may be removed from all names, or put before them, so that they are modules: (removed, added)."""
    known = set(modules)
    added = [other.removesuffix(names[0]) for other in modules if other.endswith(f".{names[0]}")]
    parts = names[0].split(".")
    removed = [".".join(parts[:count]) + "." for count in range(1, len(parts))]
    found = [("", prefix) for prefix in added if all(prefix + name in known for name in names)]
    found += [
        (prefix, "")
        for prefix in removed
        if all(name.startswith(prefix) and name.removeprefix(prefix) in known for name in names)
    ]
    return found
