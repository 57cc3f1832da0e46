"""PEFT's files of LoRA, as peft 0.21 writes and reads them, and most servers read them.

Any method's update can be written so. What comes out is composed: it shares no bank and no projections any more.

========================================================  ===========================================================
tensor                                                    shape
========================================================  ===========================================================
``base_model.model.LAYER.lora_A.weight``                  (r, in); of a convolution (r, in / groups, kernel)
``base_model.model.LAYER.lora_B.weight``                  (out, r); of a convolution (out, r, 1, 1)
``base_model.model.LAYER.lora_embedding_A``, ``..._B``    (r, entries), (dim, r)
========================================================  ===========================================================
"""

import re
from dataclasses import replace

import torch
from torch import Tensor

from ...adapters import Target
from ...config import LoraConfig
from ..contents import Contents
from ..flat import FlatContents
from .common import PREFIX, as_float, decode_config, decode_extra_parameters, describe, encode_extra_parameters

FORMS = ("lora",)
_FACTOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))")
# Fields that mean nothing unless others say so.
_NEUTRAL = ("megatron_core", "qalora_group_size", "runtime_config", "eva_config", "loftq_config")
# Ways to begin that leave the base model as it was.
_INITS_OF_FACTORS = ("eva", "orthogonal")


def encode(contents: Contents, base_model: str | None = None) -> tuple[dict, dict[str, Tensor]]:
    """The config and the tensors of a LoRA with the same update, float32. A LoRA's own factors are written as they are.

    A convolution's are ``(r, in_channels, *kernel_size)`` and ``(out_channels, r, 1, ...)``.

    Raises:
        ValueError: an update that is not finite, or a convolution of a kind that PEFT's LoRA computes otherwise.
    """
    config = contents.config
    is_lora, dtype = isinstance(config, LoraConfig), torch.float32
    if is_lora:  # unscaled
        contents = replace(contents, config=replace(config, lora_alpha=config.r, use_rslora=False))
        dtype = contents.tensors["factors"].dtype
    tensors = {}
    for target, (A, B, *_) in contents.factors(dtype):
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
        "lora_alpha": config.lora_alpha if is_lora else config.r,  # LoRA scales its update by alpha / r
        "lora_dropout": config.dropout,
        "bias": "lora_only" if config.trains_biases_of_targets else config.bias,
        "init_lora_weights": config.init_lora_weights if is_lora else True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": is_lora and config.use_rslora,
        "use_dora": False,
    }
    return description, tensors | encode_extra_parameters(contents)


def decode(description: dict, tensors: dict[str, Tensor]) -> FlatContents:
    """The contents of PEFT's files of LoRA; half precision becomes float32, which holds it exactly.

    Raises:
        ValueError: a field that vblora's LoRA does not have (DoRA, ranks by layer, ...), or something is missing, too much, or
            not what it must be; named as in the file.
    """
    if description.get("init_lora_weights") in _INITS_OF_FACTORS:
        description = description | {"init_lora_weights": True}
    config = decode_config(LoraConfig, description, _NEUTRAL)
    tensors = dict(tensors)
    layers: dict[str, dict[str, Tensor]] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for key in list(tensors):
        if found := _FACTOR.fullmatch(key):
            factor = as_float(key, tensors.pop(key))
            if factor.dim() < 2:
                raise ValueError(f"`{key}` is {tuple(factor.shape)}, but must have at least two dimensions.")
            layers.setdefault(found[1], {})[found[2] or found[3]] = factor.flatten(1)
            if found[3]:
                kinds[found[1]] = "embedding", ()
            elif factor.dim() > 2 and found[2] == "A":
                kinds[found[1]] = "convolution", tuple(factor.shape[1:])
    targets, parts = [], []
    for name, pair in layers.items():
        for side in "AB":
            if side not in pair:
                raise ValueError(f"it lacks tensor `{PREFIX}{name}.lora_{side}.weight`.")
        A, B = pair["A"], pair["B"].T
        for side, factor in zip("AB", (A, B), strict=True):
            if factor.shape[0] != config.r:
                raise ValueError(
                    f"`{PREFIX}{name}.lora_{side}.weight` is of rank {factor.shape[0]}, but `r` is {config.r}."
                )
        targets.append(Target(name, A.shape[1], B.shape[1], *kinds.get(name, ())))
        parts += [A.reshape(-1), B.reshape(-1)]
    if not layers:
        raise ValueError(f"it names no layer: there is no tensor `{PREFIX}<layer>.lora_A.weight`.")
    extra_parameters, saved = decode_extra_parameters(tensors, config, set(layers))
    if config.target_modules is None:
        config = replace(config, target_modules=list(layers))
    config = replace(config, modules_to_save=saved or None)
    return FlatContents(config, tuple(targets), {"factors": torch.cat(parts)}, extra_parameters=extra_parameters)
