"""Bad arguments raise an error that names the argument. Kernels, fake kernels and the oracle say the same: one table below."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vblora import reference

from .cases import INF, NAN

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
    if operator == "draw_logits_":
        logits = zeros(ROWS, COLUMNS)
        return {"logits": logits, "candidates": candidates, "num_vectors": 20, "seed": -(2**63), "std": 1.0}
    if operator == "add_updates_":
        tensors = {"y": zeros(ROWS, 3, LENGTH), "x": zeros(ROWS, 3, COLUMNS)}
        tensors |= {"A": zeros(VECTORS, K, COLUMNS), "B": zeros(VECTORS, K, LENGTH)}
        return tensors | {"adapters": zeros(ROWS, dtype=torch.int64)}
    if operator == "draw_uniform_":
        return {"values": zeros(ROWS, COLUMNS), "seed": -(2**63), "stream": 2**32 - 1, "bound": 1.0}
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
    "add_updates_": ("y", "x", "A", "B", "adapters"),
    "draw_logits_": ("logits", "candidates"),
    "draw_uniform_": ("values",),
}

# The tensor whose device the others must share.
FIRST = {
    "admixture": "logits",
    "admixture_backward": "indices",
    "compose": "bank",
    "add_updates_": "y",
    "draw_logits_": "logits",
    "draw_uniform_": "values",
}


def one_row_more(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor[:1]])


def one_column_more(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor[:, :1]], dim=1)


FLOATS = "allowed are torch.float32, torch.float64, torch.bfloat16 and torch.float16."
CANDIDATES = "allowed are torch.int16 and torch.int32."
INDICES = "allowed are torch.uint8, torch.int16, torch.int32 and torch.int64."
LIKE_LOGITS = "but must have (6, 9), the shape of `logits`."
LIKE_INDICES = "but must have (6, 2), the shape of `indices`."
LIKE_WEIGHTS = "but must have (6, 2), the shape of `weights`."
LIKE_SUBVECTORS = "but must have (6, 5), the rows of `indices`, the columns of `bank`."
LIKE_CANDIDATES = "but must have (6, 9), the rows of `indices`, `num_candidates`."
BACKWARD, DRAW, UNIFORM = "admixture_backward", "draw_logits_", "draw_uniform_"
UPDATES = "add_updates_"
LIKE_Y = "but must have the shape of `y`, (6, 3, 5), except in the last dimension."
LIKE_A = "but must have the shape of `A`, (4, 2, 9), with a last dimension of 5."

MESSAGES = [
    # operator, changes (a dtype, a function of the good value, or another value), message
    ("admixture", {"candidates": one_row_more}, f"`candidates` has shape (7, 9), {LIKE_LOGITS}"),
    ("admixture", {"candidates": one_column_more}, f"`candidates` has shape (6, 10), {LIKE_LOGITS}"),
    ("admixture", {"candidates": torch.t}, f"`candidates` has shape (9, 6), {LIKE_LOGITS}"),
    ("admixture", {"candidates": None},
     "`logits` has 9 columns, but `bank` has 4 vectors; without `candidates` both must be equal."),
    ("admixture", {"candidates": None, "logits": lambda x: x[:, :3]},
     "`logits` has 3 columns, but `bank` has 4 vectors; without `candidates` both must be equal."),
    *(("admixture", {"k": k}, f"`k` is {k}, but must be between 1 and 9, the number of columns of `logits`.")
      for k in (0, -1, COLUMNS + 1, 2**40)),
    ("admixture", {"logits": torch.int32}, f"`logits` is torch.int32; {FLOATS}"),
    ("admixture", {"logits": torch.complex64, "bank": torch.complex64}, f"`logits` is torch.complex64; {FLOATS}"),
    ("admixture", {"logits": torch.float8_e4m3fn, "bank": torch.float8_e4m3fn},
     f"`logits` is torch.float8_e4m3fn; {FLOATS}"),
    ("admixture", {"bank": torch.float64}, "`bank` is torch.float64, but must be torch.float32, the dtype of `logits`."),
    ("admixture", {"bank": torch.bfloat16}, "`bank` is torch.bfloat16, but must be torch.float32, the dtype of `logits`."),
    ("admixture", {"logits": torch.float16}, "`bank` is torch.float32, but must be torch.float16, the dtype of `logits`."),
    *(("admixture", {"candidates": dtype}, f"`candidates` is {dtype}; {CANDIDATES}")
      for dtype in (torch.int64, torch.uint8, torch.float32)),
    (BACKWARD, {"grad_subvectors": None, "grad_weights": None},
     "`grad_subvectors` and `grad_weights` are both None; pass at least one."),
    (BACKWARD, {"grad_subvectors": one_row_more}, f"`grad_subvectors` has shape (7, 5), {LIKE_SUBVECTORS}"),
    (BACKWARD, {"grad_subvectors": one_column_more}, f"`grad_subvectors` has shape (6, 6), {LIKE_SUBVECTORS}"),
    (BACKWARD, {"grad_subvectors": torch.int32}, f"`grad_subvectors` is torch.int32; {FLOATS}"),
    (BACKWARD, {"grad_weights": one_row_more}, f"`grad_weights` has shape (7, 2), {LIKE_WEIGHTS}"),
    (BACKWARD, {"grad_weights": one_column_more}, f"`grad_weights` has shape (6, 3), {LIKE_WEIGHTS}"),
    *((BACKWARD, {"grad_weights": dtype}, f"`grad_weights` is {dtype}, but must be torch.float32, the dtype of `weights`.")
      for dtype in (torch.float64, torch.bfloat16)),
    (BACKWARD, {"weights": one_row_more}, f"`weights` has shape (7, 2), {LIKE_INDICES}"),
    (BACKWARD, {"weights": one_column_more}, f"`weights` has shape (6, 3), {LIKE_INDICES}"),
    *((BACKWARD, {"weights": dtype}, f"`weights` is {dtype}, but must be torch.float32, since `bank` is torch.float32.")
      for dtype in (torch.float64, torch.bfloat16)),
    (BACKWARD, {"bank": torch.float64}, "`weights` is torch.float32, but must be torch.float64, since `bank` is torch.float64."),
    (BACKWARD, {"bank": torch.int32}, f"`bank` is torch.int32; {FLOATS}"),
    *((BACKWARD, {"indices": dtype}, f"`indices` is {dtype}, but must be torch.int32, the dtype that admixture returns.")
      for dtype in (torch.int64, torch.int16)),
    (BACKWARD, {"candidates": one_row_more}, f"`candidates` has shape (7, 9), {LIKE_CANDIDATES}"),
    (BACKWARD, {"candidates": one_column_more}, f"`candidates` has shape (6, 10), {LIKE_CANDIDATES}"),
    *((BACKWARD, {"candidates": dtype}, f"`candidates` is {dtype}; {CANDIDATES}")
      for dtype in (torch.int64, torch.float32)),
    *((BACKWARD, {"candidates": None, "num_candidates": number},
       f"`num_candidates` is {number}, but `bank` has 4 vectors; without `candidates` both must be equal.")
      for number in (9, -1)),
    (BACKWARD, {"candidates": lambda x: x[:, :1], "num_candidates": 1},
     "`num_candidates` is 1, but must be at least 2, the number of columns of `indices`."),
    ("compose", {"weights": one_row_more}, f"`weights` has shape (7, 2), {LIKE_INDICES}"),
    ("compose", {"weights": one_column_more}, f"`weights` has shape (6, 3), {LIKE_INDICES}"),
    *(("compose", {"weights": dtype}, f"`weights` is {dtype}, but must be torch.float32, since `bank` is torch.float32.")
      for dtype in (torch.float64, torch.float16)),
    ("compose", {"bank": torch.float64}, "`weights` is torch.float32, but must be torch.float64, since `bank` is torch.float64."),
    ("compose", {"bank": torch.int32}, f"`bank` is torch.int32; {FLOATS}"),
    *(("compose", {"indices": dtype}, f"`indices` is {dtype}; {INDICES}")
      for dtype in (torch.float32, torch.int8, torch.bool)),
    *((operator, {"out_dtype": dtype}, f"`out_dtype` is {dtype}; {FLOATS}") for operator in ("admixture", "compose")
      for dtype in (torch.int32, torch.complex64, torch.bool, torch.float8_e4m3fn)),
    *((UPDATES, {"y": dtype}, f"`y` is {dtype}; {FLOATS}") for dtype in (torch.int32, torch.complex64)),
    (UPDATES, {"y": lambda y: y[0, 0, 0]}, "`y` has no dimensions, but must have at least 1."),
    *((UPDATES, {name: torch.bfloat16}, f"`{name}` is torch.bfloat16, but must be torch.float32, the dtype of `y`.")
      for name in ("x", "A", "B")),
    (UPDATES, {"x": lambda x: x[:, :2]}, f"`x` has shape (6, 2, 9), {LIKE_Y}"),
    (UPDATES, {"x": lambda x: x[:, 0]}, f"`x` has shape (6, 9), {LIKE_Y}"),
    (UPDATES, {"A": lambda A: A[:, :, :3]}, "`A` has shape (4, 2, 3), but must have (adapters, rank, 9), with `adapters`."),
    (UPDATES, {"A": lambda A: A[0]}, "`A` has shape (2, 9), but must have (adapters, rank, 9), with `adapters`."),
    (UPDATES, {"adapters": None}, "`A` has shape (4, 2, 9), but must have (rank, 9), without `adapters`."),
    (UPDATES, {"B": lambda B: B[:3]}, f"`B` has shape (3, 2, 5), {LIKE_A}"),
    (UPDATES, {"B": lambda B: B[:, :1]}, f"`B` has shape (4, 1, 5), {LIKE_A}"),
    (UPDATES, {"B": lambda B: B[:, :, :4]}, f"`B` has shape (4, 2, 4), {LIKE_A}"),
    (UPDATES, {"A": lambda A: A[:, :1].expand(4, 4097, 9), "B": lambda B: B[:, :1].expand(4, 4097, 5)},
     "`A` has rank 4097, but must have at most 4096."),
    (UPDATES, {"adapters": torch.int32}, "`adapters` is torch.int32, but must be torch.int64, an index for each row."),
    (UPDATES, {"adapters": lambda adapters: adapters[:, None]}, "`adapters` has shape (6, 1), but must have 1 dimension."),
    (UPDATES, {"adapters": lambda adapters: adapters[:5]},
     "`adapters` has 5 rows, which must divide the 18 positions of `y`."),
    (UPDATES, {"adapters": lambda adapters: adapters[:0]},
     "`adapters` has 0 rows, which must divide the 18 positions of `y`."),
    *((DRAW, {"logits": dtype}, f"`logits` is {dtype}; {FLOATS}") for dtype in (torch.int32, torch.complex64)),
    (DRAW, {"candidates": lambda x: x[:, :8]}, f"`candidates` has shape (6, 8), {LIKE_LOGITS}"),
    (DRAW, {"candidates": torch.t}, f"`candidates` has shape (9, 6), {LIKE_LOGITS}"),
    *((DRAW, {"candidates": dtype}, f"`candidates` is {dtype}; {CANDIDATES}") for dtype in (torch.int64, torch.uint8)),
    (DRAW, {"num_vectors": 2**15 + 1},
     "`candidates` is torch.int16, which can hold 32768 vectors, but `num_vectors` is 32769; use torch.int32."),
    (DRAW, {"num_vectors": 8}, "`logits` has 9 columns, but must have at most 8, `num_vectors`."),
    *((DRAW, {"num_vectors": number}, f"`num_vectors` is {number}, but must be between 0 and 2147483647.")
      for number in (-1, 2**31)),
    *((DRAW, {"candidates": None, "num_vectors": number},
       f"`logits` has 9 columns, but must have {number}, `num_vectors`, without `candidates`.") for number in (20, 8)),
    *((DRAW, {"std": std}, f"`std` is {std:g}, but must be finite and not negative.") for std in (-0.5, NAN, INF)),
    *((UNIFORM, {"values": dtype}, f"`values` is {dtype}; {FLOATS}") for dtype in (torch.int32, torch.bool)),
    *((UNIFORM, {"stream": stream}, f"`stream` is {stream}, but must be between 0 and 4294967295.")
      for stream in (-1, 2**32)),
    *((UNIFORM, {"bound": bound}, f"`bound` is {bound:g}, but must be finite and not negative.")
      for bound in (-0.5, NAN, INF)),
]  # fmt: skip

# Each tensor with another number of dimensions.
for operator, names in TENSORS.items():
    for name in names if operator != UPDATES else ():
        rows, columns = good_arguments(operator, torch.device("meta"))[name].shape
        MESSAGES += [
            (operator, {name: lambda x: x[0]}, f"`{name}` has shape ({columns},), but must have 2 dimensions."),
            (
                operator,
                {name: lambda x: x[None]},
                f"`{name}` has shape (1, {rows}, {columns}), but must have 2 dimensions.",
            ),
            (operator, {name: lambda x: x.new_zeros(())}, f"`{name}` has shape (), but must have 2 dimensions."),
        ]


def changed(arguments: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    def change(name: str, to: Any) -> Any:
        if isinstance(to, torch.dtype):
            return to if name == "out_dtype" else arguments[name].to(to)
        return to(arguments[name]) if callable(to) else to

    return arguments | {name: change(name, to) for name, to in changes.items()}


def refused(function: Callable, error: type[Exception], operator: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=re.escape(f"vblora::{operator}: {message}")):
        function(**arguments)


@pytest.mark.parametrize("operator", TENSORS)
def test_good_arguments_are_good(backend, operator):
    getattr(backend.ops, operator)(**good_arguments(operator, backend.device))
    getattr(torch.ops.vblora, operator)(**good_arguments(operator, torch.device("meta")))
    getattr(reference, operator)(**good_arguments(operator, torch.device("cpu")))


@pytest.mark.parametrize(("operator", "changes", "message"), MESSAGES)
def test_kernels_say(backend, operator, changes, message):
    arguments = changed(good_arguments(operator, backend.device), changes)
    refused(getattr(backend.ops, operator), RuntimeError, operator, arguments, message)


@pytest.mark.parametrize(("operator", "changes", "message"), MESSAGES)
def test_fake_kernels_and_the_oracle_say(operator, changes, message):
    arguments = changed(good_arguments(operator, torch.device("meta")), changes)
    refused(getattr(torch.ops.vblora, operator), RuntimeError, operator, arguments, message)
    arguments = changed(good_arguments(operator, torch.device("cpu")), changes)
    refused(getattr(reference, operator), ValueError, operator, arguments, message)


@pytest.mark.parametrize(
    ("operator", "name"), [(operator, name) for operator, names in TENSORS.items() for name in names if len(names) > 1]
)
def test_device(backend, operator, name):
    # If the first tensor is on another device than the rest, the message names one of the rest.
    arguments = good_arguments(operator, backend.device)
    first = FIRST[operator]
    on = (backend.device, "meta") if name == first else ("meta", backend.device)
    named = name if name != first else r"(?!" + first + r"`)\w+"
    message = f"vblora::{operator}: `{named}` is on {on[0]}, but must be on {on[1]}, the device of `{first}`\\."
    with pytest.raises(RuntimeError, match=message):
        getattr(backend.ops, operator)(**arguments | {name: arguments[name].to("meta")})
    with pytest.raises(ValueError, match=message):
        getattr(reference, operator)(**arguments | {name: arguments[name].to("meta")})


@pytest.mark.parametrize("name", ["bank", "logits"])
def test_more_than_32_bits_can_count(backend, name):
    # Expanded from one element. The check comes before any contiguous copy.
    arguments = good_arguments("admixture", backend.device)
    if name == "bank":
        arguments["bank"] = arguments["bank"][:1].expand(2**31, LENGTH)
    else:
        arguments["logits"] = arguments["logits"][:, :1].expand(ROWS, 2**31)
        arguments["candidates"] = arguments["candidates"][:, :1].expand(ROWS, 2**31)
    what = {"bank": "vectors", "logits": "columns"}[name]
    message = f"`{name}` has 2147483648 {what}, but must have at most 2147483647."
    refused(backend.ops.admixture, RuntimeError, "admixture", arguments, message)
