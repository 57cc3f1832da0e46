"""The same bits from run to run and on any number of threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from .cases import Case, Inputs, assert_same_bits, make_inputs

# Large enough that the work is split, with a last part that is smaller than the others; and both ends of how evenly the rows
# use the bank.
CASES = [
    Case(torch.float32, rows=5003, columns=128, length=256, k=2, candidates=torch.int16, vectors=2048),
    Case(torch.float32, rows=5003, columns=64, length=250, k=5, candidates=torch.int32, vectors=3),
    Case(torch.bfloat16, rows=5003, columns=300, length=96, k=3),
    Case(torch.float64, rows=1001, columns=40, length=33, k=8),
    Case(torch.float32, rows=60_000, columns=8, length=1, k=2),
]


def everything(backend, inputs: Inputs, case: Case) -> list[torch.Tensor]:
    subvectors, indices, weights = backend.ops.admixture(inputs.logits, inputs.bank, inputs.candidates, case.k)
    vectors = indices if inputs.candidates is None else inputs.candidates.gather(1, indices.long())
    composed = backend.ops.compose(inputs.bank, vectors, weights)
    gradients = backend.ops.admixture_backward(
        inputs.grad_subvectors,
        inputs.grad_weights,
        indices,
        weights,
        inputs.bank,
        inputs.candidates,
        case.columns,
        True,
        True,
    )
    return [subvectors, indices, weights, composed, *gradients]


@pytest.fixture
def _threads_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_from_run_to_run(backend, case, generator):
    inputs = make_inputs(case, generator, backend.device)
    first = everything(backend, inputs, case)
    for _ in range(3):
        for result, want in zip(everything(backend, inputs, case), first, strict=True):
            assert_same_bits(result, want)


@pytest.mark.backends("cpu")
@pytest.mark.usefixtures("_threads_restored")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_over_numbers_of_threads(backend, case, generator):
    inputs = make_inputs(case, generator, backend.device)
    torch.set_num_threads(1)
    alone = everything(backend, inputs, case)
    for threads in (2, 3, 5, 16):
        torch.set_num_threads(threads)
        for result, want in zip(everything(backend, inputs, case), alone, strict=True):
            assert_same_bits(result, want)


@pytest.mark.backends("cpu")
@pytest.mark.usefixtures("_threads_restored")
def test_rows_do_not_depend_on_each_other(backend, generator):
    # A row by itself has the bits that it has among others, wherever the split between threads falls.
    case = CASES[0]
    inputs = make_inputs(case, generator, backend.device)
    torch.set_num_threads(3)
    subvectors, indices, weights = backend.ops.admixture(inputs.logits, inputs.bank, inputs.candidates, case.k)
    for row in (0, 1, 2501, 5002):
        alone = backend.ops.admixture(
            inputs.logits[row : row + 1], inputs.bank, inputs.candidates[row : row + 1], case.k
        )
        for result, want in zip(alone, (subvectors, indices, weights), strict=True):
            assert_same_bits(result[0], want[row])


@pytest.mark.backends("cpu")
@pytest.mark.usefixtures("_threads_restored")
@pytest.mark.parametrize("columns", [None, 20], ids=["dense", "candidates"])
def test_draws_over_numbers_of_threads(backend, columns):
    def draw() -> list[torch.Tensor]:
        logits = torch.empty(5003, columns or 300)
        candidates = None if columns is None else torch.empty_like(logits, dtype=torch.int16)
        backend.ops.draw_logits_(logits, candidates, 300, 11, 1.0)
        return [logits] if candidates is None else [logits, candidates]

    torch.set_num_threads(1)
    alone = draw()
    for threads in (2, 3, 5, 16):
        torch.set_num_threads(threads)
        for result, want in zip(draw(), alone, strict=True):
            assert_same_bits(result, want)


@pytest.mark.backends("cpu")
def test_called_from_several_threads_at_once(backend, generator):
    cases = [CASES[3], Case(torch.float32, rows=500, columns=64, length=64, k=2)] * 3
    inputs = [make_inputs(case, generator, backend.device) for case in cases]
    expected = [everything(backend, *each) for each in zip(inputs, cases, strict=True)]
    with ThreadPoolExecutor(len(cases)) as pool:
        for _ in range(5):
            results = pool.map(lambda each: everything(backend, *each), zip(inputs, cases, strict=True))
            for result, want in zip(results, expected, strict=True):
                for tensor, other in zip(result, want, strict=True):
                    assert_same_bits(tensor, other)
