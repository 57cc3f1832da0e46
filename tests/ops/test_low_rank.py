"""low_rank_add_ and low_rank_backward: a frozen layer's update and its gradients, for few rows on the CPU."""

from __future__ import annotations

import pytest
import torch

from .cases import TOLERANCE, assert_same_bits

ops = torch.ops.vblora
SIZES = [(1, 1, 1, 1), (3, 16, 7, 2), (5, 33, 48, 3), (2, 40, 31, 4), (7, 17, 65, 6), (0, 4, 4, 2), (4, 130, 3, 9)]


def inputs(generator, rows, width, out, rank, dtype):
    shapes = (rows, out), (rows, width), (rank, width), (rank, out), (rows, out), (rows, width)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def assert_near(found, expected, dtype):
    assert found.dtype == dtype and found.shape == expected.shape
    assert (found.double() - expected).norm() <= 2 * TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_products_in_float64(generator, size, dtype):
    y, x, A, B, grad, grad_x = inputs(generator, *size, dtype)
    exact_y, exact_x, exact_A, exact_B, exact_grad, exact_grad_x = (t.double() for t in (y, x, A, B, grad, grad_x))
    hidden = ops.low_rank_add_(y, x, A, B)
    assert_near(hidden, exact_x @ exact_A.T, torch.float32)
    assert_near(y, exact_y + exact_x @ exact_A.T @ exact_B, dtype)
    without = ops.low_rank_backward(grad, x, hidden, A, B, None)
    grads = ops.low_rank_backward(grad, x, hidden, A, B, grad_x)
    grad_hidden = exact_grad @ exact_B.T
    assert_near(grad_x, exact_grad_x + grad_hidden @ exact_A, dtype)
    for found, same, expected in zip(
        grads, without, (grad_hidden.T @ exact_x, exact_A @ exact_x.T @ exact_grad), strict=True
    ):
        assert_near(found, expected, dtype)
        assert_same_bits(found, same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads_or_strides(generator, dtype):
    y, x, A, B, grad, grad_x = inputs(generator, 300, 200, 260, 4, dtype)

    def run(*tensors):
        y, x, A, B, grad, grad_x = tensors
        y, grad_x = y.clone(), grad_x.clone()
        hidden = ops.low_rank_add_(y, x, A, B)
        return y, hidden, grad_x, *ops.low_rank_backward(grad, x, hidden, A, B, grad_x)

    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(y, x, A, B, grad, grad_x))
    finally:
        torch.set_num_threads(threads)
    results.append(run(y, *(t.T.contiguous().T for t in (x, A, B, grad)), grad_x))
    for other in results[1:]:
        for one, same in zip(other, results[0], strict=True):
            assert_same_bits(one, same)


def test_arguments_are_checked():
    y, x, A, B, hidden = torch.ones(3, 5), torch.ones(3, 4), torch.ones(2, 4), torch.ones(2, 5), torch.ones(3, 2)
    for arguments, message in (
        ((y, x[:2], A, B), r"`x` has shape \(2, 4\), but must have \(3, 4\), the rows of `y`, the columns of `A`"),
        ((y, x, A, B[:1]), r"`B` has shape \(1, 5\), but must have \(2, 5\), the rows of `A`, the columns of `y`"),
        ((y, x, A, B.bfloat16()), "`B` is torch.bfloat16, but must be torch.float32, the dtype of `y`"),
        ((y.double(), x, A, B), "`y` is torch.float64; allowed are torch.float32 and torch.bfloat16"),
        ((y.T.contiguous().T, x, A, B), "`y` is not contiguous"),
        ((y[0], x, A, B), "`y` has shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.low_rank_add_(*arguments)
    for arguments, message in (
        ((y, x, hidden.bfloat16(), A, B, None), "`hidden` is torch.bfloat16"),
        ((y, x, hidden[:, :1], A, B, None), r"`hidden` has shape \(3, 1\)"),
        ((y, x, hidden, A, B, x[:, :3]), r"`grad_x` has shape \(3, 3\)"),
        ((y, x, hidden, A, B, x.bfloat16()), "`grad_x` is torch.bfloat16"),
        ((y, x, hidden, A, B, x.T.contiguous().T), "`grad_x` is not contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.low_rank_backward(*arguments)


def test_opcheck(generator):
    y, x, A, B, grad, grad_x = inputs(generator, 4, 6, 5, 2, torch.float32)
    torch.library.opcheck(ops.low_rank_add_, (y, x, A, B))
    for given in (None, grad_x):
        torch.library.opcheck(ops.low_rank_backward, (grad, x, torch.randn(4, 2), A, B, given))
