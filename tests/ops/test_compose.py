"""compose: the sums of admixture from stored indices and weights."""

from __future__ import annotations

import pytest
import torch

from vblora import reference
from vblora.arguments import INDEX_DTYPES

from .cases import (
    DTYPES,
    LAYOUTS,
    NAN,
    Case,
    assert_close,
    assert_same_bits,
    make_inputs,
    not_contiguous,
    pairwise_cases,
)


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_table(backend, dtype, index_dtype):
    bank = torch.tensor([[8, 0, -4], [0, 16, 4], [4, 4, 4]], dtype=dtype, device=backend.device)
    indices = torch.tensor([[0, 1], [2, 0], [1, 1]], dtype=index_dtype, device=backend.device)
    weights = torch.tensor([[0.75, 0.25], [0.5, -0.5], [0.25, 0.5]], device=backend.device)
    subvectors = backend.ops.compose(bank, indices, weights.to(reference.accumulation_dtype(dtype)))
    assert subvectors.dtype == dtype
    assert subvectors.tolist() == [[6.0, 4.0, -2.0], [-2.0, 2.0, 4.0], [0.0, 12.0, 3.0]]


@pytest.mark.parametrize("case", pairwise_cases(), ids=str)
def test_same_bits_as_admixture(backend, case, generator):
    inputs = make_inputs(case, generator, backend.device)
    subvectors, indices, weights = backend.ops.admixture(
        inputs.logits, inputs.bank, inputs.candidates, case.k, case.out_dtype
    )
    vectors = indices.long() if inputs.candidates is None else inputs.candidates.gather(1, indices.long())
    for dtype in INDEX_DTYPES:
        if len(inputs.bank) <= torch.iinfo(dtype).max + 1:
            assert_same_bits(backend.ops.compose(inputs.bank, vectors.to(dtype), weights, case.out_dtype), subvectors)


@pytest.mark.parametrize("case", pairwise_cases(), ids=str)
def test_equals_the_oracle(backend, case, generator):
    # Any weights, not only those of a softmax: of either sign, and not in order.
    inputs = make_inputs(case, generator, backend.device)
    indices = torch.randint(len(inputs.bank), (case.rows, case.k), generator=generator)
    subvectors = backend.ops.compose(inputs.bank, indices.to(backend.device), inputs.grad_weights, case.out_dtype)
    bank, weights = inputs.bank.cpu().double(), inputs.grad_weights.cpu().double()
    assert_close(
        subvectors,
        reference.compose(bank, indices, weights),
        case.out_dtype or case.dtype,
        reference.accumulation_dtype(case.dtype),
        magnitude=reference.compose(bank.abs(), indices, weights.abs()),
    )


@pytest.mark.parametrize(("index_dtype", "vectors"), [(torch.uint8, 256), (torch.int16, 2**15), (torch.int32, 2**17)])
def test_every_index_of_a_full_bank(backend, index_dtype, vectors):
    bank = torch.arange(vectors, dtype=torch.float32, device=backend.device)[:, None]
    indices = torch.arange(vectors, device=backend.device).to(index_dtype)[:, None]
    assert torch.equal(backend.ops.compose(bank, indices, torch.ones_like(bank)), bank)


@pytest.mark.parametrize("index_dtype", [torch.int16, torch.int32], ids=str)
def test_negative_indices_are_not_large_ones(backend, index_dtype):
    bank = torch.ones(70_000, 1, device=backend.device)
    indices = torch.tensor([[-1, -(2**15)], [5, -1]], dtype=index_dtype, device=backend.device)
    assert backend.ops.compose(bank, indices, torch.ones(2, 2, device=backend.device)).tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
def test_out_of_range_adds_nothing_and_is_not_read(backend, index_dtype, generator):
    info = torch.iinfo(index_dtype)
    # Those beyond 32 bits would be in range if they were cut short.
    outside = [-1, 10, 11, info.min, info.max, 2**8 + 1, 2**16 + 2, 2**32, 2**32 + 3, -(2**32) + 4]
    outside = [value for value in outside if info.min <= value <= info.max and not 0 <= value < 10]
    for k, length in ((1, 5), (1, 256), (2, 256), (3, 256), (len(outside), 5), (9, 5)):
        padded = torch.full((12, length), NAN)
        padded[1:11] = torch.randn(10, length, generator=generator)
        bank = padded.to(backend.device)[1:11]
        indices = torch.randint(10, (64, k), generator=generator).to(index_dtype)
        choice = torch.tensor(outside, dtype=index_dtype)[torch.randint(len(outside), (64, k), generator=generator)]
        where = torch.rand(64, k, generator=generator) < 0.4
        where[0] = True
        indices[where] = choice[where]
        weights = torch.randn(64, k, generator=generator)
        weights[where] = NAN  # not even the weight matters
        subvectors = backend.ops.compose(bank, indices.to(backend.device), weights.to(backend.device))
        expected = reference.compose(bank.cpu().double(), indices, weights.double())
        magnitude = reference.compose(bank.cpu().double().abs(), indices, weights.double().abs())
        assert_close(subvectors, expected, torch.float32, magnitude=magnitude)
        assert (subvectors[0] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
def test_strides_do_not_matter(backend, index_dtype, layout, generator):
    tensors = {
        "bank": torch.randn(47, 21, generator=generator).to(backend.device),
        "indices": torch.randint(47, (33, 3), generator=generator).to(index_dtype).to(backend.device),
        "weights": torch.randn(33, 3, generator=generator).to(backend.device),
    }
    expected = backend.ops.compose(**tensors)
    for name, tensor in tensors.items():
        subvectors = backend.ops.compose(**tensors | {name: not_contiguous(tensor, layout)})
        assert_same_bits(subvectors, expected)
        assert subvectors.is_contiguous()


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_dtype_is_rounded_to_once(backend, dtype, out_dtype, generator):
    inputs = make_inputs(Case(dtype, rows=33, columns=40, length=70, k=3), generator, backend.device)
    indices = torch.randint(40, (33, 3), generator=generator, dtype=torch.int32).to(backend.device)
    accumulated = backend.ops.compose(inputs.bank, indices, inputs.grad_weights, reference.accumulation_dtype(dtype))
    subvectors = backend.ops.compose(inputs.bank, indices, inputs.grad_weights, out_dtype)
    assert_same_bits(subvectors, accumulated.to(out_dtype))


def test_without_rows(backend):
    bank = torch.ones(3, 2, dtype=torch.bfloat16, device=backend.device)
    indices = torch.empty(0, 2, dtype=torch.uint8, device=backend.device)
    subvectors = backend.ops.compose(bank, indices, torch.empty(0, 2, device=backend.device), torch.float32)
    assert (subvectors.shape, subvectors.dtype) == ((0, 2), torch.float32)
