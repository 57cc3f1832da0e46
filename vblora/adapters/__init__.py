"""Methods of adaptation: from what is trained to the factors of each layer."""

from .base import Adapter, Factors, Slot, Target
from .lora import LoRAAdapter
from .tied_lora import TiedLoRAAdapter
from .vblora import VBLoRAAdapter
from .vera import VeRAAdapter

__all__ = ["Adapter", "Factors", "LoRAAdapter", "Slot", "Target", "TiedLoRAAdapter", "VBLoRAAdapter", "VeRAAdapter"]
