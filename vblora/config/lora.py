"""LoRA's config."""

import math
from dataclasses import dataclass

from .base import AdapterConfig
from .peft_fields import LORA_NEUTRAL, LORA_UNSUPPORTED, accepts_peft_fields


@accepts_peft_fields(neutral=LORA_NEUTRAL, unsupported=LORA_UNSUPPORTED)
@dataclass
class LoraConfig(AdapterConfig):
    """A LoRA adapter (arXiv 2106.09685). Names and defaults are those of PEFT's ``LoraConfig``. It also has the
    fields of :class:`AdapterConfig`.

    Args:
        r: rank of each layer's update.
        lora_alpha: scales the update by ``lora_alpha / r``.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` instead.
        lora_dropout: dropout probability of the update's input during training.
        init_lora_weights: True initializes A like an ``nn.Linear`` weight and B with zeros; ``"gaussian"`` draws A from a
            normal distribution with standard deviation ``1 / r``; False initializes both like ``nn.Linear``, so that the
            update is not zero, for tests.

    Raises:
        ValueError: a field is out of range, or is one of PEFT's that is not supported (DoRA, ranks per layer, ...).
        TypeError: a field has the wrong type.
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
        self._check_positive("lora_alpha")
        self._check_flags("use_rslora")
        if not (isinstance(self.init_lora_weights, bool) or self.init_lora_weights == "gaussian"):
            raise ValueError(
                f'`init_lora_weights` is {self.init_lora_weights!r}; allowed are True, False and "gaussian".'
            )

    @property
    def scaling(self) -> float:
        """The number that multiplies every update."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
