"""What admixture computes: small tables by hand, then the oracle over sizes and dtypes, then the rules one by one."""

from __future__ import annotations

import math

import pytest
import torch

from vblora import reference

from .cases import (
    DTYPES,
    INF,
    LAYOUTS,
    NAN,
    Case,
    assert_close,
    assert_same_bits,
    exact,
    make_inputs,
    not_contiguous,
    pairwise_cases,
)

LN3 = math.log(3.0)  # the softmax of (x + ln 3, x) is (3/4, 1/4)
BANK = [[8.0, 0.0, -4.0], [0.0, 16.0, 4.0], [4.0, 4.0, 4.0], [-8.0, 0.0, 12.0]]


def run(backend, logits, bank, candidates=None, k=1, out_dtype=None):
    return backend.ops.admixture(logits, bank, candidates, k, out_dtype)


# By hand


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_table(backend, dtype):
    # The last logit of each row is there to be left out.
    logits = torch.tensor([[1 + LN3, 1, -3, -9], [-2, 0, LN3, -4], [5, 5, 4, 5]], dtype=torch.float64)
    bank = torch.tensor(BANK, dtype=dtype, device=backend.device)
    subvectors, indices, weights = run(backend, logits.to(dtype).to(backend.device), bank, k=2)
    assert indices.dtype == torch.int32
    assert indices.tolist() == [[0, 1], [2, 1], [0, 1]]
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert subvectors.dtype == dtype
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1e-2)  # ln 3 has been rounded too
    expected_weights = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.5, 0.5]]).to(weights)
    torch.testing.assert_close(weights, expected_weights, rtol=tolerance, atol=0)
    expected = torch.tensor([[6.0, 4.0, -2.0], [3.0, 7.0, 4.0], [4.0, 8.0, 0.0]]).to(subvectors)
    torch.testing.assert_close(subvectors, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32], ids=str)
def test_table_with_candidates(backend, dtype):
    # Five logits a row over a bank of four; the second row mixes one vector twice.
    logits = torch.tensor([[0, LN3, -1, -1, -1], [LN3 / 2, -1, -2, LN3 / 2, -3]], device=backend.device)
    candidates = torch.tensor([[3, 0, 1, 1, 2], [1, 0, 0, 1, 2]], dtype=dtype, device=backend.device)
    bank = torch.tensor(BANK, device=backend.device)
    subvectors, indices, weights = run(backend, logits, bank, candidates, k=2)
    assert indices.tolist() == [[1, 0], [0, 3]]
    torch.testing.assert_close(weights.cpu(), torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
    torch.testing.assert_close(subvectors.cpu(), torch.tensor([[4.0, 0.0, 0.0], [0.0, 16.0, 4.0]]))


def test_k_of_one_copies_the_best_vector(backend):
    bank = torch.tensor(BANK, device=backend.device)
    logits = torch.tensor([[0.1, -0.3, 0.2, 0.0], [-5.0, -4.0, -6.0, -3.0]], device=backend.device)
    subvectors, indices, weights = run(backend, logits, bank, k=1)
    assert indices.tolist() == [[2], [3]]
    assert weights.tolist() == [[1.0], [1.0]]
    assert subvectors.tolist() == [BANK[2], BANK[3]]


def test_sums_run_from_the_best_logit_to_the_least(backend):
    # Quarters of these are 2^24, 1, 1, -2^24: float32 drops each 1 in this order, and only in this order.
    bank = torch.tensor([[2.0**26], [4.0], [4.0], [-(2.0**26)]], device=backend.device)
    logits = torch.zeros(1, 4, device=backend.device)
    assert run(backend, logits, bank, k=4)[0].tolist() == [[0.0]]
    candidates = torch.tensor([[0, 3, 1, 2]], dtype=torch.int16, device=backend.device)
    assert run(backend, logits, bank, candidates, k=4)[0].tolist() == [[0.0]]  # equal logits: still by bank vector
    # The weights are still quarters, in the order 0, 1, 3, 2.
    descending = torch.tensor([[0.0, -1e-30, -3e-30, -2e-30]], device=backend.device)
    assert run(backend, descending, bank, k=4)[0].tolist() == [[1.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_summed_in_float32(backend, dtype):
    bank = torch.tensor([[8192.0], [4.0], [4.0], [-8192.0]], dtype=dtype, device=backend.device)
    subvectors, _, _ = run(backend, torch.zeros(1, 4, dtype=dtype, device=backend.device), bank, k=4)
    assert subvectors.tolist() == [[2.0]]  # in either half type, 2048 + 1 is 2048


# Against the oracle


@pytest.mark.parametrize("case", pairwise_cases(), ids=str)
def test_equals_the_oracle(backend, case, generator):
    inputs = make_inputs(case, generator, backend.device)
    subvectors, indices, weights = run(backend, inputs.logits, inputs.bank, inputs.candidates, case.k, case.out_dtype)
    expected_subvectors, expected_indices, expected_weights, magnitude = exact(inputs, case.k)
    assert indices.dtype == torch.int32
    assert indices.is_contiguous()
    assert torch.equal(indices.cpu(), expected_indices)
    computed_in = reference.accumulation_dtype(case.dtype)
    growth = max(1, case.k / 256)  # the softmax's sum takes k roundings, which show in all weights
    assert_close(weights, expected_weights, computed_in, magnitude=growth * expected_weights)
    assert_close(subvectors, expected_subvectors, case.out_dtype or case.dtype, computed_in, growth * magnitude)


@pytest.mark.parametrize(
    "case",
    [
        Case(torch.float32, rows=3, columns=2048, length=5, k=2048),  # everything selected: a sort
        Case(torch.bfloat16, rows=3, columns=2048, length=5, k=700),
        Case(torch.float32, rows=2, columns=40_000, length=3, k=3),
        Case(torch.float32, rows=33, columns=128, length=24, k=2, candidates=torch.int32, vectors=100_000),
        Case(torch.float32, rows=33, columns=128, length=24, k=2, candidates=torch.int16, vectors=32_768),
        Case(torch.float32, rows=2, columns=64, length=4099, k=2),
    ],
    ids=str,
)
def test_equals_the_oracle_at_the_edges(backend, case, generator):
    test_equals_the_oracle(backend, case, generator)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_dtype_is_rounded_to_once(backend, dtype, out_dtype, generator):
    inputs = make_inputs(Case(dtype, rows=33, columns=40, length=70, k=3), generator, backend.device)
    accumulated, _, _ = run(backend, inputs.logits, inputs.bank, k=3, out_dtype=reference.accumulation_dtype(dtype))
    subvectors, _, _ = run(backend, inputs.logits, inputs.bank, k=3, out_dtype=out_dtype)
    assert_same_bits(subvectors, accumulated.to(out_dtype))


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_survives_conversion(backend, dtype, out_dtype, generator):
    # With k = 1 a sub-vector is a bank vector converted to the other type. All 65536 values of a half type; of the wider, values
    # at and around the halves' borders (overflow, ties, denormals) and random bits.
    if dtype.itemsize == 2:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    else:
        halves = [torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(half).to(dtype)
                  for half in (torch.float16, torch.bfloat16)]  # fmt: skip
        halves = torch.cat(halves)
        midway = (halves[:-1] + halves[1:]) / 2
        integer = torch.int32 if dtype == torch.float32 else torch.int64
        info = torch.iinfo(integer)
        noise = torch.randint(info.min, info.max, (10_000,), dtype=integer, generator=generator).view(dtype)
        values = torch.cat([halves, midway, *(midway.nextafter(midway.new_tensor(x)) for x in (-INF, INF)), noise])
    bank = values[None].to(backend.device)
    subvectors, _, _ = run(backend, bank.new_zeros(1, 1), bank, k=1, out_dtype=out_dtype)
    accumulated = values.to(reference.accumulation_dtype(dtype)) + 0.0  # a sum that starts from 0 has no -0
    assert_same_bits(subvectors[0].nan_to_num(nan=7.0), accumulated.to(out_dtype).nan_to_num(nan=7.0))
    assert torch.equal(subvectors[0].cpu().isnan(), values.isnan())


# Order and ties


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lowest_bank_vector(backend, dtype):
    logits = torch.tensor([[0, 1, 1, 1, 0, 1, 1], [2, 2, 2, 2, 2, 2, 2]], dtype=dtype, device=backend.device)
    bank = torch.arange(7, dtype=dtype, device=backend.device)[:, None]
    assert run(backend, logits, bank, k=4)[1].tolist() == [[1, 2, 3, 5], [0, 1, 2, 3]]
    candidates = torch.tensor([[0, 6, 2, 6, 1, 3, 2], [5, 4, 3, 2, 1, 0, 6]], dtype=torch.int16, device=backend.device)
    subvectors, indices, _ = run(backend, logits, bank, candidates, k=4)
    # Columns 2 and 6 stand for vector 2, column 5 for 3, columns 1 and 3 for 6: the lower column goes first, and 3 is left out.
    assert indices.tolist() == [[2, 6, 5, 1], [5, 4, 3, 2]]
    assert subvectors.tolist() == [[(2 + 2 + 3 + 6) / 4], [(0 + 1 + 2 + 3) / 4]]


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 130, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_ties(backend, dtype, columns, generator):
    # Whatever values the ties are among: ordinary, infinite, NaN of either sign, zeros of either sign.
    values = torch.tensor([-INF, -1.0, -0.0, 0.0, 1.0, INF, NAN, math.copysign(NAN, -1.0)])
    rows = []
    for kinds in ([1, 4], [2, 3], [0, 1], [4, 5], [6, 7, 1], [0, 5, 6], [0], [5], [7, 6], range(8)):
        choice = torch.randint(len(kinds), (4, columns), generator=generator)
        rows.append(values[torch.tensor(list(kinds))[choice]])
    logits = torch.cat(rows).to(dtype)
    bank = torch.randn(columns, 3, generator=generator).to(dtype)
    for candidates in (None, torch.randint(-1, columns + 1, logits.shape, generator=generator, dtype=torch.int16)):
        for k in sorted({1, min(2, columns), min(5, columns), min(40, columns)}):
            expected = reference.admixture(logits, bank, candidates, k, torch.float32)
            there = [x if x is None else x.to(backend.device) for x in (logits, bank, candidates)]
            subvectors, indices, weights = run(backend, *there, k, torch.float32)
            assert torch.equal(indices.cpu(), expected[1])
            torch.testing.assert_close(weights.cpu(), expected[2], equal_nan=True)
            torch.testing.assert_close(subvectors.cpu(), expected[0], equal_nan=True, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 8, 100])
def test_the_best_may_be_anywhere(backend, k):
    # Rows that ascend, that descend, and that hold one peak at each place: no path through a row may miss a column.
    columns = 300
    ascending = torch.arange(columns, dtype=torch.float32)
    logits = torch.cat([torch.stack([ascending, -ascending]), torch.eye(columns) + ascending / 1000])
    bank = torch.ones(columns, 1)
    indices = run(backend, logits.to(backend.device), bank.to(backend.device), k=k)[1].cpu()
    assert torch.equal(indices, logits.topk(k).indices.int())
    assert indices[2:, 0].tolist() == list(range(columns))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 4, 9, 130])
def test_permuted_candidates_give_the_bits_of_the_dense_form(backend, dtype, k, generator):
    inputs = make_inputs(Case(dtype, rows=20, columns=130, length=21, k=k), generator, backend.device)
    logits = (inputs.logits * 4).round() if k > 1 else inputs.logits  # with ties
    order = torch.rand(20, 130, generator=generator).argsort(1).to(backend.device)
    dense = run(backend, logits, inputs.bank, k=k)
    for candidate_dtype in (torch.int16, torch.int32):
        candidates = order.to(candidate_dtype)
        subvectors, indices, weights = run(backend, logits.gather(1, order), inputs.bank, candidates, k)
        assert torch.equal(candidates.gather(1, indices.long()).int(), dense[1])
        assert_same_bits(weights, dense[2])
        assert_same_bits(subvectors, dense[0])


def test_column_order_of_candidates_does_not_choose_among_equals(backend):
    # Two columns that stand for different vectors, in both orders, at each distance: the lower vector wins.
    for columns in (2, 20, 50):
        for place in range(1, columns):
            logits = torch.full((2, columns), -1.0)
            logits[:, 0] = logits[:, place] = 1.0
            candidates = torch.full((2, columns), 9, dtype=torch.int32)
            candidates[0, 0], candidates[0, place] = 3, 4
            candidates[1, 0], candidates[1, place] = 4, 3
            there = [x.to(backend.device) for x in (logits, torch.ones(10, 1), candidates)]
            assert run(backend, *there, k=1)[1].tolist() == [[0], [place]]
            assert run(backend, *there, k=2)[1].tolist() == [[0, place], [place, 0]]


# Softmax


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_and_nan_logits(backend, dtype):
    logits = torch.tensor(
        [
            [0, -INF, -INF, 0],  # -inf is selected, in the order of the bank, and weighs nothing
            [-INF, -INF, -INF, -INF],
            [INF, 0, 1, 2],
            [0, INF, 1, INF],
            [0, 1, NAN, 2],
            [NAN, INF, NAN, NAN],
            [-INF, -INF, 5, -INF],
        ],
        dtype=dtype,
        device=backend.device,
    )
    bank = torch.tensor(BANK, dtype=dtype, device=backend.device)
    subvectors, indices, weights = run(backend, logits, bank, k=3)
    assert indices.tolist() == [[0, 3, 1], [0, 1, 2], [0, 3, 2], [1, 3, 2], [2, 3, 1], [0, 2, 3], [2, 0, 1]]
    selected = logits.gather(1, indices.long()).to(weights.dtype)
    torch.testing.assert_close(weights, torch.softmax(selected, 1), equal_nan=True)
    assert weights[0].tolist() == [0.5, 0.5, 0.0]
    assert weights[6].tolist() == [1.0, 0.0, 0.0]
    assert weights[1:6].isnan().all()
    assert subvectors[0].tolist() == [0.0, 0.0, 4.0]
    assert subvectors[6].tolist() == BANK[2]
    assert subvectors[1:6].isnan().all()


@pytest.mark.parametrize("k", [1, 8, 12])
def test_what_comes_before_all_others_is_found(backend, k):
    # NaN of the least number that may stand for a vector: more than a kernel selects at once, too.
    logits = torch.full((2, 12), NAN, device=backend.device)
    candidates = torch.full((2, 12), -(2**31), dtype=torch.int32, device=backend.device)
    _, indices, _ = run(backend, logits, torch.ones(3, 4, device=backend.device), candidates, k)
    assert indices.tolist() == [list(range(k))] * 2


def test_logits_that_overflow_when_subtracted(backend):
    huge = 3e38
    logits = torch.tensor([[huge, -huge, -huge], [huge, huge, -huge], [-huge, -huge, -huge]], device=backend.device)
    _, indices, weights = run(backend, logits, torch.tensor(BANK[:3], device=backend.device), k=2)
    assert indices.tolist() == [[0, 1], [0, 1], [0, 1]]
    assert weights.tolist() == [[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_softmax_is_accurate_for_each_weight(backend, dtype, generator):
    # Each weight by itself, not in a norm: differences from 0 down to where the smaller weight is denormal, then 0.
    distance = torch.cat([torch.linspace(0, 110, 20_001), torch.rand(20_000, generator=generator) * 2]).to(dtype)
    offset = torch.randint(-8, 8, distance.shape, generator=generator).to(dtype)
    logits = torch.stack([offset, offset - distance], 1)
    _, _, weights = run(backend, logits.to(backend.device), torch.ones(2, 1, dtype=dtype, device=backend.device), k=2)
    expected = torch.softmax(logits.double(), 1)  # of the distance as rounded
    smallest = 2.0**-149 if dtype == torch.float32 else 0.0
    tolerance = {torch.float32: 2, torch.float64: 4}[dtype] * torch.finfo(
        dtype
    ).eps  # the oracle is no better than float64
    torch.testing.assert_close(weights.cpu().double(), expected, rtol=tolerance, atol=1.01 * smallest)


# What lies where in memory


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("candidate_dtype", [None, torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_matter(backend, dtype, candidate_dtype, layout, generator):
    inputs = make_inputs(Case(dtype, 33, 47, 21, 3, candidate_dtype), generator, backend.device)
    expected = run(backend, inputs.logits, inputs.bank, inputs.candidates, 3)
    for name in ("logits", "bank", "candidates"):
        tensors = {"logits": inputs.logits, "bank": inputs.bank, "candidates": inputs.candidates}
        if tensors[name] is None:
            continue
        tensors[name] = not_contiguous(tensors[name], layout)
        for result, want in zip(run(backend, **tensors, k=3), expected, strict=True):
            assert_same_bits(result, want)
            assert result.is_contiguous()


def test_expanded_inputs(backend, generator):
    inputs = make_inputs(Case(torch.float32, 33, 47, 21, 3, torch.int16, vectors=47), generator, backend.device)
    expanded = {
        "logits": inputs.logits[:1].expand(33, 47),
        "bank": inputs.bank[:1].expand(47, 21),
        "candidates": inputs.candidates[:, :1].expand(33, 47),
    }
    for tensors in (expanded, *({name: expanded[name]} for name in expanded)):
        tensors = {"logits": inputs.logits, "bank": inputs.bank, "candidates": inputs.candidates, **tensors}
        dense = {name: tensor.contiguous() for name, tensor in tensors.items()}
        for result, want in zip(run(backend, **tensors, k=3), run(backend, **dense, k=3), strict=True):
            assert_same_bits(result, want)
            assert result.is_contiguous()


@pytest.mark.parametrize("length", [5, 256])
@pytest.mark.parametrize("candidate_dtype", [torch.int16, torch.int32], ids=str)
def test_candidates_out_of_range_add_nothing_and_are_not_read(backend, candidate_dtype, length, generator):
    # The bank lies between vectors of NaN, and the outermost candidates far beyond them.
    info = torch.iinfo(candidate_dtype)
    padded = torch.full((12, length), NAN)
    padded[1:11] = torch.randn(10, length, generator=generator)
    bank = padded.to(backend.device)[1:11]
    logits = torch.randn(64, 6, generator=generator)
    candidates = torch.randint(10, (64, 6), generator=generator).to(candidate_dtype)
    outside = torch.tensor([-1, 10, info.min, info.max, 11, -2], dtype=candidate_dtype)
    candidates = torch.where(torch.rand(64, 6, generator=generator) < 0.3, outside, candidates)
    assert ((candidates < 0) | (candidates > 9)).all(1).logical_not().any()
    candidates[0] = outside  # and a row of nothing else
    for k in (1, 2, 3, 6):
        there = logits.to(backend.device), bank, candidates.to(backend.device)
        subvectors, indices, weights = run(backend, *there, k)
        expected = reference.admixture(logits.double(), bank.cpu().double(), candidates, k)
        assert torch.equal(indices.cpu(), expected[1])  # selected like any other, and in the softmax
        assert_close(weights, expected[2], torch.float32)
        assert_close(subvectors, expected[0], torch.float32)
        assert (subvectors[0] == 0).all()
    # ... not even where the weight is NaN
    nan = torch.full_like(there[0], NAN)
    assert (run(backend, nan, bank, there[2], 6)[0][0] == 0).all()


def test_without_rows(backend):
    bank = torch.tensor(BANK, dtype=torch.bfloat16, device=backend.device)
    subvectors, indices, weights = run(backend, bank.new_empty(0, 4), bank, k=2, out_dtype=torch.float32)
    assert (subvectors.shape, subvectors.dtype) == ((0, 3), torch.float32)
    assert (indices.shape, indices.dtype) == ((0, 2), torch.int32)
    assert (weights.shape, weights.dtype) == ((0, 2), torch.float32)
