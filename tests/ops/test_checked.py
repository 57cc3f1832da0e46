"""VBLORA_CHECKED=1: each call also checks the values; errors name the argument and the row."""

from __future__ import annotations

import pytest
import torch

from .cases import INF, NAN, Case, assert_same_bits, make_inputs

ROW, COLUMN = 17, 3


def calls(backend, generator):
    """Good arguments of each operator, each tensor large enough to hold something at (ROW, COLUMN)."""
    case = Case(torch.float32, rows=20, columns=30, length=12, k=4, candidates=torch.int16, vectors=25)
    inputs = make_inputs(case, generator, backend.device)
    forward = {"logits": inputs.logits, "bank": inputs.bank, "candidates": inputs.candidates, "k": 4}
    _, indices, weights = backend.ops.admixture(**forward)
    backward = {
        "grad_subvectors": inputs.grad_subvectors,
        "grad_weights": inputs.grad_weights,
        "indices": indices,
        "weights": weights,
        "bank": inputs.bank,
        "candidates": inputs.candidates,
        "num_candidates": 30,
        "need_logits": True,
        "need_bank": True,
    }
    composed = {"bank": inputs.bank, "indices": indices % 25, "weights": weights}
    return {"admixture": forward, "admixture_backward": backward, "compose": composed}


@pytest.mark.parametrize(
    ("operator", "name", "value"),
    [
        ("admixture", "logits", NAN),
        ("admixture", "bank", NAN),
        ("admixture", "candidates", -1),
        ("admixture", "candidates", 25),
        ("admixture_backward", "bank", NAN),
        ("admixture_backward", "indices", -1),
        ("admixture_backward", "indices", 30),
        ("admixture_backward", "candidates", -1),
        ("admixture_backward", "candidates", 25),
        ("compose", "bank", NAN),
        ("compose", "indices", -1),
        ("compose", "indices", 25),
    ],
)
def test_faults_are_raised_with_argument_and_row(backend, monkeypatch, operator, name, value, generator):
    arguments = calls(backend, generator)[operator]
    arguments[name] = arguments[name].clone()
    arguments[name][ROW, COLUMN] = value
    run = getattr(backend.ops, operator)
    for setting in (None, "0"):
        monkeypatch.delenv("VBLORA_CHECKED", raising=False)
        if setting:
            monkeypatch.setenv("VBLORA_CHECKED", setting)
        run(**arguments)  # not checked
    monkeypatch.setenv("VBLORA_CHECKED", "1")
    with pytest.raises((RuntimeError, ValueError), match=rf"{operator}: .*`{name}` .*\brow {ROW}\b"):
        run(**arguments)
    # ... and wherever it lies in memory
    arguments[name] = arguments[name].t().contiguous().t()
    with pytest.raises((RuntimeError, ValueError), match=rf"`{name}` .*\brow {ROW}\b"):
        run(**arguments)
    monkeypatch.delenv("VBLORA_CHECKED")
    run(**arguments)


@pytest.mark.parametrize("index_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_indices_of_each_dtype_are_looked_at(backend, monkeypatch, index_dtype, generator):
    arguments = calls(backend, generator)["compose"]
    arguments["indices"] = arguments["indices"].to(index_dtype)
    monkeypatch.setenv("VBLORA_CHECKED", "1")
    backend.ops.compose(**arguments)
    for row in (0, 19):  # the first and the last row
        bad = arguments["indices"].clone()
        bad[row, -1] = 2**32 if index_dtype == torch.int64 else 25
        with pytest.raises((RuntimeError, ValueError), match=rf"`indices` .*\brow {row}\b"):
            backend.ops.compose(**arguments | {"indices": bad})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_nan_of_each_dtype_is_found(backend, monkeypatch, dtype, generator):
    inputs = make_inputs(Case(dtype, rows=5, columns=7, length=3, k=2), generator, backend.device)
    monkeypatch.setenv("VBLORA_CHECKED", "1")
    backend.ops.admixture(inputs.logits, inputs.bank, None, 2)
    inputs.logits[4, 6] = NAN
    with pytest.raises((RuntimeError, ValueError), match=r"`logits` .*\brow 4\b"):
        backend.ops.admixture(inputs.logits, inputs.bank, None, 2)


def test_adapters_of_rows_are_looked_at(backend, monkeypatch):
    y, x, A, B = (torch.zeros(shape, device=backend.device) for shape in ((4, 5), (4, 3), (2, 1, 3), (2, 1, 5)))
    for value, allowed in ((-1, True), (1, True), (2, False), (-2, False)):
        adapters = torch.tensor([0, 0, value, 0], device=backend.device)
        monkeypatch.delenv("VBLORA_CHECKED", raising=False)
        backend.ops.add_updates_(y, x, A, B, adapters)
        monkeypatch.setenv("VBLORA_CHECKED", "1")
        if allowed:
            backend.ops.add_updates_(y, x, A, B, adapters)
            continue
        with pytest.raises(RuntimeError, match=rf"add_updates_: `adapters` holds {value} at row 2; allowed are 0 to 1"):
            backend.ops.add_updates_(y, x, A, B, adapters)


@pytest.mark.backends("cpu")
def test_parts_of_any_shape_are_looked_at(monkeypatch):
    monkeypatch.setenv("VBLORA_CHECKED", "1")
    indices, weights = torch.zeros(4, 1, dtype=torch.int32), torch.ones(4, 1)
    rest = indices, weights, torch.randn(2, 3), None, 2, True, True
    for shape in ((12,), (1, 12), (2, 2, 3)):
        part = torch.randn(shape)
        torch.ops.vblora.admixture_backward_parts([part], [0], *rest)
        part.view(-1)[7] = NAN
        with pytest.raises((RuntimeError, ValueError), match=r"`grad_parts` .*\brow 2\b.*column 1\b"):
            torch.ops.vblora.admixture_backward_parts([part], [0], *rest)


def test_what_is_allowed_passes_and_is_not_changed(backend, monkeypatch, generator):
    for operator, arguments in calls(backend, generator).items():
        run = getattr(backend.ops, operator)
        if operator == "admixture":
            arguments["logits"][3] = -INF  # legal, as is a bank vector that a device could not represent
            arguments["logits"][4, 2] = INF
            arguments["bank"][5, 1] = -INF
        monkeypatch.delenv("VBLORA_CHECKED", raising=False)
        expected = run(**arguments)
        monkeypatch.setenv("VBLORA_CHECKED", "1")
        results = run(**arguments)
        pairs = [(results, expected)] if torch.is_tensor(results) else zip(results, expected, strict=True)
        for result, want in pairs:
            assert_same_bits(result, want)
