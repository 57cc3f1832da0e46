"""The oracle itself, against independent loops over Python numbers."""

from __future__ import annotations

import math
from functools import cmp_to_key

import pytest
import torch

from vblora import reference

from .cases import INF, NAN, Case, assert_close, make_inputs

SPECIAL = (-INF, -1.0, -0.0, 0.0, 1.0, 1.0, INF, NAN, NAN)


def best_columns(row: list[float], candidates: list[int], k: int) -> list[int]:
    def compare(left: int, right: int) -> int:
        x, y = row[left], row[right]
        if math.isnan(x) != math.isnan(y):
            return -1 if math.isnan(x) else 1
        if x != y and not math.isnan(x):
            return -1 if x > y else 1
        return -1 if (candidates[left], left) < (candidates[right], right) else 1

    return sorted(range(len(row)), key=cmp_to_key(compare))[:k]


def softmax(selected: list[float]) -> list[float]:
    largest = max(selected)
    if any(map(math.isnan, selected)) or math.isinf(largest):
        return [NAN] * len(selected)
    powers = [math.exp(x - largest) for x in selected]
    return [power / math.fsum(powers) for power in powers]


def naive_admixture(logits, bank, candidates, k):
    """Lists in, lists out."""
    length = len(bank[0])
    subvectors, indices, weights = [], [], []
    for row, vectors in zip(logits, candidates, strict=True):
        columns = best_columns(row, vectors, k)
        shares = softmax([row[column] for column in columns])
        inside = [(share, vectors[column]) for share, column in zip(shares, columns, strict=True)
                  if 0 <= vectors[column] < len(bank)]  # fmt: skip
        subvectors.append([sum(share * bank[vector][i] for share, vector in inside) for i in range(length)])
        indices.append(columns)
        weights.append(shares)
    return subvectors, indices, weights


def all_candidates(candidates: torch.Tensor | None, logits: torch.Tensor) -> list[list[int]]:
    return [list(range(logits.shape[1]))] * len(logits) if candidates is None else candidates.tolist()


CASES = [
    Case(torch.float64, rows=9, columns=1, length=3, k=1),
    Case(torch.float64, rows=9, columns=7, length=1, k=3),
    Case(torch.float64, rows=9, columns=7, length=4, k=7),
    Case(torch.float64, rows=9, columns=7, length=4, k=2, candidates=torch.int16, vectors=3),
    Case(torch.float64, rows=9, columns=7, length=4, k=4, candidates=torch.int32, vectors=11),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("out_of_range", [False, True])
def test_admixture_is_what_loops_compute(case, special, out_of_range, generator):
    inputs = make_inputs(case, generator, torch.device("cpu"))
    if special:
        choice = torch.randint(len(SPECIAL), inputs.logits.shape, generator=generator)
        inputs.logits = torch.tensor(SPECIAL, dtype=case.dtype)[choice]
    if out_of_range and inputs.candidates is not None:
        inputs.candidates += torch.randint(-5, 6, inputs.candidates.shape, generator=generator).to(
            inputs.candidates.dtype
        )
    expected = naive_admixture(
        inputs.logits.tolist(), inputs.bank.tolist(), all_candidates(inputs.candidates, inputs.logits), case.k
    )
    subvectors, indices, weights = reference.admixture(inputs.logits, inputs.bank, inputs.candidates, case.k)
    assert indices.tolist() == expected[1]
    assert_close(weights, torch.tensor(expected[2], dtype=torch.float64), torch.float64)
    assert_close(subvectors, torch.tensor(expected[0], dtype=torch.float64), torch.float64)
    # compose gives the same sums for the same vectors
    vectors = indices if inputs.candidates is None else inputs.candidates.gather(1, indices.long())
    assert_close(reference.compose(inputs.bank, vectors, weights), subvectors, torch.float64)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("out_of_range", [False, True])
def test_backward_is_the_derivative_of_forward(case, out_of_range, generator):
    inputs = make_inputs(case, generator, torch.device("cpu"))
    if out_of_range and inputs.candidates is not None:
        inputs.candidates += 1
    logits, bank = inputs.logits.requires_grad_(), inputs.bank.requires_grad_()

    def mix(logits: torch.Tensor, bank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        subvectors, _, weights = reference.admixture(logits, bank, inputs.candidates, case.k)
        return subvectors, weights

    assert torch.autograd.gradcheck(mix, (logits, bank), fast_mode=True)  # against finite differences

    subvectors, indices, weights = reference.admixture(logits, bank, inputs.candidates, case.k)
    expected = torch.autograd.grad(
        (subvectors, weights), (logits, bank), (inputs.grad_subvectors, inputs.grad_weights), retain_graph=True
    )
    tensors = (indices, weights.detach(), bank.detach(), inputs.candidates, case.columns)
    result = reference.admixture_backward(inputs.grad_subvectors, inputs.grad_weights, *tensors, True, True)
    torch.testing.assert_close(result, expected)
    for only in (0, 1):
        given = [inputs.grad_subvectors, inputs.grad_weights]
        given[1 - only] = None
        expected = torch.autograd.grad(
            (subvectors, weights)[only], (logits, bank), given[only], retain_graph=True, materialize_grads=True
        )
        torch.testing.assert_close(reference.admixture_backward(*given, *tensors, True, True), expected)
    no_logits, no_bank = reference.admixture_backward(*given, *tensors, False, False)
    assert no_logits.shape == no_bank.shape == (0,)
