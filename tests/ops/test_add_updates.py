"""add_updates_: each row gets the update of its adapter, in place; rows without one keep their bits."""

from __future__ import annotations

import pytest
import torch

from vblora import reference

from .cases import DTYPES, LAYOUTS, assert_close, assert_same_bits, not_contiguous

# rows, positions, in, out, rank, adapters
SIZES = (
    (1, 1, 1, 1, 1, 1),
    (3, 1, 33, 65, 3, 2),
    (8, 1, 64, 192, 4, 8),
    (5, 3, 100, 70, 5, 4),
    (2, 7, 257, 17, 9, 3),
    (4, 2, 8, 300, 64, 2),
)


def make(size, dtype, generator, device):
    rows, positions, in_features, out_features, rank, count = size

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    adapters = torch.randint(-1, count, (rows,), generator=generator)
    adapters[0] = count - 1
    tensors = {
        "y": normal(rows, positions, out_features),
        "x": normal(rows, positions, in_features),
        "A": normal(count, rank, in_features),
        "B": normal(count, rank, out_features),
    }
    return tensors | {"adapters": adapters.to(device)}


def run(ops, arguments) -> torch.Tensor:
    y = arguments["y"].clone()
    assert ops.add_updates_(**arguments | {"y": y}) is None
    return y


def exact(arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle's result in float64, and the magnitude of its terms."""
    wide = {name: x.cpu() if name == "adapters" else x.cpu().double() for name, x in arguments.items() if x is not None}
    magnitudes = {name: x if name == "adapters" else x.abs() for name, x in wide.items()}
    return run(reference, wide), run(reference, magnitudes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_oracle(backend, size, dtype, generator):
    arguments = make(size, dtype, generator, backend.device)
    computed_in = reference.accumulation_dtype(dtype)
    expected, magnitude = exact(arguments)
    assert_close(run(backend.ops, arguments), expected, dtype, computed_in, magnitude)
    one = arguments | {"A": arguments["A"][-1], "B": arguments["B"][-1], "adapters": None}
    expected, magnitude = exact(one)
    assert_close(run(backend.ops, one), expected, dtype, computed_in, magnitude)


def test_the_oracle_is_what_it_says(generator):
    """Against the definition, written with other functions."""
    arguments = make(SIZES[3], torch.float64, generator, "cpu")
    y, x, A, B, adapters = arguments.values()
    for row, adapter in enumerate(adapters.tolist()):
        update = torch.einsum("pi,ri,ro->po", x[row], A[adapter], B[adapter]) if adapter >= 0 else 0
        assert torch.allclose(run(reference, arguments)[row], y[row] + update, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_an_adapter_keep_their_bits(backend, dtype, generator):
    arguments = make((6, 2, 40, 50, 4, 3), dtype, generator, backend.device)
    # Neither -1 nor any other index that is out of range is read through, and infinite inputs do not leak.
    arguments["adapters"] = torch.tensor([-1, 2, 3, 2**40, -(2**63), 0], device=backend.device)
    arguments["y"][:, 0, 0] = -0.0
    arguments["x"][[0, 2, 3, 4]] = float("inf")
    result = run(backend.ops, arguments)
    for row in (0, 2, 3, 4):
        assert_same_bits(result[row], arguments["y"][row])
    for row in (1, 5):
        assert not torch.equal(result[row], arguments["y"][row])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["y", "x", "A", "B", "adapters"])
def test_strides_do_not_matter(backend, name, layout, generator):
    arguments = make((6, 1, 24, 36, 3, 4), torch.float32, generator, backend.device)
    arguments["y"], arguments["x"] = arguments["y"][:, 0], arguments["x"][:, 0]
    expected = run(backend.ops, arguments)
    tensor = arguments[name]
    if name == "adapters":
        other = torch.stack([tensor, tensor], 1)[:, 0]
    elif tensor.dim() == 3:
        other = not_contiguous(tensor.flatten(1), layout).unflatten(1, tensor.shape[1:])
    else:
        other = not_contiguous(tensor, layout)
    if name == "y":
        backend.ops.add_updates_(**arguments | {"y": other})
        assert_same_bits(other, expected)
    else:
        assert_same_bits(run(backend.ops, arguments | {name: other}), expected)


def test_factors_in_an_arena(backend, generator):
    """Matrices within the rows of a wider tensor are not copied, and nothing else of it is read."""
    arguments = make((5, 2, 24, 36, 3, 4), torch.float32, generator, backend.device)
    arena = torch.full((4, 10 + 3 * 24 + 3 * 36 + 7), float("nan"), device=backend.device)
    A, B = arena[:, 10:82].unflatten(1, (3, 24)), arena[:, 82:190].unflatten(1, (3, 36))
    A.copy_(arguments["A"])
    B.copy_(arguments["B"])
    assert_same_bits(run(backend.ops, arguments | {"A": A, "B": B}), run(backend.ops, arguments))


@pytest.mark.parametrize("empty", range(5))
def test_without_rows_positions_elements_or_ranks(backend, empty, generator):
    size = [3, 2, 5, 7, 4, 2]
    size[empty] = 0
    device = backend.device
    rows, positions, in_features, out_features, rank, count = size
    y = torch.randn(rows, positions, out_features, generator=generator).to(device)
    x, A = torch.ones(rows, positions, in_features, device=device), torch.ones(count, rank, in_features, device=device)
    adapters = torch.zeros(rows, dtype=torch.int64, device=device)
    before = y.clone()
    backend.ops.add_updates_(y, x, A, torch.ones(count, rank, out_features, device=device), adapters)
    assert_same_bits(y, before)


@pytest.mark.backends("cpu")
def test_numbers_of_threads_do_not_matter(backend, generator):
    arguments = make((9, 50, 192, 320, 4, 5), torch.float32, generator, backend.device)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(backend.ops, arguments))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_backends_have_the_bits_of_the_cpu(backend, dtype, generator):
    arguments = make((4, 3, 150, 200, 6, 3), dtype, generator, backend.device)
    on_cpu = {name: tensor.cpu() for name, tensor in arguments.items()}
    assert_same_bits(run(backend.ops, arguments), run(torch.ops.vblora, on_cpu))
