"""low_rank_backward: the gradients of an update that add_updates_ added, for few rows on the CPU."""

from __future__ import annotations

import pytest
import torch

from .cases import DTYPES, TOLERANCE, assert_same_bits

backward = torch.ops.vblora.low_rank_backward
SIZES = [  # rows, in, out, rank: around the numbers that are taken at a time, 2 rows, 4 ranks, 32, 64 and 16 elements
    (1, 1, 1, 1),
    (3, 16, 7, 2),
    (5, 33, 48, 3),
    (2, 96, 65, 4),
    (7, 17, 130, 6),
    (4, 130, 3, 9),
    (33, 64, 200, 4),
    (0, 4, 4, 2),
    (3, 4, 5, 0),
    (3, 0, 5, 2),
    (3, 4, 0, 2),
]


def inputs(generator, rows, width, out, rank, dtype):
    shapes = {"grad_y": (rows, out), "x": (rows, width), "A": (rank, width), "B": (rank, out), "grad_x": (rows, width)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def run(grad_y, x, A, B, grad_x):
    """The gradients of x, A and B."""
    grad_x = grad_x.clone()
    return [grad_x, *backward(grad_y, x, A, B, grad_x)]


def exact(grad_y, x, A, B, grad_x):
    """The same in float64, by other functions: torch's gradient of the update's definition."""
    grad_y, grad_x = grad_y.double(), grad_x.double()
    leaves = [leaf.double().requires_grad_() for leaf in (x, A, B)]
    update = torch.einsum("pi,ri,ro->po", *leaves)
    of_x, *of_factors = torch.autograd.grad(update, leaves, grad_y)
    return [grad_x + of_x, *of_factors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_products_in_float64(generator, size, dtype):
    given = inputs(generator, *size, dtype)
    found = run(**given)
    for one, expected in zip(found, exact(**given), strict=True):
        assert one.dtype == dtype and one.shape == expected.shape
        assert (one.double() - expected).norm() <= 2 * TOLERANCE[dtype] * expected.norm()
    without = backward(*(given[name] for name in ("grad_y", "x", "A", "B")))
    for one, same in zip(without, found[1:], strict=True):
        assert_same_bits(one, same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads_strides_or_dimensions(generator, dtype):
    """So many rows and columns that several threads divide the rows, and the columns of A and of B."""
    given = inputs(generator, 1000, 500, 260, 5, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(**given))
    finally:
        torch.set_num_threads(threads)
    strided = {name: t if name == "grad_x" else t.T.contiguous().T for name, t in given.items()}
    results.append(run(**strided))
    deeper = {name: t if name in "AB" else t.unflatten(0, (10, 20, 5)) for name, t in given.items()}
    of_x, *of_factors = run(**deeper)
    assert of_x.shape == (10, 20, 5, 500)
    results.append([of_x.flatten(0, 2), *of_factors])
    for other in results[1:]:
        for one, same in zip(other, results[0], strict=True):
            assert_same_bits(one, same)


def test_each_row_has_the_bits_that_it_has_alone(generator):
    """However many rows are taken at a time; gradients of factors add up rows, so they are compared for one row only."""
    given = inputs(generator, 3, 100, 70, 6, torch.float32)
    grad_x, *_ = run(**given)
    y, x, A, B = (given[name] for name in ("grad_y", "x", "A", "B"))
    updated = y.clone()
    torch.ops.vblora.add_updates_(updated, x, A, B)
    for row in range(3):
        alone = {name: t if name in "AB" else t[row : row + 1] for name, t in given.items()}
        assert_same_bits(run(**alone)[0], grad_x[row : row + 1])
        one = y[row : row + 1].clone()
        torch.ops.vblora.add_updates_(one, x[row : row + 1], A, B)
        assert_same_bits(one, updated[row : row + 1])


def test_arguments_are_checked():
    grad_y, x, A, B = torch.ones(3, 5), torch.ones(3, 4), torch.ones(2, 4), torch.ones(2, 5)
    for arguments, message in (
        (
            (grad_y, x[:2], A, B),
            r"`x` has shape \(2, 4\), but must have the shape of `grad_y`, \(3, 5\), except in the last",
        ),
        ((grad_y, x[None], A, B), r"`x` has shape \(1, 3, 4\), but must have the shape of `grad_y`"),
        ((grad_y, x, A[:, :3], B), r"`A` has shape \(2, 3\), but must have \(2, 4\)"),
        ((grad_y, x, A[0], B), r"`A` has shape \(4,\), but must have 2 dimensions"),
        ((grad_y, x, A, B[:1]), r"`B` has shape \(1, 5\), but must have \(2, 5\), the rows of `A`, the last dimension"),
        ((grad_y, x, A, B.bfloat16()), "`B` is torch.bfloat16, but must be torch.float32, the dtype of `grad_y`"),
        ((grad_y.int(), x, A, B), "`grad_y` is torch.int32; allowed are torch.float32"),
        ((grad_y[0, 0], x, A, B), "`grad_y` has no dimensions"),
        ((grad_y, x, A, B, x[:, :3]), r"`grad_x` has shape \(3, 3\), but must have the shape of `x`, \(3, 4\)"),
        ((grad_y, x, A, B, x.bfloat16()), "`grad_x` is torch.bfloat16, but must be torch.float32, the dtype of `x`"),
        ((grad_y, x, A, B, x.T.contiguous().T), "`grad_x` is not contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(*arguments)


def test_opcheck(generator):
    given = inputs(generator, 4, 6, 5, 2, torch.float32)
    for grad_x in (None, given["grad_x"]):
        torch.library.opcheck(backward, tuple((given | {"grad_x": grad_x}).values()))
