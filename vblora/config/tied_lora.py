"""Tied-LoRA's config."""

from dataclasses import dataclass

from .base import AdapterConfig
from .lora import check_alpha


@dataclass
class TiedLoraConfig(AdapterConfig):
    """A Tied-LoRA adapter (arXiv 2311.09578, of which this is the form that trains all four: vBuA). PEFT has none; fields are
    called as LoRA's are there. It also has the fields of :class:`AdapterConfig`: which layers, and what trains beside them.

    Args:
        r: rank: rows of the one pair of projections that all layers share and train.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        tied_lora_dropout: probability of dropping an element of the update's input while training.

    Raises:
        ValueError: a value out of range, named.
        TypeError: a value of the wrong type, named.
    """

    method = "tied_lora"

    r: int = 8
    lora_alpha: float = 8
    tied_lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha(self)

    @property
    def scaling(self) -> float:
        """The factor of every update."""
        return self.lora_alpha / self.r
