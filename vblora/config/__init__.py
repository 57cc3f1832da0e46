"""The configs: one class per method, with PEFT's field names."""

from .base import AdapterConfig
from .lora import LoraConfig
from .peft_fields import PEFT_METADATA, from_peft
from .tied_lora import TiedLoraConfig
from .vblora import BEYOND_PEFT, VBLoRAConfig
from .vera import VeraConfig

METHODS = {config.method: config for config in (VBLoRAConfig, VeraConfig, TiedLoraConfig, LoraConfig)}

CLASS_OF_PEFT_TYPE = {config.peft_type: config for config in METHODS.values() if config.peft_type is not None}

__all__ = [
    "BEYOND_PEFT",
    "CLASS_OF_PEFT_TYPE",
    "METHODS",
    "PEFT_METADATA",
    "AdapterConfig",
    "LoraConfig",
    "TiedLoraConfig",
    "VBLoRAConfig",
    "VeraConfig",
    "from_peft",
]
