"""Export to PEFT's files of LoRA, which PEFT and most servers read. What comes out is composed: it shares no bank any more."""

from torch import Tensor

from .contents import Contents
from .peft import PREFIX, describe, encode_beside

FORMS = ("lora",)


def encode(contents: Contents, base_model: str | None = None) -> tuple[dict, dict[str, Tensor]]:
    """The config and the tensors of a LoRA with the same update: A ``(r, in_features)`` and B ``(out_features, r)``, float32.

    A convolution's are ``(r, in_channels, *kernel_size)`` and ``(out_channels, r, 1, ...)``.

    Raises:
        ValueError: an update that is not finite, or a convolution of a kind that PEFT's LoRA computes otherwise.
    """
    config = contents.config
    tensors = {}
    for target, (A, B, *_) in contents.factors():
        name = f"{PREFIX}{target.name}.lora_"
        if target.unusual:
            raise ValueError(
                f'`form` is "lora", but layer `{target.name}` is a convolution with other {", ".join(target.unusual)} than most, '
                "which PEFT's LoRA leaves out of its update."
            )
        if target.kind == "embedding":
            tensors |= {f"{name}embedding_A": A, f"{name}embedding_B": B.T}
            continue
        point = (1,) * len(target.kernel[1:])
        tensors[f"{name}A.weight"] = A.reshape(-1, *target.kernel) if target.kernel else A
        tensors[f"{name}B.weight"] = B.T.reshape(*B.T.shape, *point)
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
