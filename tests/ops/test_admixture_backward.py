"""What admixture_backward computes when called directly; test_autograd.py tests it in autograd."""

from __future__ import annotations

import pytest
import torch

from vblora import reference

from .cases import (
    DTYPES,
    INF,
    LAYOUTS,
    NAN,
    Case,
    Inputs,
    assert_close,
    assert_same_bits,
    make_inputs,
    not_contiguous,
    pairwise_cases,
)

BANK = [[8.0, 0.0], [0.0, 16.0], [4.0, 4.0]]
# Which of grad_subvectors and grad_weights there are.
GIVEN = pytest.mark.parametrize("given", [(1, 1), (1, 0), (0, 1)], ids=["both", "subvectors", "weights"])


def run(backend, grad_subvectors, grad_weights, saved, need_logits=True, need_bank=True):
    """`saved`: indices, weights, bank, candidates and num_candidates."""
    return backend.ops.admixture_backward(grad_subvectors, grad_weights, *saved, need_logits, need_bank)


def saved_of(inputs: Inputs, k: int) -> tuple:
    """What forward leaves behind for these inputs, by the oracle."""
    logits, bank, candidates = (x if x is None else x.cpu() for x in (inputs.logits, inputs.bank, inputs.candidates))
    _, indices, weights = reference.admixture(logits, bank, candidates, k)
    device = inputs.logits.device
    return indices.to(device), weights.to(device), inputs.bank, inputs.candidates, inputs.logits.shape[1]


def grads_of(inputs: Inputs, given: tuple[int, int]) -> list[torch.Tensor | None]:
    return [inputs.grad_subvectors if given[0] else None, inputs.grad_weights if given[1] else None]


# By hand


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_table(backend, dtype):
    weight_dtype = reference.accumulation_dtype(dtype)
    indices = torch.tensor([[2, 0], [1, 2]], dtype=torch.int32, device=backend.device)
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=weight_dtype, device=backend.device)
    grad = torch.tensor([[1.0, -1.0], [2.0, 1.0]], dtype=dtype, device=backend.device)
    saved = indices, weights, torch.tensor(BANK, dtype=dtype, device=backend.device), None, 3
    # Row 0: <g, v> is 0 for vector 2 and 8 for vector 0, on average 2. Row 1: 16 for vector 1, 12 for vector 2, 14.
    grad_logits, grad_bank = run(backend, grad, None, saved)
    assert grad_logits.dtype == grad_bank.dtype == dtype
    assert grad_logits.tolist() == [[0.25 * (8 - 2), 0.0, 0.75 * (0 - 2)], [0.0, 0.5 * (16 - 14), 0.5 * (12 - 14)]]
    assert grad_bank.tolist() == [[0.25, -0.25], [1.0, 0.5], [0.75 + 1.0, -0.75 + 0.5]]

    grad_weights = torch.tensor([[8.0, 0.0], [-4.0, 0.0]], dtype=weight_dtype, device=backend.device)
    # Added to <g, v>: row 0 has 8 and 8, which is no change; row 1 has 12 and 12.
    grad_logits, again = run(backend, grad, grad_weights, saved)
    assert grad_logits.tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert torch.equal(again, grad_bank)
    # By itself: averages 6 and -2.
    grad_logits, grad_bank = run(backend, None, grad_weights, saved)
    assert grad_logits.tolist() == [[0.25 * (0 - 6), 0.0, 0.75 * (8 - 6)], [0.0, 0.5 * (-4 + 2), 0.5 * (0 + 2)]]
    assert (grad_bank == 0).all()


@pytest.mark.parametrize("candidate_dtype", [torch.int16, torch.int32], ids=str)
def test_table_with_candidates(backend, candidate_dtype):
    # Both selected columns stand for vector 1: its gradient gets both weights, and the logits' gradients are equal and cancel.
    indices = torch.tensor([[3, 0]], dtype=torch.int32, device=backend.device)
    weights = torch.tensor([[0.75, 0.25]], device=backend.device)
    candidates = torch.tensor([[1, 0, 2, 1]], dtype=candidate_dtype, device=backend.device)
    bank = torch.tensor(BANK, device=backend.device)
    grad = torch.tensor([[2.0, 3.0]], device=backend.device)
    grad_logits, grad_bank = run(backend, grad, None, (indices, weights, bank, candidates, 4))
    assert grad_logits.tolist() == [[0.0, 0.0, 0.0, 0.0]]
    assert grad_bank.tolist() == [[0.0, 0.0], [2.0, 3.0], [0.0, 0.0]]
    candidates[0, 0] = 2  # now vector 2, for which <g, v> is 20; it is 48 for vector 1: on average 41
    grad_logits, grad_bank = run(backend, grad, None, (indices, weights, bank, candidates, 4))
    assert grad_logits.tolist() == [[0.25 * (20 - 41), 0.0, 0.0, 0.75 * (48 - 41)]]
    assert grad_bank.tolist() == [[0.0, 0.0], [1.5, 2.25], [0.5, 0.75]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_summed_in_float32(backend, dtype):
    # 5000 rows that each add 1 to one vector: in the half types, such a sum would stop at 256 (bfloat16) or 2048 (float16).
    rows, length = 5000, 40
    saved = (
        torch.ones(rows, 1, dtype=torch.int32, device=backend.device),
        torch.ones(rows, 1, device=backend.device),
        torch.ones(2, length, dtype=dtype, device=backend.device),
        None,
        2,
    )
    _, grad_bank = run(backend, torch.ones(rows, length, dtype=dtype, device=backend.device), None, saved)
    assert_same_bits(grad_bank.cpu(), torch.tensor([[0.0], [5000.0]]).expand(2, length).to(dtype))
    # ... and so are dot products: <g, v> is 2048 + 1 + 1 here, 2048 there, and half the difference of 2 is the gradient.
    bank = torch.tensor([[64.0, 1.0, 1.0], [64.0, 0.0, 0.0]], dtype=dtype, device=backend.device)
    grad = torch.tensor([[32.0, 1.0, 1.0]], dtype=dtype, device=backend.device)
    halves = torch.full((1, 2), 0.5, device=backend.device)
    both = torch.tensor([[0, 1]], dtype=torch.int32, device=backend.device)
    assert run(backend, grad, None, (both, halves, bank, None, 2))[0].tolist() == [[0.5, -0.5]]


# Against the oracle


def in_float64(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor if tensor is None else tensor.cpu().double() if tensor.is_floating_point() else tensor.cpu()


def exact(grad_subvectors, grad_weights, saved):
    """The oracle's gradients in float64, on the CPU, from the same (rounded) inputs; each with the magnitude of its terms."""
    indices, weights, bank, candidates = map(in_float64, saved[:4])
    grad_subvectors, grad_weights = in_float64(grad_subvectors), in_float64(grad_weights)
    rest = candidates, saved[4], True, True
    grad_logits, grad_bank = reference.admixture_backward(grad_subvectors, grad_weights, indices, weights, bank, *rest)

    sizes = [x if x is None else x.abs() for x in (grad_subvectors, grad_weights)]
    _, bank_magnitude = reference.admixture_backward(*sizes, indices, weights, bank.abs(), *rest)
    vectors = (indices if candidates is None else candidates.gather(1, indices.long())).long()
    terms = torch.zeros_like(weights) if grad_weights is None else sizes[1]
    if grad_subvectors is not None:
        products = [(sizes[0] * bank.abs()[column]).sum(1) for column in vectors.unbind(1)]
        terms = terms + torch.stack(products, 1)
    logits_magnitude = weights * (terms + (weights * terms).sum(1, keepdim=True))
    return grad_logits, logits_magnitude, grad_bank, bank_magnitude


@GIVEN
@pytest.mark.parametrize("case", pairwise_cases(), ids=str)
def test_equals_the_oracle(backend, case, given, generator):
    inputs = make_inputs(case, generator, backend.device)
    saved = saved_of(inputs, case.k)
    grads = grads_of(inputs, given)
    grad_logits, grad_bank = run(backend, *grads, saved)
    expected_logits, logits_magnitude, expected_bank, bank_magnitude = exact(*grads, saved)
    computed_in = reference.accumulation_dtype(case.dtype)
    assert_close(grad_logits, expected_logits, case.dtype, computed_in, logits_magnitude)
    assert_close(grad_bank, expected_bank, case.dtype, computed_in, bank_magnitude)
    # What was not selected gets no gradient, not even a small one.
    assert ((grad_logits.cpu() == 0) | (expected_logits != 0) | selected(saved, case)).all()
    assert (grad_bank.cpu()[(expected_bank == 0).all(1)] == 0).all()


def selected(saved: tuple, case: Case) -> torch.Tensor:
    return torch.zeros(case.rows, case.columns, dtype=torch.bool).scatter_(1, saved[0].cpu().long(), True)


@pytest.mark.parametrize(
    "case",
    [
        Case(torch.float32, rows=3, columns=2048, length=5, k=2048),
        Case(torch.float32, rows=2, columns=40_000, length=3, k=3),
        Case(torch.float32, rows=33, columns=128, length=24, k=9, candidates=torch.int32, vectors=100_000),
        Case(torch.float32, rows=33, columns=128, length=24, k=2, candidates=torch.int16, vectors=32_768),
        Case(torch.float32, rows=2, columns=64, length=4099, k=2),
        Case(torch.float32, rows=3000, columns=20, length=33, k=3, candidates=torch.int16, vectors=2),  # long sums
    ],
    ids=str,
)
def test_equals_the_oracle_at_the_edges(backend, case, generator):
    test_equals_the_oracle(backend, case, (1, 1), generator)


@pytest.mark.parametrize(("rows", "count"), [(6001, 20), (30_001, 7)], ids=["by one block", "by several blocks"])
def test_many_popular_vectors(backend, rows, count, generator):
    # So many that kernels of their own take several each; neighbours, and the last one, which may share what others do not.
    vectors = 5001
    popular = torch.tensor([10, 11, 4998, 5000, *range(100, 4100, 250)])[:count]
    indices = torch.randint(vectors, (rows, 1), generator=generator, dtype=torch.int32)
    indices[: rows - 101, 0] = popular[torch.arange(rows - 101) % len(popular)]
    grad = torch.randint(-8, 9, (rows, 8), generator=generator).float()  # sums are exact
    there = [x.to(backend.device) for x in (grad, indices, torch.ones(rows, 1), torch.zeros(vectors, 8))]
    _, grad_bank = run(backend, there[0], None, (*there[1:], None, vectors), need_logits=False)
    assert torch.equal(grad_bank.cpu(), torch.zeros(vectors, 8).index_add(0, indices[:, 0], grad))


def test_half_precision_rows_that_are_aligned_to_8_bytes_only(backend, generator):
    # They are read 8 bytes at a time, though their length would do for 16.
    case = Case(torch.bfloat16, rows=33, columns=16, length=40, k=2)
    inputs = make_inputs(case, generator, backend.device)

    def four_elements_off(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor.new_zeros(4), tensor.flatten()])[4:].view(tensor.shape)

    indices = torch.rand(33, 16, generator=generator).argsort(1)[:, :2].to(torch.int32).to(backend.device)
    rest = indices, inputs.grad_weights, None, 16
    aligned = run(backend, inputs.grad_subvectors, None, (*rest[:2], inputs.bank, *rest[2:]))
    grads, bank = four_elements_off(inputs.grad_subvectors), four_elements_off(inputs.bank)
    for result, want in zip(run(backend, grads, None, (*rest[:2], bank, *rest[2:])), aligned, strict=True):
        assert_same_bits(result, want)


def test_entries_of_a_vector_far_apart(backend, generator):
    # A kernel looks for a vector's entries in 64 * 2048 at a time.
    rows, vectors = 140_001, 3000
    indices = torch.randint(vectors, (rows, 1), generator=generator, dtype=torch.int32)
    grad = torch.randint(-8, 9, (rows, 1), generator=generator).float()  # sums are exact
    there = [x.to(backend.device) for x in (grad, indices, torch.ones(rows, 1), torch.zeros(vectors, 1))]
    _, grad_bank = run(backend, there[0], None, (*there[1:], None, vectors), need_logits=False)
    assert torch.equal(grad_bank.cpu(), torch.zeros(vectors, 1).index_add(0, indices[:, 0], grad))


# The rules


@GIVEN
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_what_is_needed(backend, dtype, given, generator):
    inputs = make_inputs(Case(dtype, 7, 12, 9, 3, torch.int16), generator, backend.device)
    grads = grads_of(inputs, given)
    saved = saved_of(inputs, 3)
    grad_logits, grad_bank = run(backend, *grads, saved)
    for need_logits in (True, False):
        for need_bank in (True, False):
            results = run(backend, *grads, saved, need_logits, need_bank)
            assert_same_bits(results[0], grad_logits if need_logits else grad_logits.new_empty(0))
            assert_same_bits(results[1], grad_bank if need_bank else grad_bank.new_empty(0))


@pytest.mark.parametrize("k", [1, 2, 3, 7, 9])
def test_duplicates_add_up(backend, k, generator):
    # All candidates are the same vector: the selection does not matter, and the vector gets each row's whole gradient.
    inputs = make_inputs(Case(torch.float64, 20, 9, 5, k, torch.int32, vectors=4), generator, backend.device)
    inputs.candidates.fill_(2)
    grad_logits, grad_bank = run(backend, inputs.grad_subvectors, None, saved_of(inputs, k))
    torch.testing.assert_close(grad_logits, torch.zeros_like(grad_logits), atol=1e-14, rtol=0)
    torch.testing.assert_close(grad_bank[2], inputs.grad_subvectors.sum(0))
    assert (grad_bank[[0, 1, 3]] == 0).all()


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grad_subvectors_of_any_dtype(backend, dtype, grad_dtype, generator):
    inputs = make_inputs(Case(dtype, 21, 30, 37, 3, out_dtype=grad_dtype), generator, backend.device)
    saved = saved_of(inputs, 3)
    results = run(backend, inputs.grad_subvectors, None, saved)
    # The gradient is taken as it is, in what sums run in (float64's is rounded to that), and gradients are of the bank's dtype.
    converted = inputs.grad_subvectors.to(reference.accumulation_dtype(dtype))
    for result, expected in zip(results, run(backend, converted, None, saved), strict=True):
        assert_same_bits(result, expected)
        assert result.dtype == dtype


def test_nan_and_infinity_stay_in_their_row_and_column(backend):
    bank = torch.tensor(BANK, device=backend.device)
    logits = torch.tensor([[NAN, 0, 1], [2, 1, 0], [-INF, 0, -INF], [3, 2, 1]], device=backend.device)
    grad = torch.tensor([[1.0, 1.0], [1.0, NAN], [2.0, 2.0], [0.5, 0.5]], device=backend.device)
    indices = torch.tensor([[0, 2], [0, 1], [1, 0], [0, 1]], dtype=torch.int32, device=backend.device)
    weights = torch.softmax(logits.gather(1, indices.long()), 1)
    grad_logits, grad_bank = run(backend, grad, None, (indices, weights, bank, None, 3))
    assert grad_logits.isnan().tolist() == [[True, False, True], [True, True, False], [False] * 3, [False] * 3]
    assert (grad_logits[0, 1], grad_logits[1, 2]) == (0, 0)
    assert grad_logits[2].tolist() == [0.0, 0.0, 0.0]  # one weight is 1, the other 0
    assert grad_bank.isnan().tolist() == [[True, True], [False, True], [True, True]]
    # Vector 1: from row 1 its smaller weight, from row 2 all of 2, from row 3 its smaller weight times a half.
    small = 1 / (1 + torch.e)
    torch.testing.assert_close(grad_bank[1, 0].item(), small + 2 + 0.5 * small, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("candidate_dtype", [None, torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_matter(backend, dtype, candidate_dtype, layout, generator):
    inputs = make_inputs(Case(dtype, 33, 47, 21, 3, candidate_dtype), generator, backend.device)
    indices, weights, bank, candidates, num_candidates = saved_of(inputs, 3)
    tensors = {
        "grad_subvectors": inputs.grad_subvectors,
        "grad_weights": inputs.grad_weights,
        "indices": indices,
        "weights": weights,
        "bank": bank,
        "candidates": candidates,
    }
    rest = num_candidates, True, True
    expected = backend.ops.admixture_backward(*tensors.values(), *rest)
    for name, tensor in tensors.items():
        if tensor is not None:
            changed = tensors | {name: not_contiguous(tensor, layout)}
            for result, want in zip(backend.ops.admixture_backward(*changed.values(), *rest), expected, strict=True):
                assert_same_bits(result, want)
                assert result.is_contiguous()


def test_expanded_gradients(backend, generator):
    # As the backward of sum() gives them: one number with strides of 0.
    inputs = make_inputs(Case(torch.float32, 33, 47, 21, 3), generator, backend.device)
    saved = saved_of(inputs, 3)
    ones = torch.ones((), device=backend.device)
    results = run(backend, ones.expand(33, 21), ones.expand(33, 3), saved)
    expected = run(backend, torch.ones(33, 21, device=backend.device), torch.ones(33, 3, device=backend.device), saved)
    for result, want in zip(results, expected, strict=True):
        assert_same_bits(result, want)


@GIVEN
@pytest.mark.parametrize("candidate_dtype", [None, torch.int16, torch.int32], ids=str)
def test_out_of_range_adds_nothing_and_is_not_touched(backend, candidate_dtype, given, generator):
    # Bank and candidates lie between others that would show if they were read; k = 12 is past what a kernel may unroll.
    rows, columns, length = 40, 16, 5
    vectors = columns if candidate_dtype is None else 10
    padded = torch.full((vectors + 2, length), NAN)
    padded[1:-1] = torch.randn(vectors, length, generator=generator)
    bank = padded.to(backend.device)[1:-1]
    candidates = None
    if candidate_dtype is not None:
        info = torch.iinfo(candidate_dtype)
        outside = torch.tensor([-1, vectors, info.min, info.max], dtype=candidate_dtype)
        candidates = torch.randint(vectors, (rows, columns), generator=generator).to(candidate_dtype)
        where = torch.rand(rows, columns, generator=generator) < 0.3
        candidates[where] = outside[torch.randint(4, (int(where.sum()),), generator=generator)]
        candidates = candidates.to(backend.device)
    for k in (1, 2, 3, 12):
        indices = torch.rand(rows, columns, generator=generator).argsort(1)[:, :k].int()
        outside = torch.tensor([-1, columns, -(2**31), 2**31 - 1, -columns], dtype=torch.int32)
        where = torch.rand(rows, k, generator=generator) < 0.3
        indices[where] = outside[torch.randint(5, (int(where.sum()),), generator=generator)]
        indices[0] = outside[0]
        weights = torch.rand(rows, k, generator=generator).softmax(1).to(backend.device)
        saved = indices.to(backend.device), weights, bank, candidates, columns
        grads = [torch.randn(rows, width, generator=generator).to(backend.device) for width in (length, k)]
        grads = [grad if wanted else None for grad, wanted in zip(grads, given, strict=True)]
        grad_logits, grad_bank = run(backend, *grads, saved)
        expected_logits, expected_bank = reference.admixture_backward(
            *map(in_float64, (*grads, *saved[:4])), columns, True, True
        )
        assert_close(grad_logits, expected_logits, torch.float32, magnitude=torch.full((rows, k), 1.0))
        assert_close(grad_bank, expected_bank, torch.float32, magnitude=torch.full((vectors, length), 1.0))
        assert (grad_logits[0] == 0).all()


@pytest.mark.parametrize("place", ["one before the first", "one after the last"])
def test_indices_just_out_of_range_do_not_reach_the_next_row(backend, place):
    # A row that is written later would hide that it was reached. So many rows, some of which others write meanwhile.
    rows, columns = 20_000, 16
    indices = torch.ones(rows, 2, dtype=torch.int32)
    indices[:, 1] = -1 if place == "one before the first" else columns
    saved = indices, torch.full((rows, 2), 0.5), torch.ones(columns, 4), None, columns
    grads = torch.ones(rows, 4), torch.tensor([[1.0, 2.0]]).repeat(rows, 1)
    there = [x.to(backend.device) if torch.is_tensor(x) else x for x in (*grads, *saved)]
    expected = torch.zeros(rows, columns)
    expected[:, 1] = 0.5 * (5 - 0.5 * (5 + 2))
    for _ in range(5):
        assert torch.equal(backend.ops.admixture_backward(*there, True, False)[0].cpu(), expected)


@pytest.mark.parametrize("need_bank", [True, False])
def test_without_rows(backend, need_bank):
    bank = torch.tensor(BANK, dtype=torch.bfloat16, device=backend.device)
    indices = torch.empty(0, 2, dtype=torch.int32, device=backend.device)
    saved = indices, torch.empty(0, 2, device=backend.device), bank, None, 3
    grad_logits, grad_bank = run(backend, bank.new_empty(0, 2), None, saved, need_bank=need_bank)
    assert (grad_logits.shape, grad_logits.dtype) == ((0, 3), torch.bfloat16)
    assert grad_bank.tolist() == ([[0.0, 0.0]] * 3 if need_bank else [])
