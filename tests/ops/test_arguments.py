"""Each bad argument is refused, and what is said names it. A tracer is told the same as a kernel."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

ROWS, COLUMNS, VECTORS, LENGTH, K = 6, 9, 4, 5, 2


def good_arguments(operator: str, device: torch.device) -> dict[str, Any]:
    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    bank = zeros(VECTORS, LENGTH)
    candidates = zeros(ROWS, COLUMNS, dtype=torch.int16)
    if operator == "admixture":
        return {"logits": zeros(ROWS, COLUMNS), "bank": bank, "candidates": candidates, "k": K, "out_dtype": None}
    if operator == "compose":
        indices = zeros(ROWS, K, dtype=torch.int32)
        return {"bank": bank, "indices": indices, "weights": zeros(ROWS, K), "out_dtype": None}
    return {
        "grad_subvectors": zeros(ROWS, LENGTH),
        "grad_weights": zeros(ROWS, K),
        "indices": zeros(ROWS, K, dtype=torch.int32),
        "weights": zeros(ROWS, K),
        "bank": bank,
        "candidates": candidates,
        "num_candidates": COLUMNS,
        "need_logits": True,
        "need_bank": True,
    }


TENSORS = {
    "admixture": ("logits", "bank", "candidates"),
    "admixture_backward": ("grad_subvectors", "grad_weights", "indices", "weights", "bank", "candidates"),
    "compose": ("bank", "indices", "weights"),
}

REFERENCE_DEVICE = {"admixture": "logits", "admixture_backward": "indices", "compose": "bank"}


def refused(operator: Callable, arguments: dict[str, Any], name: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=re.escape(f"`{name}`")):
        operator(**arguments)


def one_row_more(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor[:1]])


def one_column_more(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor[:, :1]], dim=1)


SHAPES = [
    # operator, what is changed (a function of the good value, or another one), what is named
    ("admixture", {"candidates": one_row_more}, "candidates"),
    ("admixture", {"candidates": one_column_more}, "candidates"),
    ("admixture", {"candidates": torch.t}, "candidates"),
    ("admixture", {"candidates": None}, "logits"),  # nine columns for four vectors
    ("admixture", {"candidates": None, "logits": lambda x: x[:, :3]}, "logits"),
    ("admixture", {"k": 0}, "k"),
    ("admixture", {"k": -1}, "k"),
    ("admixture", {"k": COLUMNS + 1}, "k"),
    ("admixture", {"k": 2**40}, "k"),
    ("admixture_backward", {"grad_subvectors": None, "grad_weights": None}, "grad_subvectors"),
    ("admixture_backward", {"grad_subvectors": one_row_more}, "grad_subvectors"),
    ("admixture_backward", {"grad_subvectors": one_column_more}, "grad_subvectors"),
    ("admixture_backward", {"grad_weights": one_row_more}, "grad_weights"),
    ("admixture_backward", {"grad_weights": one_column_more}, "grad_weights"),
    ("admixture_backward", {"weights": one_row_more}, "weights"),
    ("admixture_backward", {"weights": one_column_more}, "weights"),
    ("admixture_backward", {"candidates": one_row_more}, "candidates"),
    ("admixture_backward", {"candidates": one_column_more}, "candidates"),
    ("admixture_backward", {"candidates": None}, "num_candidates"),
    ("admixture_backward", {"candidates": None, "num_candidates": -1}, "num_candidates"),
    ("compose", {"weights": one_row_more}, "weights"),
    ("compose", {"weights": one_column_more}, "weights"),
    *((operator, {name: rank}, name)
      for operator, names in TENSORS.items() for name in names
      for rank in (lambda x: x[0], lambda x: x[None], lambda x: x.new_zeros(()))),
]  # fmt: skip

DTYPES = [
    ("admixture", {"logits": torch.int32}, "logits"),
    ("admixture", {"logits": torch.int32, "bank": torch.int32}, "logits"),
    ("admixture", {"logits": torch.complex64, "bank": torch.complex64}, "logits"),
    ("admixture", {"logits": torch.float8_e4m3fn, "bank": torch.float8_e4m3fn}, "logits"),
    ("admixture", {"bank": torch.float64}, "bank"),
    ("admixture", {"bank": torch.bfloat16}, "bank"),
    ("admixture", {"logits": torch.float16}, "bank"),
    ("admixture", {"candidates": torch.int64}, "candidates"),
    ("admixture", {"candidates": torch.uint8}, "candidates"),
    ("admixture", {"candidates": torch.float32}, "candidates"),
    ("admixture_backward", {"grad_subvectors": torch.int32}, "grad_subvectors"),
    ("admixture_backward", {"grad_weights": torch.float64}, "grad_weights"),
    ("admixture_backward", {"grad_weights": torch.bfloat16}, "grad_weights"),
    ("admixture_backward", {"indices": torch.int64}, "indices"),
    ("admixture_backward", {"indices": torch.int16}, "indices"),
    ("admixture_backward", {"weights": torch.float64}, "weights"),
    ("admixture_backward", {"weights": torch.bfloat16}, "weights"),
    ("admixture_backward", {"bank": torch.float64}, "weights"),
    ("admixture_backward", {"bank": torch.int32}, "bank"),
    ("admixture_backward", {"candidates": torch.int64}, "candidates"),
    ("admixture_backward", {"candidates": torch.float32}, "candidates"),
    ("compose", {"bank": torch.int32}, "bank"),
    ("compose", {"bank": torch.float64}, "weights"),
    ("compose", {"indices": torch.float32}, "indices"),
    ("compose", {"indices": torch.int8}, "indices"),
    ("compose", {"indices": torch.bool}, "indices"),
    ("compose", {"weights": torch.float64}, "weights"),
    ("compose", {"weights": torch.float16}, "weights"),
]


def changed(arguments: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    def change(name: str, to: Any) -> Any:
        return arguments[name].to(to) if isinstance(to, torch.dtype) else to(arguments[name]) if callable(to) else to

    return arguments | {name: change(name, to) for name, to in changes.items()}


@pytest.mark.parametrize("operator", TENSORS)
@pytest.mark.parametrize("device", ["backend", "meta"])
def test_good_arguments_are_good(backend, operator, device):
    device = backend.device if device == "backend" else torch.device(device)
    getattr(backend.ops, operator)(**good_arguments(operator, device))


@pytest.mark.parametrize(("operator", "changes", "name"), SHAPES)
@pytest.mark.parametrize("device", ["backend", "meta"])
def test_shape(backend, device, operator, changes, name):
    device = backend.device if device == "backend" else torch.device(device)
    refused(getattr(backend.ops, operator), changed(good_arguments(operator, device), changes), name)


@pytest.mark.parametrize(("operator", "changes", "name"), DTYPES)
@pytest.mark.parametrize("device", ["backend", "meta"])
def test_dtype(backend, device, operator, changes, name):
    device = backend.device if device == "backend" else torch.device(device)
    refused(getattr(backend.ops, operator), changed(good_arguments(operator, device), changes), name)


@pytest.mark.parametrize("out_dtype", [torch.int32, torch.complex64, torch.bool, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("operator", ["admixture", "compose"])
def test_out_dtype(backend, operator, out_dtype):
    arguments = good_arguments(operator, backend.device) | {"out_dtype": out_dtype}
    refused(getattr(backend.ops, operator), arguments, "out_dtype")


@pytest.mark.parametrize(
    ("operator", "name"), [(operator, name) for operator, names in TENSORS.items() for name in names]
)
def test_device(backend, operator, name):
    # One is the reference that the others are held against; if that is the odd one, another is named.
    arguments = good_arguments(operator, backend.device)
    with pytest.raises((RuntimeError, ValueError), match=r"device|\bmeta\b") as raised:
        getattr(backend.ops, operator)(**arguments | {name: arguments[name].to("meta")})
    named = set(re.findall(r"`(\w+)`", str(raised.value))) & set(arguments)
    if name == REFERENCE_DEVICE[operator]:
        assert named, str(raised.value)
    else:
        assert named == {name}


@pytest.mark.parametrize("name", ["bank", "logits"])
def test_more_than_32_bits_can_count(backend, name):
    # Expanded from one element. It is refused before anyone makes a dense copy.
    arguments = good_arguments("admixture", backend.device)
    if name == "bank":
        arguments["bank"] = arguments["bank"][:1].expand(2**31, LENGTH)
    else:
        arguments["logits"] = arguments["logits"][:, :1].expand(ROWS, 2**31)
        arguments["candidates"] = arguments["candidates"][:, :1].expand(ROWS, 2**31)
    refused(backend.ops.admixture, arguments, name)
