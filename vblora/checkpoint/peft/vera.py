"""PEFT's files of VeRA, as peft 0.21 writes and reads them. They do not hold the widths of the layers' inputs.

========================================================  ===========================================================
tensor                                                    shape
========================================================  ===========================================================
``base_model.vera_A``, ``base_model.vera_B``              (r, in), (out, r) of the largest widths, or wider; left out
                                                          with ``save_projection=False``: PEFT's key draws them
``base_model.model.LAYER.vera_lambda_d``                  (r,)
``base_model.model.LAYER.vera_lambda_b``                  (out,)
========================================================  ===========================================================
"""

import re
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from ...adapters import Target, VeRAAdapter
from ...adapters.vera import pefts_projection
from ...config import VeraConfig
from ..contents import Contents, check_finite, check_tensor
from ..json_objects import JsonObject
from ..vera import VeRAContents
from .common import (
    PREFIX,
    as_float,
    decode_config,
    decode_extra_parameters,
    describe,
    encode_extra_parameters,
    refuse_other_kinds,
)

_PAIR = {"A": "base_model.vera_A", "B": "base_model.vera_B"}
_VECTOR = re.compile(re.escape(PREFIX) + r"(.+)\.vera_lambda_([bd])")
_NOT_KNOWN = (
    "PEFT's files of VeRA do not hold the widths of the layers' inputs. Load the adapter into its model, then save it with "
    "vblora.save."
)
_FIELDS = ("projection_prng_key", "vera_dropout", "d_initial", "init_weights", "bias")


def encode(contents: Contents, base_model: str | None = None) -> tuple[JsonObject, dict[str, Tensor]]:
    """The config and the tensors of PEFT's files for ``contents``. The projections are left out if ``save_projection`` is
    False and PEFT draws the same ones.

    Raises:
        ValueError: a layer is not linear.
    """
    assert isinstance(contents, VeRAContents)
    refuse_other_kinds(contents, "peft", "VeRA")
    config, own = contents.config, contents.tensors
    tensors = {}
    widths = [target.out_features for target in contents.targets]
    for target, d, b in zip(contents.targets, own["d"], own["e"].split(widths), strict=True):
        tensors[f"{PREFIX}{target.name}.vera_lambda_d"] = d
        tensors[f"{PREFIX}{target.name}.vera_lambda_b"] = b
    pair = own["A"], own["B"]
    drawn = None if config.save_projection else pefts_projection(contents.targets, config.r, config.projection_prng_key)
    saves = drawn is None or not all(map(torch.equal, drawn, pair))
    if saves:
        tensors |= {_PAIR["A"]: pair[0], _PAIR["B"]: pair[1].T}
    description = describe(contents, base_model) | {name: getattr(config, name) for name in _FIELDS}
    del description["exclude_modules"]  # PEFT's VeRA lacks this field
    return description | {"peft_type": "VERA", "save_projection": saves}, tensors | encode_extra_parameters(contents)


def decode(description: JsonObject, tensors: dict[str, Tensor]) -> "UnplacedContents":
    """The contents of PEFT's files of VeRA. Half precision becomes float32.

    Raises:
        ValueError: a field or tensor is missing, unknown or invalid. The message names it as the file does.
    """
    config = decode_config(VeraConfig, description)
    tensors = dict(tensors)
    layers: dict[str, dict[str, Tensor]] = {}
    for key in list(tensors):
        if found := _VECTOR.fullmatch(key):
            layers.setdefault(found[1], {})[found[2]] = as_float(key, tensors.pop(key))
    if not layers:
        raise ValueError(f"it names no layer: there is no tensor `{PREFIX}<layer>.vera_lambda_b`.")
    pair = {side: as_float(key, tensors.pop(key)) for side, key in _PAIR.items() if key in tensors}
    if len(pair) == 1:
        raise ValueError(f"it lacks tensor `{_PAIR[min({'A', 'B'} - pair.keys())]}`.")
    if config.save_projection and not pair:
        raise ValueError(f"it lacks tensor `{_PAIR['A']}`, though its config says `save_projection`.")
    extra_parameters, saved = decode_extra_parameters(tensors, config, set(layers))
    for name, vectors in layers.items():
        for kind in "bd":
            if kind not in vectors:
                raise ValueError(f"it lacks tensor `{PREFIX}{name}.vera_lambda_{kind}`.")
        check_tensor(f"{PREFIX}{name}.vera_lambda_d", vectors["d"], (config.r,), floating=True)
        check_tensor(f"{PREFIX}{name}.vera_lambda_b", vectors["b"], (vectors["b"].numel(),), floating=True)
        for kind, vector in vectors.items():
            check_finite(f"{PREFIX}{name}.vera_lambda_{kind}", vector)
    width = pair["A"].shape[-1] if pair and pair["A"].dim() else 0
    targets = tuple(Target(name, width, vectors["b"].numel()) for name, vectors in layers.items())
    if pair:
        least = max(target.out_features for target in targets)
        rows = max([*pair["B"].shape[:1], least])
        for side, size in (("A", (config.r, width)), ("B", (rows, config.r))):
            check_tensor(_PAIR[side], pair[side], size, floating=True)
            check_finite(_PAIR[side], pair[side])
    if config.target_modules is None:
        config = replace(config, target_modules=list(layers))
    config = replace(config, modules_to_save=saved or None)
    vectors_of = {name: (own["d"], own["b"]) for name, own in layers.items()}
    return UnplacedContents(
        config, targets, vectors_of, (pair["A"], pair["B"].T) if pair else None, extra_parameters=extra_parameters
    )


def _not_known(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(_NOT_KNOWN)


@dataclass(frozen=True)
class UnplacedContents(Contents):
    """A VeRA adapter whose layers have inputs of unknown width until :meth:`in_order` gets them from a model.

    ``in_features`` of each of ``targets`` is the largest width, or 0 if that is unknown, too.

    Attributes:
        vectors: by layer, d ``(r,)`` and e ``(out_features,)``.
        pair: A ``(r, in)`` and B ``(r, out)``; None if PEFT's key draws them.
    """

    config: VeraConfig
    vectors: dict[str, tuple[Tensor, Tensor]]
    pair: tuple[Tensor, Tensor] | None

    def check(self) -> None:
        self.check_extra_parameters()  # `decode` has checked the rest, as far as it can without a model

    def check_layers(self, targets: tuple[Target, ...]) -> None:
        pass  # `in_order` checks what is known

    def in_order(self, targets: tuple[Target, ...]) -> Contents:
        widths = {target.name: target.in_features for target in targets}
        known = tuple(replace(t, in_features=widths.get(t.name, t.in_features)) for t in self.targets)
        sizes = VeRAAdapter.pair_sizes(known, self.config.r)
        pair = self.pair
        if pair is None:
            pair = pefts_projection(known, self.config.r, self.config.projection_prng_key)
        elif pair[0].shape[1] < sizes["A"][1]:
            raise ValueError(
                f"`{_PAIR['A']}` is for inputs of up to {pair[0].shape[1]}, the model's are {sizes['A'][1]}."
            )
        tensors = {side: tensor[:, : sizes[side][1]].contiguous() for side, tensor in zip("AB", pair, strict=True)}
        tensors["d"] = torch.stack([self.vectors[target.name][0] for target in known])
        tensors["e"] = torch.cat([self.vectors[target.name][1] for target in known])
        return VeRAContents(self.config, known, tensors, extra_parameters=self.extra_parameters).in_order(targets)

    check_widths_known = check_sizes = write_over = _reordered = adapter = all_factors = encode = _not_known
    of = decode = classmethod(_not_known)
