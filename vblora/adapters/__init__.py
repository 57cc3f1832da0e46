"""The adaptation methods: each composes the factors of all layers from its parameters."""

from .base import Adapter, Factors, Slot, Target
from .lora import LoRAAdapter
from .tied_lora import TiedLoRAAdapter
from .vblora import VBLoRAAdapter
from .vera import VeRAAdapter

__all__ = ["Adapter", "Factors", "LoRAAdapter", "Slot", "Target", "TiedLoRAAdapter", "VBLoRAAdapter", "VeRAAdapter"]
