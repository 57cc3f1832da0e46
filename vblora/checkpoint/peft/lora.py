"""PEFT's files of LoRA, as peft 0.21 writes and reads them. Most servers read them, too.

The update of any method can be written in this format. It is then composed: layers no longer share a bank or projections.

========================================================  ===========================================================
tensor                                                    shape
========================================================  ===========================================================
``base_model.model.LAYER.lora_A.weight``                  (r, in); of a convolution (r, in / groups, kernel)
``base_model.model.LAYER.lora_B.weight``                  (out, r); of a convolution (out, r, 1, 1)
``base_model.model.LAYER.lora_embedding_A``, ``..._B``    (r, entries), (dim, r)
========================================================  ===========================================================
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...adapters import Factors, Target
from ...config import LoraConfig
from ..contents import Contents
from ..flat import LoRAContents
from ..json_objects import JsonObject
from .common import PREFIX, as_float, decode_config, decode_extra_parameters, describe, encode_extra_parameters

_FACTOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))")
# Fields that have no effect unless others are set.
_NEUTRAL = ("megatron_core", "qalora_group_size", "runtime_config", "eva_config", "loftq_config")
# Initialisations that do not change the base model.
_INITS_OF_FACTORS = ("eva", "orthogonal")


def encode(contents: Contents, base_model: str | None = None) -> tuple[JsonObject, dict[str, Tensor]]:
    """The config and the tensors of a LoRA with the same update, in float32. A LoRA's own factors are written unchanged.

    Raises:
        ValueError: an update is not finite, or a layer is a convolution that PEFT's LoRA computes differently.
    """
    config = contents.config
    tensors = factor_tensors(_factors(contents))
    # Without a scaling of their own, factors are written scaled: LoRA multiplies the update by alpha / r.
    own = config if isinstance(config, LoraConfig) else LoraConfig(r=config.r, lora_alpha=config.r)
    description = describe(contents, base_model) | {
        "peft_type": "LORA",
        "lora_alpha": own.lora_alpha,
        "lora_dropout": config.dropout,
        "bias": "lora_only" if config.trains_biases_of_targets else config.bias,
        "init_lora_weights": own.init_lora_weights,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": own.use_rslora,
        "use_dora": False,
    }
    return description, tensors | encode_extra_parameters(contents)


def factor_tensors(factors: Iterable[tuple[Target, Factors]]) -> dict[str, Tensor]:
    """The tensors of PEFT's file, by name, for layers whose update is A and B alone.

    Raises:
        ValueError: a layer is a convolution that PEFT's LoRA computes differently.
    """
    tensors: dict[str, Tensor] = {}
    for target, (A, B, *_) in factors:
        name = f"{PREFIX}{target.name}.lora_"
        if target.unusual:
            raise ValueError(
                f'`form` is "lora", but layer `{target.name}` is a convolution with {", ".join(target.unusual)} of its own, '
                "which PEFT's LoRA ignores in the update. No other form of PEFT's holds it."
            )
        if target.kind == "embedding":
            tensors |= {f"{name}embedding_A": A, f"{name}embedding_B": B.T}
            continue
        point = (1,) * len(target.kernel[1:])
        tensors[f"{name}A.weight"] = A.reshape(-1, *target.kernel) if target.kernel else A
        tensors[f"{name}B.weight"] = B.T.reshape(*B.T.shape, *point)
    return tensors


def _factors(contents: Contents) -> Iterator[tuple[Target, Factors]]:
    """The factors to write: a LoRA's own without its scaling, or those of another method's update."""
    if not isinstance(contents, LoRAContents):
        return contents.factors(torch.float32)
    unscaled = replace(contents, config=replace(contents.config, lora_alpha=contents.config.r, use_rslora=False))
    return unscaled.factors(contents.tensors["factors"].dtype)


def decode(description: JsonObject, tensors: dict[str, Tensor]) -> LoRAContents:
    """The contents of PEFT's files of LoRA. Half precision becomes float32.

    Raises:
        ValueError: the config has a feature that vblora's LoRA lacks (DoRA, ranks per layer, ...), or a field or tensor is
            missing, unknown or invalid. The message names it as the file does.
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
    return LoRAContents(config, tuple(targets), {"factors": torch.cat(parts)}, extra_parameters=extra_parameters)
