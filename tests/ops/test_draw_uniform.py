"""draw_uniform_: the same numbers everywhere, each a function of seed, stream, row and column, uniformly distributed."""

from __future__ import annotations

import math

import pytest
import torch

from vblora import reference

from .cases import DTYPES, LAYOUTS, NAN, assert_same_bits, not_contiguous, torch_says

FALSE_ALARM = 1e-9  # as in test_draw.py


def draw(ops, device, rows, columns, seed=0, stream=1, bound=1.0, dtype=torch.float32):
    values = torch.full((rows, columns), NAN, dtype=dtype, device=device)
    assert ops.draw_uniform_(values, seed, stream, bound) is None
    return values


def any_seed(generator: torch.Generator) -> int:
    return int(torch.randint(-(2**63), 2**63 - 1, (), generator=generator))


def hexadecimal(values: torch.Tensor) -> list[str]:
    return [" ".join(f"{word & 0xFFFFFFFF:08x}" for word in row) for row in values.cpu().view(torch.int32).tolist()]


# The reference


def test_number_of_a_word():
    # Philox's published words of key 0 and counter 0 (test_draw.py), which are those of stream 0's first four places
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    values = torch.empty(1, 4, dtype=torch.float64)
    reference.draw_uniform_(values, 0, 0, 1.0)
    assert values[0].tolist() == [((word >> 8) - 2**23) / 2**23 for word in words]


# The operator


def test_literal_bits(backend):
    # Changing these numbers changes every VeRA adapter that was saved without its projections.
    values = draw(backend.ops, backend.device, 3, 6, seed=0, stream=1, bound=1.0)
    assert hexadecimal(values) == [
        "bf24631a bf596e3c 3f79f1c0 3e8a1ea8 3f52a6b6 bebbceec",
        "bec3df88 3f51bc54 bf3bb512 3e543a10 bd9a5250 3f01ea44",
        "bf62e280 3f3d389e bf778e50 bf49e26a 3e7aecc8 bf7a1f9c",
    ]
    values = draw(backend.ops, backend.device, 2, 6, seed=0, stream=2, bound=1.0)
    assert hexadecimal(values) == [
        "3f3a5f8a 3eb7d680 3f4dee16 3f276994 3eea6328 be5ccdc0",
        "3ef10bc8 3eb03770 3ee11a10 bf202b46 be2add08 bf2854a0",
    ]
    values = draw(backend.ops, backend.device, 2, 6, seed=-1, stream=1, bound=0.125)
    assert hexadecimal(values) == [
        "bd869158 bd97ddca bdfb165e 3d97ec0e bd28da0c 3dec084a",
        "bd0c8eb0 b96e2800 bd29d9a8 3ded073c 3dc96522 3c38a000",
    ]
    values = draw(backend.ops, backend.device, 1, 6, seed=1099511627779, stream=1, bound=0.4)
    assert hexadecimal(values) == [
        "bdbae880 3dae7fc0 beca2160 3e7e6910 be9b60f0 be9c5740",
    ]


SIZES = ((1, 1), (2, 2), (7, 3), (3, 5), (33, 255), (5, 257), (2, 2048), (1, 3001))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_equals_the_oracle(backend, rows, columns, dtype, generator):
    seed = any_seed(generator)
    for stream, bound in ((1, 0.37), (2**32 - 1, math.sqrt(6 / 384))):
        values = draw(backend.ops, backend.device, rows, columns, seed, stream, bound, dtype)
        assert_same_bits(values, draw(reference, torch.device("cpu"), rows, columns, seed, stream, bound, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_number_depends_on_its_place_alone(backend, dtype, generator):
    seed = any_seed(generator)
    large = draw(backend.ops, backend.device, 40, 600, seed, dtype=dtype)
    assert_same_bits(draw(backend.ops, backend.device, 11, 333, seed, dtype=dtype), large[:11, :333])


def test_bound_scales_and_types_round(backend):
    unit = draw(backend.ops, backend.device, 9, 100, seed=1, dtype=torch.float64)
    assert torch.equal(unit, unit.float().double())
    for dtype in DTYPES:
        assert_same_bits(draw(backend.ops, backend.device, 9, 100, seed=1, dtype=dtype), unit.to(dtype))
        scaled = draw(backend.ops, backend.device, 9, 100, seed=1, bound=0.25, dtype=dtype)
        assert_same_bits(scaled, (unit / 4).to(dtype))
        assert (draw(backend.ops, backend.device, 9, 100, bound=0.0, dtype=dtype) == 0).all()


@pytest.mark.parametrize(("rows", "columns"), [(0, 7), (5, 0), (0, 0)])
def test_without_rows_or_columns(backend, rows, columns):
    draw(backend.ops, backend.device, rows, columns)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(backend, dtype, layout):
    want = draw(backend.ops, backend.device, 33, 300, seed=3, dtype=dtype)
    values = not_contiguous(torch.zeros_like(want), layout)
    backend.ops.draw_uniform_(values, 3, 1, 1.0)
    assert_same_bits(values, want)
    assert values._base is None or values._base.count_nonzero() == values.count_nonzero()


@pytest.mark.backends("cpu")
def test_numbers_of_threads_do_not_matter(backend):
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(draw(backend.ops, backend.device, 5003, 100))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_same_bits(result, results[0])


# Randomness


@pytest.mark.backends("cpu", "cuda")  # of numbers that others have, too
def test_numbers_are_uniform(backend, generator):
    count = 2**21
    bound = 0.3
    values = draw(backend.ops, backend.device, 2**10, 2**11, any_seed(generator), bound=bound, dtype=torch.float64)
    values = values.cpu().flatten().sort().values
    assert -bound * 1.0000001 <= values[0] and values[-1] < bound
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    share = (values / bound + 1) / 2
    distance = max((steps[1:] - share).max().item(), (share - steps[:-1]).max().item())  # Kolmogorov-Smirnov
    assert math.sqrt(count) * distance <= math.sqrt(-math.log(FALSE_ALARM / 2) / 2)


@pytest.mark.backends("cpu", "cuda")
def test_neighbours_are_independent(backend, generator):
    seed = any_seed(generator) >> 1  # so that there is one after it

    def numbers(seed: int, stream: int = 1) -> torch.Tensor:
        return draw(backend.ops, backend.device, 2**10, 2**10, seed, stream, dtype=torch.float64)

    values = numbers(seed)
    pairs = {
        "columns": (values[:, 1:], values[:, :-1]),
        "rows": (values[1:], values[:-1]),
        "seeds": (values, numbers(seed + 1)),
        "streams": (values, numbers(seed, 2)),
        "logits": (values, numbers(seed, 0)),
    }
    limit = -torch.special.ndtri(torch.tensor(FALSE_ALARM / 2, dtype=torch.float64))
    for name, (left, right) in pairs.items():
        products = left * right
        statistic = products.mean() / products.std() * math.sqrt(products.numel())
        assert statistic.abs() <= limit, (name, statistic)


# What torch expects of an operator that writes to its argument


@pytest.mark.backends("cpu", "cuda")
def test_autograd_knows_of_the_change(backend):
    parameter = torch.nn.Parameter(torch.ones(6, 9, device=backend.device))
    with pytest.raises(RuntimeError, match=torch_says("leaf Variable that requires grad")):
        backend.ops.draw_uniform_(parameter, 0, 1, 1.0)
    assert (parameter == 1).all()
    with torch.no_grad():
        backend.ops.draw_uniform_(parameter, 0, 1, 1.0)
    assert parameter._version == 1


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(backend, dtype):
    values = torch.zeros(6, 9, dtype=dtype, device=backend.device)
    torch.library.opcheck(backend.ops.draw_uniform_, (values, -7, 1, 0.5))
    torch.library.opcheck(backend.ops.draw_uniform_, (values.t(), 1, 2, 1.0))
