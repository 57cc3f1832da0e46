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
    "few columns": (COLUMNS, K, lambda: counted("admixture, M = 128")),
    "few columns, k = 1": (COLUMNS, 1, lambda: counted("admixture, M = 128, k = 1")),
    "few columns, k = 3": (COLUMNS, 3, lambda: counted("admixture, M = 128, k = 3")),
    "few columns in 32 bits": (COLUMNS, K, lambda: counted("admixture, M = 128 in 32 bits")),
    "many columns": (VECTORS, K, lambda: counted("admixture, M = h = 2048")),
    "few columns, ties and worse": (COLUMNS, K, lambda: counts.admixture(64, hard=True)),
    "few columns in 32 bits, ties and worse": (COLUMNS, K, lambda: counts.admixture(16, hard=True, wide=True)),
    "many columns, ties and worse": (VECTORS, K, lambda: counts.admixture(8, VECTORS, hard=True)),
}


@pytest.mark.parametrize("name", ADMIXTURES)
def test_admixture_computes_the_bits_of_the_cpu_kernels(name):
    columns, k, get = ADMIXTURES[name]
    count = get()
    wide = "32 bits" in name
    subvectors, indices, weights = torch.ops.vblora.admixture(
        tensor(count, "logits", np.float32, columns),
        tensor(count, "bank", np.float32, LENGTH),
        tensor(count, "candidates", np.int32 if wide else np.int16, columns) if columns < VECTORS else None,
        k, torch.bfloat16,
    )  # fmt: skip
    assert torch.equal(tensor(count, "indices", np.int32, k), indices)
    assert same_bits(tensor(count, "weights", np.float32, k), weights)
    assert torch.equal(tensor(count, "subvectors", np.int16, LENGTH), subvectors.view(torch.int16))


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """But for what is in a float32 NaN."""
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(
        x.nan_to_num().view(torch.int32), y.nan_to_num().view(torch.int32)
    )


@pytest.mark.parametrize(("name", "k"), [("compose", K), ("compose, k = 1", 1), ("compose, k = 3", 3)])
def test_compose_computes_the_bits_of_the_cpu_kernels(name, k):
    count = counted(name)
    arguments = [tensor(count, "bank", np.float32, LENGTH), tensor(count, "indices", np.int16, k)]
    subvectors = torch.ops.vblora.compose(*arguments, tensor(count, "weights", np.float32, k), torch.bfloat16)
    assert torch.equal(tensor(count, "subvectors", np.int16, LENGTH), subvectors.view(torch.int16))


def test_the_backward_computes_the_bits_of_the_cpu_kernels():
    for name, k in (
        *(("backward, grad_logits", K), ("backward, grad_logits, k = 3", 3)),
        *(("backward, grad_logits, 448 pieces", K), ("backward, grad_bank", K)),
    ):
        count = counted(name)
        grad_logits, grad_bank = torch.ops.vblora.admixture_backward(
            tensor(count, "grad_subvectors", np.int16, LENGTH).view(torch.bfloat16), None,
            tensor(count, "indices", np.int32, k), tensor(count, "weights", np.float32, k),
            tensor(count, "bank", np.float32, LENGTH), tensor(count, "candidates", np.int16, COLUMNS), COLUMNS, True, True,
        )  # fmt: skip
        if "grad_logits" in name:
            assert torch.equal(tensor(count, "grad_logits", np.int32, COLUMNS), grad_logits.view(torch.int32))
        else:
            found, expected = tensor(count, "grad_bank", np.int32, LENGTH), grad_bank.view(torch.int32)
            assert torch.equal(found[: counts.COUNTED_VECTORS], expected[: counts.COUNTED_VECTORS])


@pytest.mark.parametrize("name", ["backward, sort", "backward, sort, 448 pieces"])
def test_the_sort_sorts(name):
    count = counted(name)
    chosen = counts.chosen_vectors(count.memory)
    order = np.argsort(chosen, kind="stable")
    owed = counts.owed_by(order, count.memory)
    found = count.memory.get("owed", np.uint64).reshape(-1, 2) & np.array([2**64 - 1, 2**32 - 1], np.uint64)
    assert (found == owed).all()
    assert (count.memory.get("slices", np.uint32) == counts.slices_of(chosen[order]).ravel()).all()


def test_the_popular_vector():
    count = counted("backward, popular")
    check_popular(count, tensor(count, "grad_bank", np.float32, LENGTH)[0], slice(None))
    assert not tensor(count, "grad_bank", np.float32, LENGTH)[1:].any()


def test_the_parts_of_a_vector_that_is_split():
    count = counted("backward, split")
    partials = tensor(count, "partials", np.float32, LENGTH)
    entries = len(count.memory.get("indices", np.int32))
    for part, its_entries in zip(counts.COUNTED_PARTS, counts.parts_of(entries, counts.COUNTED_PARTS), strict=True):
        check_popular(count, partials[part], slice(its_entries.start // K, its_entries.stop // K))
    others = [part for part in range(counts.PARTS) if part not in counts.COUNTED_PARTS]
    assert not partials[others].any()


def check_popular(count: Count, found: torch.Tensor, rows: slice) -> None:
    """The first 32 bytes' worth of a vector that these rows chose."""
    weights = tensor(count, "weights", np.float32, K)[rows]
    grads = tensor(count, "grad_subvectors", np.int16, LENGTH)[rows].view(torch.bfloat16)[:, :16]
    expected = (weights.double().sum(1, keepdim=True) * grads.double()).sum(0)
    assert (found[:16] - expected).norm() <= 1e-6 * (weights.sum(1, keepdim=True) * grads.abs()).sum(0).norm()
    assert not found[16:].any()


def test_the_sum_of_parts():
    count = counted("backward, sum of 16 parts")
    total = torch.zeros(LENGTH)
    for part in tensor(count, "partials", np.float32, LENGTH):
        total += part
    assert torch.equal(tensor(count, "grad_bank", np.float32, LENGTH)[0], total)
