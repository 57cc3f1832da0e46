"""admixture_parts and admixture_backward_parts: sub-vectors that are split, flags of exhausted rows, gradients in pieces."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vblora import reference

from .cases import DTYPES, INF, NAN, Case, assert_same_bits, make_inputs

CASES = [  # rows by 8 lanes, by a warp, by a block, not aligned, of 32-bit candidates
    Case(torch.float32, rows=70, columns=128, length=16, k=2, candidates=torch.int16, vectors=300),
    Case(torch.bfloat16, rows=40, columns=128, length=24, k=4, candidates=torch.int16, vectors=300),
    Case(torch.float32, rows=20, columns=300, length=8, k=2, out_dtype=torch.bfloat16),
    Case(torch.float64, rows=20, columns=17, length=12, k=3, out_dtype=torch.float32),
    Case(torch.float16, rows=20, columns=1000, length=8, k=8, candidates=torch.int32, vectors=2000),
    Case(torch.float32, rows=10, columns=300, length=8, k=40),
]


def split(rows: int) -> list[int]:
    """Sizes of five parts, two of them empty."""
    return [2 * (rows // 6), 0, 2, rows - 2 - 2 * (rows // 6), 0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_are_the_sub_vectors(backend, case, generator):
    inputs = make_inputs(case, generator, backend.device)
    sizes = split(case.rows)
    arguments = inputs.logits, inputs.bank, inputs.candidates
    whole = backend.ops.admixture(*arguments, case.k, case.out_dtype)
    parts, *others = backend.ops.admixture_parts(*arguments, None, case.k, case.out_dtype, sizes, 2)
    for part, wanted in zip(parts, whole[0].split(sizes), strict=True):
        assert_same_bits(part, wanted.reshape(2, -1))
        # CUDA would refuse the address after the last one.
        assert part.numel() or not part.untyped_storage().data_ptr()
    for found, wanted in zip(others, whole[1:], strict=True):
        assert_same_bits(found, wanted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_exhausted_once_the_last_logit_is_chosen(backend, case, generator):
    inputs = make_inputs(case, generator, backend.device)
    logits, k = inputs.logits, case.k
    kth = logits[:, :-1].double().topk(k).values[:, -1].to(logits.dtype)
    logits[:, -1] = kth - 1
    logits[1::4, -1] = kth[1::4]  # as large as the k-th, and then above it
    logits[2::4, -1] = kth[2::4] + 1
    logits[5, -1] = NAN
    logits[6] = -INF
    logits[7, :k] = NAN
    exhausted = torch.zeros(case.rows, dtype=torch.bool, device=backend.device)
    exhausted[8] = True  # stays
    backend.ops.admixture_parts(logits, inputs.bank, inputs.candidates, exhausted, k, None, [case.rows], 1)
    here = inputs.to(torch.device("cpu"))
    _, indices, _ = reference.admixture(here.logits, here.bank, here.candidates, k)
    expected = here.logits.gather(1, indices[:, -1:].long()).squeeze(1) <= here.logits[:, -1]
    assert expected[[1, 2, 6]].all() and not expected[[0, 3, 4, 5, 7, 8]].any()
    expected[8] = True
    assert exhausted.tolist() == expected.tolist()


def test_flags_are_checked(backend):
    arguments = torch.randn(4, 3), torch.randn(3, 2), None
    flags = torch.zeros(8, dtype=torch.bool)
    for wrong, message in (
        (flags, r"`exhausted` has shape \(8,\), but must have \(4,\), the rows of `logits`"),
        (torch.zeros(4), "`exhausted` is torch.float32, but must be torch.bool"),
        (flags[::2], "`exhausted` is not contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backend.ops.admixture_parts(*arguments, wrong, 1, None, [4], 1)
        with FakeTensorMode() as mode:
            fakes = [t if t is None else mode.from_tensor(t) for t in (*arguments, wrong)]
            with pytest.raises(RuntimeError, match=message):
                backend.ops.admixture_parts(*fakes, 1, None, [4], 1)


def pieces(grads: torch.Tensor, sizes: list[int], left_out: int, offset: int) -> tuple[list, list, torch.Tensor]:
    """Runs of rows, each in memory of its own, ``offset`` elements off where an allocation begins; but for every
    ``left_out``-th. And the gradients with zeros there."""
    whole, parts, begins, begin = grads.clone(), [], [], 0
    for number, size in enumerate(sizes):
        rows = grads[begin : begin + size]
        if left_out and number % left_out == left_out - 1:
            whole[begin : begin + size] = 0
        else:
            parts.append(torch.cat([rows.new_zeros(offset), rows.flatten()])[offset:].view(-1))
            begins.append(begin)
        begin += size
    assert begin == len(grads)
    return parts, begins, whole


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_in_pieces_have_the_bits_of_those_in_one(backend, case, offset, generator):
    inputs = make_inputs(case, generator, backend.device)
    _, indices, weights = backend.ops.admixture(inputs.logits, inputs.bank, inputs.candidates, case.k)
    rest = indices, weights, inputs.bank, inputs.candidates, case.columns, True, True
    for left_out in (0, 2, 3):
        parts, begins, whole = pieces(inputs.grad_subvectors, split(case.rows), left_out, offset)
        wanted = backend.ops.admixture_backward(whole, None, *rest)
        for found, expected in zip(backend.ops.admixture_backward_parts(parts, begins, *rest), wanted, strict=True):
            assert torch.equal(found, expected)


# As many as a kernel finds in 3 KB of parameters, in 24 KB, and more than it has pointers for.
@pytest.mark.backends("cpu", "cuda-emulated-random", "cuda")
@pytest.mark.parametrize("count", [255, 257, 2047, 2050])
def test_many_pieces(backend, count, generator):
    case = Case(torch.float32, rows=2 * count, columns=20, length=8, k=2, candidates=torch.int16, vectors=1500)
    inputs = make_inputs(case, generator, backend.device)
    _, indices, weights = backend.ops.admixture(inputs.logits, inputs.bank, inputs.candidates, case.k)
    rest = indices, weights, inputs.bank, inputs.candidates, case.columns, True, True
    sizes = [1, 3] * (count // 2) + [2] * (count % 2)
    parts, begins, whole = pieces(inputs.grad_subvectors, sizes, 7, 0)
    wanted = torch.ops.vblora.admixture_backward(whole, None, *rest)
    for found, expected in zip(backend.ops.admixture_backward_parts(parts, begins, *rest), wanted, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_may_be_in_any_order_in_memory(backend, dtype, generator):
    case = Case(dtype, rows=12, columns=9, length=6, k=3)
    inputs = make_inputs(case, generator, backend.device)
    _, indices, weights = backend.ops.admixture(inputs.logits, inputs.bank, None, case.k)
    rest = indices, weights, inputs.bank, None, case.columns, True, True
    block = torch.zeros(3, 4, 6, dtype=dtype, device=backend.device)
    block[[1, 2, 0]] = inputs.grad_subvectors.view(3, 4, 6)
    parts = [block[1], block[2], block[0]]
    wanted = backend.ops.admixture_backward(inputs.grad_subvectors, None, *rest)
    for found, expected in zip(backend.ops.admixture_backward_parts(parts, [0, 4, 8], *rest), wanted, strict=True):
        assert_same_bits(found, expected)
