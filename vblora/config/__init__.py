"""The configs: one class per method, with PEFT's field names."""

from .base import PEFT_METADATA, AdapterConfig
from .lora import LoraConfig
from .tied_lora import TiedLoraConfig
from .vblora import BEYOND_PEFT, VBLoRAConfig
from .vera import VeraConfig

METHODS = {config.method: config for config in (VBLoRAConfig, VeraConfig, TiedLoraConfig, LoraConfig)}

__all__ = [
    "BEYOND_PEFT",
    "METHODS",
    "PEFT_METADATA",
    "AdapterConfig",
    "LoraConfig",
    "TiedLoraConfig",
    "VBLoRAConfig",
    "VeraConfig",
]
