"""The adapter class of each config class."""

from ..config import AdapterConfig, LoraConfig, TiedLoraConfig, VBLoRAConfig, VeraConfig
from .base import Adapter
from .lora import LoRAAdapter
from .tied_lora import TiedLoRAAdapter
from .vblora import VBLoRAAdapter
from .vera import VeRAAdapter

ADAPTER_CLASSES: dict[type[AdapterConfig], type[Adapter]] = {
    VBLoRAConfig: VBLoRAAdapter,
    VeraConfig: VeRAAdapter,
    TiedLoraConfig: TiedLoRAAdapter,
    LoraConfig: LoRAAdapter,
}


def adapter_class(config: AdapterConfig) -> type[Adapter]:
    """The adapter class of a config.

    Raises:
        TypeError: ``config`` is not one of vblora's; PEFT's are not.
    """
    found = ADAPTER_CLASSES.get(type(config))
    if found is None:
        known = ", ".join(f"vblora.{kind.__name__}" for kind in ADAPTER_CLASSES)
        raise TypeError(f"`config` is a {type(config).__module__}.{type(config).__name__}; allowed are {known}.")
    return found
