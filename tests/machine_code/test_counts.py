"""What the interpreter counts in sm_90's machine code: bounds that hold what docs/cuda.md says; and that it computes."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import vblora  # noqa: F401 (its operators)

from . import counts, toolkit
from .counts import COLUMNS, COUNTED, LENGTH, VECTORS, Count, K

pytestmark = pytest.mark.skipif(
    not toolkit.version().startswith("13.0"), reason="another compiler makes other machine code"
)


@functools.cache
def counted(name: str) -> Count:
    return COUNTED[name].count()


@pytest.mark.parametrize("name", COUNTED)
def test_bounds(name):
    count, bound = counted(name), COUNTED[name]
    assert count.each <= bound.instructions
    too_few = {b: count.in_flight[b] for b, loads in bound.in_flight.items() if count.in_flight[b] < loads}
    assert not too_few


def tensor(count: Count, name: str, dtype: np.dtype, columns: int) -> torch.Tensor:
    return torch.from_numpy(count.memory.get(name, dtype).copy()).view(-1, columns)


ADMIXTURES = {
    "few columns": (COLUMNS, lambda: counted("admixture, M = 128")),
    "many columns": (VECTORS, lambda: counted("admixture, M = h = 2048")),
    "few columns, ties and worse": (COLUMNS, lambda: counts.admixture(64, hard=True)),
    "many columns, ties and worse": (VECTORS, lambda: counts.admixture(8, VECTORS, hard=True)),
}


@pytest.mark.parametrize("name", ADMIXTURES)
def test_admixture_computes_the_bits_of_the_cpu_kernels(name):
    columns, get = ADMIXTURES[name]
    count = get()
    subvectors, indices, weights = torch.ops.vblora.admixture(
        tensor(count, "logits", np.float32, columns),
        tensor(count, "bank", np.float32, LENGTH),
        tensor(count, "candidates", np.int16, columns) if columns < VECTORS else None,
        K, torch.bfloat16,
    )  # fmt: skip
    assert torch.equal(tensor(count, "indices", np.int32, K), indices)
    assert same_bits(tensor(count, "weights", np.float32, K), weights)
    assert torch.equal(tensor(count, "subvectors", np.int16, LENGTH), subvectors.view(torch.int16))


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """But for what is in a float32 NaN."""
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(
        x.nan_to_num().view(torch.int32), y.nan_to_num().view(torch.int32)
    )


def test_compose_computes_the_bits_of_the_cpu_kernels():
    count = counted("compose")
    arguments = [tensor(count, "bank", np.float32, LENGTH), tensor(count, "indices", np.int16, K)]
    subvectors = torch.ops.vblora.compose(*arguments, tensor(count, "weights", np.float32, K), torch.bfloat16)
    assert torch.equal(tensor(count, "subvectors", np.int16, LENGTH), subvectors.view(torch.int16))


def test_the_backward_computes_the_bits_of_the_cpu_kernels():
    for name in ("backward, grad_logits", "backward, grad_bank"):
        count = counted(name)
        grad_logits, grad_bank = torch.ops.vblora.admixture_backward(
            tensor(count, "grad_subvectors", np.int16, LENGTH).view(torch.bfloat16), None,
            tensor(count, "indices", np.int32, K), tensor(count, "weights", np.float32, K),
            tensor(count, "bank", np.float32, LENGTH), tensor(count, "candidates", np.int16, COLUMNS), COLUMNS, True, True,
        )  # fmt: skip
        if name == "backward, grad_logits":
            assert torch.equal(tensor(count, "grad_logits", np.int32, COLUMNS), grad_logits.view(torch.int32))
        else:
            found, expected = tensor(count, "grad_bank", np.int32, LENGTH), grad_bank.view(torch.int32)
            assert torch.equal(found[: counts.COUNTED_VECTORS], expected[: counts.COUNTED_VECTORS])


def test_the_sort_sorts():
    count = counted("backward, sort")
    chosen = counts.chosen_vectors(count.memory)
    order = np.argsort(chosen, kind="stable")
    owed = counts.owed_by(order, count.memory)
    assert (count.memory.get("owed", np.int32) == owed.ravel()).all()
    assert (count.memory.get("slices", np.uint32) == counts.slices_of(chosen[order]).ravel()).all()


def test_the_popular_vector():
    count = counted("backward, popular")
    weights, grads = (tensor(count, name, dtype, columns) for name, dtype, columns in (
        ("weights", np.float32, K), ("grad_subvectors", np.int16, LENGTH)))  # fmt: skip
    grads = grads.view(torch.bfloat16)[:, :16]  # 32 bytes
    expected = (weights.double().sum(1, keepdim=True) * grads.double()).sum(0)
    found = tensor(count, "grad_bank", np.float32, LENGTH)
    assert (found[0, :16] - expected).norm() <= 1e-6 * (weights.sum(1, keepdim=True) * grads.abs()).sum(0).norm()
    assert not found[0, 16:].any()
    assert not found[1:].any()
