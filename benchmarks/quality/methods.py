"""What is compared: each method's config and learning rates.

They are not tuned yet. VB-LoRA's are the best of a dozen short runs of one seed, the others' are first guesses: what these$
recipes give is no comparison of methods.
"""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import vblora

CONFIGS = {
    "vblora": vblora.VBLoRAConfig,
    "lora": vblora.LoraConfig,
    "vera": vblora.VeraConfig,
    "tied_lora": vblora.TiedLoraConfig,
}


@dataclass(frozen=True)
class Recipe:
    """How a method is trained.

    Attributes:
        method: a key of ``CONFIGS``; None trains the head on the frozen encoder.
        config: fields of its config.
        rates: arguments of ``vblora.parameter_groups``.
    """

    method: str | None
    config: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    warm_up: float = 0.06  # share of the steps

    def changed(self, settings: dict[str, Any]) -> "Recipe":
        """The same with some settings of others, each where it belongs by its name."""
        own = {name: value for name, value in settings.items() if name in {f.name for f in fields(self)}}
        rates = {name: value for name, value in settings.items() if name.startswith("lr_")}
        config = {name: value for name, value in settings.items() if name not in own and name not in rates}
        return replace(self, config=self.config | config, rates=self.rates | rates, **own)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_QUERY_VALUE = {"target_modules": ["query", "value"]}
_ALL = {"target_modules": "all-linear"}
_BANK = {"r": 4, "num_vectors": 90, "vector_length": 128}
_SCALED = {"scaling": 4}
_FAST = {"lr_bank": 3e-3, "lr_logits": 1e-1}

RECIPES = {
    "frozen encoder": Recipe(None),
    "LoRA r=8": Recipe("lora", {"r": 8, "lora_alpha": 8} | _ALL),
    "LoRA r=8, query and value": Recipe("lora", {"r": 8, "lora_alpha": 8} | _QUERY_VALUE),
    "VeRA r=256": Recipe("vera", {"r": 256} | _ALL),
    "Tied-LoRA r=8": Recipe("tied_lora", {"r": 8} | _ALL),
    "VB-LoRA": Recipe("vblora", _BANK | _ALL | _SCALED, _FAST),
    "VB-LoRA, query and value": Recipe("vblora", _BANK | _QUERY_VALUE | _SCALED, _FAST),
    "VB-LoRA, the paper's rates": Recipe("vblora", _BANK | _ALL, {"lr_bank": 1e-3, "lr_logits": 1e-2}),
}
