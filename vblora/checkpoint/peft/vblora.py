"""PEFT's files of VB-LoRA, as peft 0.21 writes and reads them.

There are two forms: ``peft`` holds all h logits of each row, so that PEFT can train; ``peft-topk`` (PEFT's
``save_only_topk_weights``) holds the k best. Of each row's weights it stores all but the last. PEFT recovers that one as 1 minus
the sum of the others, in float32, and takes its logarithm. We put the largest weight last: it is far from 0 whatever the others
are, and the smallest ones keep their exact values.

========================================================  ===========================================================
tensor                                                    shape
========================================================  ===========================================================
``base_model.vblora_vector_bank``                         (h, b)
``base_model.model.LAYER.vblora_logits_A``                (r, in_features / b, h)
``base_model.model.LAYER.vblora_logits_B``                (out_features / b, r, h); our rows are ordered by rank
``..._topk_indices``, ``..._topk_weights``                in place of these, with k and k - 1 instead of h
``base_model.model.LAYER.base_layer.bias``                bias of an adapted layer
``base_model.model.NAME``                                 all other extra parameters
========================================================  ===========================================================
"""

import re
from dataclasses import replace

import torch
from torch import Tensor

from ...adapters import Target
from ...adapters.subvectors import rows_of_factors, uneven
from ...adapters.vblora import scaled
from ...adapters.vblora_rows import Deployed, Trained, candidate_dtype, draw_rows
from ...config import BEYOND_PEFT, VBLoRAConfig
from ..contents import Contents, check_finite, check_tensor, take
from ..json_objects import JsonObject, optional_field
from ..vblora import VBLoRAContents, are_mixtures
from .common import (
    FLOATS,
    LISTS,
    PREFIX,
    decode_extra_parameters,
    describe,
    encode_extra_parameters,
    refuse_other_kinds,
)

_BANK = "base_model.vblora_vector_bank"
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"
_LOGITS = re.compile(re.escape(PREFIX) + r"(.+)\.vblora_logits_([AB])(|_topk_indices|_topk_weights)")


def encode_dense(contents: Contents, base_model: str | None = None) -> tuple[JsonObject, dict[str, Tensor]]:
    """The config and the tensors of PEFT's files with all logits.

    Raises:
        ValueError: some logits are unknown or infinite, or PEFT's VB-LoRA cannot adapt a layer in this way.
    """
    assert isinstance(contents, VBLoRAContents)
    _check_layers(contents, "peft")
    return _encode(contents, _by_layer(contents, _dense_logits(contents), ""), False, base_model)


def encode_topk(contents: Contents, base_model: str | None = None) -> tuple[JsonObject, dict[str, Tensor]]:
    """The config and the tensors of PEFT's files with the k best weights of each row.

    Raises:
        ValueError: weights that this form cannot hold, or PEFT's VB-LoRA cannot adapt a layer in this way.
    """
    assert isinstance(contents, VBLoRAContents)
    _check_layers(contents, "peft-topk")
    indices, weights = _largest_last(contents.deployed())
    tensors = _by_layer(contents, indices.to(_index_dtype(contents.config.num_vectors)), _INDICES)
    return _encode(contents, tensors | _by_layer(contents, weights[:, :-1], _WEIGHTS), True, base_model)


def _check_layers(contents: VBLoRAContents, form: str) -> None:
    config = contents.config
    refuse_other_kinds(contents, form, "VB-LoRA")
    if config.train_scales:
        raise ValueError(
            f'`form` is "{form}", but the adapter has a scale for each sub-vector (`train_scales`), which PEFT\'s VB-LoRA does '
            'not support; form="lora" holds the same update.'
        )
    for target in uneven(contents.targets, config.vector_length):
        raise ValueError(
            f'`form` is "{form}", but layer `{target.name}` ({target.in_features} -> {target.out_features}) has sub-vectors that '
            f"are cut (`pad`, `vector_length`={config.vector_length}), which PEFT's VB-LoRA does not support; "
            'form="lora" holds the same update.'
        )


def _encode(
    contents: VBLoRAContents, rows: dict[str, Tensor], compact: bool, base_model: str | None
) -> tuple[JsonObject, dict[str, Tensor]]:
    config = contents.config
    tensors = {_BANK: scaled(contents.bank, config.scaling)} | rows
    names = ("num_vectors", "vector_length", "topk", "vblora_dropout", "init_vector_bank_bound", "init_logits_std")
    description = describe(contents, base_model) | {name: getattr(config, name) for name in names}
    description |= {"peft_type": "VBLORA", "bias": config.bias, "save_only_topk_weights": compact}
    return description, tensors | encode_extra_parameters(contents)


def decode(description: JsonObject, tensors: dict[str, Tensor]) -> VBLoRAContents:
    """The contents of PEFT's files of VB-LoRA. Half precision becomes float32.

    Dense logits that include ``-inf`` come from a compact file that PEFT loaded and saved again. ``-inf`` has no gradient, so
    the contents are deployed, too.

    Raises:
        ValueError: a field or tensor is missing, unknown or invalid. The message names it as the file does.
    """
    config, compact, is_of_authors = _decode_config(description)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype not in FLOATS:
            raise ValueError(f"`{key}` is {tensor.dtype}; allowed are {', '.join(map(str, FLOATS))}.")
    tensors = dict(tensors)
    logits: dict[str, dict[str, Tensor]] = {}
    for key in list(tensors):
        found = _LOGITS.fullmatch(key)
        if found and bool(found[3]) == compact:
            logits.setdefault(found[1], {})[key] = tensors.pop(key)
    if _BANK not in tensors:
        raise ValueError(f"it lacks its vector bank, tensor `{_BANK}`.")
    bank = tensors.pop(_BANK)
    check_tensor(_BANK, bank, (config.num_vectors, config.vector_length), floating=True)
    check_finite(_BANK, bank)
    if not logits:
        raise ValueError(
            f"it names no layer: there is no tensor `{PREFIX}<layer>.vblora_logits_A{_INDICES * compact}`."
        )
    extra_parameters, saved = decode_extra_parameters(tensors, config, set(logits))
    read = _read_compact if compact else _read_dense
    blocks: list[list[Tensor]] = []  # for each factor its rows: logits, or indices and weights
    targets = []
    for name, parts in logits.items():
        ranks = []
        for side in "AB":
            key = f"{PREFIX}{name}.vblora_logits_{side}"
            blocks_first = side == "B" or is_of_authors  # (blocks, r, ...); ours are (r, blocks, ...)
            block = read(key, parts, config, blocks_first)
            ranks.append([x.transpose(0, 1) if blocks_first else x for x in block])
        blocks += [[x.flatten(0, 1) for x in block] for block in ranks]
        in_features, out_features = (block[0].shape[1] * config.vector_length for block in ranks)
        targets.append(Target(name, in_features, out_features))
    first, *weights = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    dtype = torch.promote_types(bank.dtype, torch.float32)
    rows: Trained | Deployed
    if compact:
        rows = Deployed(first.to(candidate_dtype(config.num_vectors)), weights[0].to(dtype))
    else:
        dtype = torch.promote_types(dtype, first.dtype)
        rows = Trained(first.to(dtype))
    if config.target_modules is None:
        config = replace(config, target_modules=list(logits))
    config = replace(config, modules_to_save=saved or None)
    contents = VBLoRAContents(config, tuple(targets), bank.to(dtype), rows, extra_parameters=extra_parameters)
    if not compact and first.isneginf().any():
        contents = replace(contents, rows=contents.deployed())
    return contents


def _dense_logits(contents: VBLoRAContents) -> Tensor:
    """All h logits of each row, ``(S, h)``.

    The seed draws those that are not candidates. Training (weight decay, or exhausted candidates) can leave the candidates below
    them, so they are lowered to below the k-th best: PEFT then selects the vectors that we select.
    """
    config, rows = contents.config, contents.rows
    instead = 'form="peft-topk" holds what inference needs.'
    if isinstance(rows, Deployed):
        raise ValueError(f'`form` is "peft", but the adapter is a deployed one, whose other logits are gone; {instead}')
    if not rows.logits.isfinite().all():
        raise ValueError(f'`form` is "peft", but some logits are -inf, which PEFT cannot train; {instead}')
    if rows.candidates is None:
        return rows.logits
    if rows.seed is None:
        raise ValueError(
            '`form` is "peft", but the adapter has candidates and no seed, so its other logits are unknown; ' + instead
        )
    drawn = draw_rows(
        contents.sizes,
        config.num_vectors,
        None,
        seed=rows.seed,
        std=config.init_logits_std,
        init=config.init,
        device=rows.logits.device,
        dtype=rows.logits.dtype,
    )
    logits = rows.logits.float()  # as PEFT loads them: float64 logits may become equal
    selected = logits.topk(config.topk).values[:, -1:]
    below = torch.nextafter(selected, torch.full_like(selected, -torch.inf))
    return drawn.logits.float().clamp_(max=below).scatter_(1, rows.candidates.long(), logits)


def _largest_last(rows: Deployed) -> Deployed:
    """Each row in ascending order of its weights, in float32.

    Raises:
        ValueError: the last weight is not 1 minus the sum of the others.
    """
    weights, order = rows.weights.float().sort(dim=1)
    if not are_mixtures(weights):
        raise ValueError(
            '`form` is "peft-topk", which needs weights of at least 0 that sum to 1; form="lora" holds any.'
        )
    return Deployed(rows.indices.gather(1, order), weights)


def _by_layer(contents: VBLoRAContents, values: Tensor, kind: str) -> dict[str, Tensor]:
    """Rows ``(S, n)`` as the tensors of PEFT's files, named with the ending ``kind``."""
    config = contents.config
    parts = values.split(rows_of_factors(contents.targets, config.r, config.vector_length))
    tensors = {}
    for target, A, B in zip(contents.targets, parts[::2], parts[1::2], strict=True):
        name = f"{PREFIX}{target.name}.vblora_logits_"
        tensors[f"{name}A{kind}"] = A.unflatten(0, (config.r, -1))
        tensors[f"{name}B{kind}"] = B.unflatten(0, (config.r, -1)).transpose(0, 1)
    return tensors


def _index_dtype(num_vectors: int) -> torch.dtype:
    return torch.uint8 if num_vectors < 2**8 else torch.int16 if num_vectors < 2**15 else torch.int32


def _decode_config(description: JsonObject) -> tuple[VBLoRAConfig, bool, bool]:
    """The config; whether the file holds only the k best; whether it is from the PEFT fork of the paper's authors."""
    values = {name: value for name, value in description.items() if value is not None}  # null is the default
    optional_field(values, "fan_in_fan_out", bool, False)
    optional_field(values, "inference_mode", bool, False)
    compact = optional_field(values, "save_only_topk_weights", bool, False)
    is_of_authors = "init_weights" in values
    if optional_field(values, "save_topk_logits", bool, False):
        raise ValueError("it was written with `save_topk_logits`, which swaps the names of indices and logits.")
    for name in ("save_only_topk_weights", "init_weights", "save_topk_logits"):
        values.pop(name, None)
    if values.get("bias") == "vera_only":  # the name in the fork
        values["bias"] = "vblora_only"
    for name in LISTS:
        if values.get(name) in ([], ""):
            del values[name]
    for name in sorted(BEYOND_PEFT & values.keys()):
        raise ValueError(f"unknown config field `{name}`, which PEFT does not have.")
    try:
        config = VBLoRAConfig.from_dict(values | {"num_candidates": None})
    except (TypeError, ValueError) as error:
        raise ValueError(f"its config is invalid: {error}") from None
    return config, compact, is_of_authors


def _read_dense(key: str, parts: dict[str, Tensor], config: VBLoRAConfig, blocks_first: bool) -> list[Tensor]:
    logits = take(parts, key)
    _check_shape(key, logits, config.r, config.num_vectors, blocks_first, floating=True)
    if logits.isnan().any() or logits.isposinf().any():
        raise ValueError(f"`{key}` holds NaN or +inf.")
    if (logits.amax(-1) == -torch.inf).any():
        raise ValueError(f"`{key}` holds a row of nothing but -inf.")
    return [logits]


def _read_compact(key: str, parts: dict[str, Tensor], config: VBLoRAConfig, blocks_first: bool) -> list[Tensor]:
    """Indices in int64 and weights in float64, the largest first; of equal weights the lowest index first."""
    indices, weights = take(parts, key + _INDICES), take(parts, key + _WEIGHTS)
    _check_shape(key + _INDICES, indices, config.r, config.topk, blocks_first, floating=False)
    check_tensor(key + _WEIGHTS, weights, (*indices.shape[:2], config.topk - 1), floating=True)
    indices, weights = indices.long(), weights.double()
    if not ((indices >= 0) & (indices < config.num_vectors)).all():
        raise ValueError(f"`{key}{_INDICES}` holds an index that is not from 0 to {config.num_vectors - 1}.")
    if not ((weights >= 0) & (weights <= 1)).all():
        raise ValueError(f"`{key}{_WEIGHTS}` holds a weight that is not from 0 to 1.")
    rest = (1 - weights.sum(-1, keepdim=True)).clamp_min(0)
    indices, order = indices.sort(dim=-1)
    if (indices.diff(dim=-1) == 0).any():
        raise ValueError(f"`{key}{_INDICES}` names a bank vector twice for one sub-vector.")
    weights = torch.cat([weights, rest], -1).gather(-1, order)
    weights = weights / weights.sum(-1, keepdim=True)  # in half precision the sum may exceed 1
    weights, order = weights.sort(dim=-1, descending=True, stable=True)
    return [indices.gather(-1, order), weights]


def _check_shape(key: str, tensor: Tensor, r: int, last: int, blocks_first: bool, *, floating: bool) -> None:
    shape = list(tensor.shape)
    if len(shape) != 3 or 0 in shape[:2]:
        raise ValueError(f"`{key}` is {tuple(shape)}, but must have three dimensions.")
    blocks = shape[0 if blocks_first else 1]
    check_tensor(key, tensor, (blocks, r, last) if blocks_first else (r, blocks, last), floating=floating)
