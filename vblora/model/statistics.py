"""Normalization layers with running statistics, such as BatchNorm: they stay in evaluation mode while they are frozen.

Training would otherwise normalize by each batch and change the statistics, which no adapter's file holds.
"""

import warnings
from functools import partial
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import VBLoRAWarning, listed

if TYPE_CHECKING:
    from .record import AdaptedModel


class FrozenStatistics:
    """The normalization layers of an injected model that keep statistics, and the modes of those that are frozen.

    ``modules_to_save`` trains a layer: it follows ``model.train()`` while the adapter is active.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = {
            module: name
            for name, module in model.named_modules()
            if isinstance(module, _NormBase) and module.running_mean is not None
        }
        self.modes: dict[nn.Module, bool] = {}  # of a frozen layer, whether it would be in training mode
        for layer in self.layers:
            # A partial object, because a copied or pickled model takes it along, and it refers to the copy then.
            vars(layer)["train"] = partial(_train, self, layer)
            vars(layer)["reset_running_stats"] = partial(_reset, self, layer)

    def settle(self, trained: set[nn.Module]) -> None:
        """Freezes all layers but ``trained`` ones."""
        for layer in self.layers:
            if layer in trained and layer in self.modes:
                type(layer).train(layer, self.modes.pop(layer))
            elif layer not in trained and layer not in self.modes:
                self.modes[layer] = layer.training
                type(layer).train(layer, False)

    def release(self) -> None:
        self.settle(set(self.layers))
        for layer in self.layers:
            vars(layer).pop("train", None)
            vars(layer).pop("reset_running_stats", None)

    def replaced(self, model: nn.Module) -> list[str]:
        """The names of frozen layers whose place another normalization layer has taken, which would not be frozen."""
        found = dict(model.named_modules())
        now = {name: found.get(name) for layer, name in self.layers.items() if layer in self.modes}
        return [name for name, module in now.items() if isinstance(module, _NormBase) and module not in self.layers]


def _train(statistics: FrozenStatistics, layer: nn.Module, mode: bool = True) -> nn.Module:
    if layer in statistics.modes:
        statistics.modes[layer], mode = mode, False
    return type(layer).train(layer, mode)


def _reset(statistics: FrozenStatistics, layer: _NormBase) -> None:
    if layer in statistics.modes:
        raise ValueError(
            f"`{statistics.layers[layer]}` is frozen, so its statistics would stay reset. Leave this call out "
            "(torch.optim.swa_utils.update_bn, for example, has nothing to update), or name the layer in `modules_to_save`."
        )
    type(layer).reset_running_stats(layer)


def warn_of_frozen_statistics(record: "AdaptedModel") -> None:
    """Says which layers normalize by the base model's statistics in training, too."""
    names = [name for name, module in record.model.named_modules() if module in record.statistics.modes]
    if names:
        warnings.warn(
            f"{listed(names)} stay in evaluation mode, also in training: they are frozen, so they normalize by the base model's "
            "statistics and do not change them. To train them, name them in `modules_to_save`.",
            VBLoRAWarning,
            stacklevel=3,
        )
