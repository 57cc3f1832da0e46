"""The parts of a model that are called by themselves, such as ``model.bert(ids)``, and which adapted layers each contains."""

from collections.abc import Sequence

from torch import nn

from ..layers.adapted import AdaptedLayer
from ..layers.reads import has_fast_path

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def find_parts(model: nn.Module, layers: Sequence[AdaptedLayer]) -> dict[str, range]:
    """The submodules with several of ``layers``, by name, and the span of positions that these layers have in ``layers``.

    The blocks of a list are not among them: there are many, so hooks on each would cost time, and activation checkpointing
    recomputes them one by one. Layers of ``nn.TransformerEncoder`` are, because the hooks turn off the fast path, which reads the
    weights of the adapted layers in place of calling them.
    """
    position = {layer: index for index, layer in enumerate(layers)}
    parts: dict[str, range] = {}

    def add_parts_of(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            found = [position[inner] for inner in child.modules() if inner in position]
            if len(found) > 1:
                parts[prefix + name] = range(min(found), max(found) + 1)
                if not isinstance(child, _LISTS):
                    add_parts_of(child, f"{prefix}{name}.")

    add_parts_of(model, "")
    for name, module in model.named_modules():
        if name and has_fast_path(module):
            found = [position[inner] for inner in module.modules() if inner in position]
            if found:
                parts[name] = range(min(found), max(found) + 1)
    return parts
