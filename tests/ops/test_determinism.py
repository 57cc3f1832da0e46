"""The same bits from run to run, on any number of threads, and on a GPU as on the CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks.gpu.inputs import popular_from

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


KERNELS = pytest.mark.backends("cuda-emulated-ascending", "cuda-emulated-descending", "cuda-emulated-random", "cuda")


@KERNELS
@pytest.mark.parametrize(
    "case",
    [
        Case(torch.float32, 300, 128, 256, 2, candidates=torch.int16, out_dtype=torch.bfloat16, vectors=2048),
        Case(torch.float32, rows=101, columns=1500, length=33, k=5),
        Case(torch.bfloat16, rows=101, columns=2048, length=96, k=8, out_dtype=torch.float32),
        Case(torch.float16, rows=101, columns=17, length=40, k=3, candidates=torch.int32),
        Case(torch.float64, rows=101, columns=40, length=34, k=4, out_dtype=torch.float16),
        Case(torch.float32, rows=33, columns=300, length=17, k=100, candidates=torch.int16),
        Case(torch.bfloat16, rows=300, columns=64, length=36, k=2, candidates=torch.int16),  # of 4, but not of 8
        Case(torch.bfloat16, rows=33, columns=128, length=24, k=33),
        Case(torch.float64, rows=33, columns=128, length=24, k=33),
    ],
    ids=str,
)
def test_bits_of_the_cpu(backend, case, generator):
    inputs = make_inputs(case, generator, torch.device("cpu"))
    there = inputs.to(backend.device)
    cpu, gpu = torch.ops.vblora, backend.ops
    expected = cpu.admixture(inputs.logits, inputs.bank, inputs.candidates, case.k)
    if case.dtype != torch.float64 or backend.name != "cuda":  # there, exp is the device's own
        for result, want in zip(
            gpu.admixture(there.logits, there.bank, there.candidates, case.k), expected, strict=True
        ):
            assert_same_bits(result, want)

    _, indices, weights = expected
    vectors = indices if inputs.candidates is None else inputs.candidates.gather(1, indices.long())
    moved = [x.to(backend.device) for x in (vectors, indices, weights)]
    assert_same_bits(gpu.compose(there.bank, moved[0], moved[2]), cpu.compose(inputs.bank, vectors, weights))

    rest = case.columns, True, True
    grad_logits, grad_bank = gpu.admixture_backward(
        there.grad_subvectors, there.grad_weights, *moved[1:], there.bank, there.candidates, *rest
    )
    want_logits, want_bank = cpu.admixture_backward(
        inputs.grad_subvectors, inputs.grad_weights, indices, weights, inputs.bank, inputs.candidates, *rest
    )
    assert_same_bits(grad_logits, want_logits)
    size = inputs.bank.shape[0]
    few = vectors.flatten().long().bincount(minlength=size) <= popular_from(case.rows, case.k, size)
    assert few.any()
    assert_same_bits(grad_bank.cpu()[few], want_bank[few])


@KERNELS
@pytest.mark.parametrize("packs", [True, False], ids=["aligned", "not aligned"])
def test_order_of_a_popular_vector(backend, packs, generator):
    # Vector 0 has as many entries as are summed in the CPU's order, 1 has one more, 2 as many as one block sums, and 3 all
    # others. They fill 18 ranges, of which each of 16 blocks takes two as long as there are any.
    rows, length, most, split_from = 18 * 2048 - 100, 16 if packs else 5, 128, 4096
    indices = torch.full((rows, 1), 3, dtype=torch.int32)
    chosen = torch.randperm(rows, generator=generator).split(
        [most, most + 1, split_from, rows - 2 * most - 1 - split_from]
    )
    for vector in range(3):
        indices[chosen[vector]] = vector
    assert popular_from(rows, 1, 4) == most
    grads, ones = torch.randn(rows, length, generator=generator), torch.ones(rows, 1)
    there = [x.to(backend.device) for x in (grads, indices, ones, torch.zeros(4, length))]
    _, grad_bank = backend.ops.admixture_backward(there[0], None, *there[1:], None, 4, False, True)

    one_by_one = torch.zeros(length)
    for grad in grads[indices[:, 0] == 0]:
        one_by_one += grad
    assert_same_bits(grad_bank[0], one_by_one)
    ranges = [grads[begin : begin + 2048] for begin in range(0, rows, 2048)]
    for vector in (1, 2, 3):
        of_ranges = [grad[index[:, 0] == vector] for grad, index in zip(ranges, indices.split(2048), strict=True)]
        if vector < 3:
            assert_same_bits(grad_bank[vector], sum_of_a_block(of_ranges, split=False))
        else:
            total = torch.zeros(length)
            for first in range(0, len(ranges), 2):
                total += sum_of_a_block(of_ranges[first : first + 2], split=True)
            assert_same_bits(grad_bank[vector], total)


def sum_of_a_block(ranges: list[torch.Tensor], split: bool) -> torch.Tensor:
    """Of gradient rows, in the order of a block of the kernel for popular vectors."""
    sums = torch.zeros(8, 16, ranges[0].shape[1])  # of each warp's pairs of lanes
    for number, grads in enumerate(ranges):
        pairs = sums.view(128, -1) if split else sums[number % 8]
        for rows in grads.split(len(pairs)):
            pairs[: len(rows)] += rows
    for half in (8, 4, 2, 1):
        sums = sums[:, :half] + sums[:, half:]
    total = sums[0, 0]
    for of_warp in sums[1:, 0]:
        total = total + of_warp
    return total
