"""LoRA's config."""

import math
from dataclasses import dataclass

from .base import AdapterConfig


@dataclass
class LoraConfig(AdapterConfig):
    """A LoRA adapter (arXiv 2106.09685). Names and defaults are those of PEFT's ``LoraConfig``. It also has the fields of
    :class:`AdapterConfig`: which layers, and what trains beside them.

    Args:
        r: rank of each layer's update.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        use_rslora: by ``lora_alpha / sqrt(r)`` instead.
        lora_dropout: probability of dropping an element of the update's input while training.
        init_lora_weights: True starts A as ``nn.Linear`` starts its weight, and B as zeros; ``"gaussian"`` A normal, with a
            standard deviation of ``1 / r``; False both as ``nn.Linear``'s, an update that is not 0, for tests.

    Raises:
        ValueError: a value out of range, named.
        TypeError: a value of the wrong type, named; or a field of PEFT's that is not here (DoRA, ranks by layer, ...).
    """

    method = "lora"
    peft_type = "LORA"

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    lora_dropout: float = 0.0
    init_lora_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha(self)
        if not isinstance(self.use_rslora, bool):
            raise TypeError(f"`use_rslora` is {self.use_rslora!r}, but must be True or False.")
        if not (isinstance(self.init_lora_weights, bool) or self.init_lora_weights == "gaussian"):
            raise ValueError(
                f'`init_lora_weights` is {self.init_lora_weights!r}; allowed are True, False and "gaussian".'
            )

    @property
    def scaling(self) -> float:
        """The factor of every update."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def check_alpha(config: AdapterConfig) -> None:
    alpha = config.lora_alpha
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise TypeError(f"`lora_alpha` is {alpha!r}, but must be a number.")
    if not 0 < alpha < math.inf:
        raise ValueError(f"`lora_alpha` is {alpha}, but must be above 0 and finite.")
