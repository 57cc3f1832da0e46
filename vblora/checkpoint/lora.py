"""Export to PEFT's files of LoRA, which PEFT and most servers read. What comes out is composed: it shares no bank any more."""

from torch import Tensor

from .contents import Contents
from .peft import PREFIX, describe, encode_beside

FORMS = ("lora",)


def encode(contents: Contents, base_model: str | None = None) -> tuple[dict, dict[str, Tensor]]:
    """The config and the tensors of a LoRA with the same update: A ``(r, in_features)`` and B ``(out_features, r)``, float32.

    Raises:
        ValueError: an update that is not finite.
    """
    config = contents.config
    tensors = {}
    for target, (A, B, *_) in contents.factors():
        tensors[f"{PREFIX}{target.name}.lora_A.weight"] = A
        tensors[f"{PREFIX}{target.name}.lora_B.weight"] = B.T
    description = describe(contents, base_model) | {
        "peft_type": "LORA",
        "lora_alpha": config.r,  # LoRA scales its update by alpha / r
        "lora_dropout": config.vblora_dropout,
        "bias": "lora_only" if config.bias == "vblora_only" else config.bias,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }
    return description, tensors | encode_beside(contents)
