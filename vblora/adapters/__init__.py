"""Methods of adaptation: from what is trained to the factors of each layer."""

from .base import Adapter, Factors, Slot, Target
from .vblora import VBLoRAAdapter

__all__ = ["Adapter", "Factors", "Slot", "Target", "VBLoRAAdapter"]
