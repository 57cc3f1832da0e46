"""Tied-LoRA's config."""

from dataclasses import dataclass

from .base import AdapterConfig


@dataclass
class TiedLoraConfig(AdapterConfig):
    """A Tied-LoRA adapter (arXiv 2311.09578) in the paper's form vBuA, which trains one pair A, B for all layers, and two vectors
    u, v for each layer. PEFT lacks this method, so the fields are named like those of its ``LoraConfig``. It also has the fields
    of :class:`AdapterConfig`.

    Args:
        r: rank of each layer's update: the rows of the pair that all layers share.
        lora_alpha: scales the update by ``lora_alpha / r``.
        tied_lora_dropout: dropout probability of the update's input during training.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has the wrong type.
    """

    method = "tied_lora"

    r: int = 8
    lora_alpha: float = 8
    tied_lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("lora_alpha")

    @property
    def scaling(self) -> float:
        """The number that multiplies every update."""
        return self.lora_alpha / self.r
