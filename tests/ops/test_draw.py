"""draw_logits_: exactly the numbers of the published generator, at the right elements, normally distributed."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from vblora import reference
from vblora.arguments import CANDIDATE_DTYPES

from .cases import DTYPES, LAYOUTS, NAN, assert_same_bits, not_contiguous, torch_says

INT16_VECTORS = 2**15
# The probability that a correct generator fails one of the statistical tests.
FALSE_ALARM = 1e-9


def draw(ops, device, rows, num_vectors, num_candidates=None, seed=0, std=1.0, dtype=torch.float32, candidates=None):
    """Logits and, if `num_candidates` is given, candidates (int32, or of the dtype `candidates`), from a draw into garbage."""
    logits = torch.full(
        (rows, num_vectors if num_candidates is None else num_candidates), NAN, dtype=dtype, device=device
    )
    indices = None if num_candidates is None else torch.full_like(logits, -1, dtype=candidates or torch.int32)
    assert ops.draw_logits_(logits, indices, num_vectors, seed, std) is None
    return logits, indices


def any_seed(generator: torch.Generator) -> int:
    return int(torch.randint(-(2**63), 2**63 - 1, (), generator=generator))


def hexadecimal(logits: torch.Tensor) -> list[str]:
    return [" ".join(f"{word & 0xFFFFFFFF:08x}" for word in row) for row in logits.cpu().view(torch.int32).tolist()]


# The reference


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [  # of Random123, by the authors of Philox: kat_vectors
        (0, [0, 0, 0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (2**64 - 1, [0xFFFFFFFF] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (0x299F31D0_A4093822, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
         [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)  # fmt: skip
def test_philox_has_the_published_words(key, counter, words):
    assert reference.philox(key, torch.tensor(counter)).tolist() == words
    assert reference.philox(key - 2**64, torch.tensor([[counter]])).tolist() == [[words]]  # the same 64 bits


def test_place_of_a_word():
    seed, words = 2405_15179, reference.draw_words(5, 11, 2405_15179)
    for row, column in ((0, 0), (0, 3), (0, 4), (4, 10), (2, 7)):
        assert words[row, column] == reference.philox(seed, torch.tensor([column // 4, row, 0, 0]))[column % 4]


def test_quantiles():
    edges = torch.tensor([0, 2**31, round(0.075 * 2**32)])[:, None] + torch.arange(1000)  # 0.075: the formulas meet
    words = torch.cat([edges.flatten(), torch.arange(0, 2**31, 99_991)])
    words = torch.cat([words, 2**32 - 1 - words]).unique()
    normals = reference.standard_normal(words)
    probabilities = (words.double() + 0.5) * 2.0**-32
    # The same formulas with the library's logarithm, and other formulas
    again = [statistics.NormalDist().inv_cdf(p) for p in probabilities.tolist()]
    torch.testing.assert_close(normals, torch.tensor(again, dtype=torch.float64), rtol=1e-15, atol=0)
    torch.testing.assert_close(normals, torch.special.ndtri(probabilities), rtol=2e-14, atol=1e-16)
    assert torch.equal(normals.flip(0), -normals)
    neighbours = words.diff() == 1
    assert neighbours.sum() > 5000
    assert normals.diff()[neighbours].min() > 5.8e-10  # which is some 10^5 times the error, and so holds everywhere


# The operator


def test_literal_bits(backend):
    # Changing these numbers changes the meaning of every seed.
    logits, _ = draw(backend.ops, backend.device, 3, 6, seed=0)
    assert hexadecimal(logits) == [
        "be82fa50 3f96bb4f 3f2153b7 3e88fdeb 3ff51846 beb4ac05",
        "be55f3f9 3faf50cc bdf86c57 bff3b2ee be3932f2 3f9f78c8",
        "bec88fa5 bffa072e 3edf5014 3f0cb7e5 3f3e3895 bf32861c",
    ]
    logits, _ = draw(backend.ops, backend.device, 2, 6, seed=-1)
    assert hexadecimal(logits) == [
        "be06505a bfb133d6 3e9f3a25 bf8d634d bfa2eb14 bf0a45f2",
        "3d64197f 3fc82c18 bf9c7f93 bf2c2179 3ddf46ea 3f1e93d3",
    ]
    logits, _ = draw(backend.ops, backend.device, 1, 6, seed=2**40 + 3)
    assert hexadecimal(logits) == ["bed9bfff 3f00ac37 3f11bc74 3fa5e8ea bf8a528d 3ed2b3dd"]
    logits, candidates = draw(backend.ops, backend.device, 2, 2048, 4, seed=7, std=0.02)
    assert hexadecimal(logits) == ["3d854a39 3d80c3a7 3d7e9068 3d76fb93", "3d879818 3d82c271 3d6e8ae9 3d670d75"]
    assert candidates.tolist() == [[1611, 1095, 1527, 1884], [207, 1833, 785, 431]]


SIZES = [  # rows, bank vectors, candidates
    *((rows, vectors, None) for rows, vectors in ((1, 1), (2, 2), (7, 3), (3, 5), (33, 255), (5, 257), (2, 2048), (1, 3001))),
    *((rows, vectors, count) for rows, vectors, count in (
        (1, 1, 1), (3, 2, 1), (7, 5, 5), (33, 64, 3), (5, 257, 256), (5, 259, 259), (33, 300, 128), (9, 2048, 128),
        (4, 2048, 1000), (1, 3001, 7), (3, 2999, 2048), (2, 5000, 2999), (2, 3000, 3000), (1, 70_001, 1))),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vectors", "count"), SIZES)
def test_equals_the_oracle(backend, rows, vectors, count, dtype, generator):
    seed = any_seed(generator)
    for index_dtype in [None] if count is None else CANDIDATE_DTYPES:
        if index_dtype == torch.int16 and vectors > INT16_VECTORS:
            continue
        arguments = (rows, vectors, count, seed, 0.37, dtype, index_dtype)
        logits, candidates = draw(backend.ops, backend.device, *arguments)
        expected, expected_candidates = draw(reference, torch.device("cpu"), *arguments)
        assert_same_bits(logits, expected)
        if count is not None:
            assert_same_bits(candidates, expected_candidates)


@pytest.mark.parametrize(
    ("rows", "vectors", "count", "seed"),
    [
        # The CPU skips what is most likely not among the largest. Here, in row 2, it has skipped too much.
        (4, 2048, 100, 46_008),
        # More words with the same first 8 bits than a CUDA kernel can sort.
        (1, 700_000, 3, 0),
        # As many as int16 can count.
        (2, INT16_VECTORS, 40, 5),
        (1, INT16_VECTORS, INT16_VECTORS, -5),
    ],
)
def test_detours(backend, rows, vectors, count, seed):
    dtype = torch.int16 if vectors <= INT16_VECTORS else torch.int32
    arguments = (rows, vectors, count, seed, 1.0, torch.float32, dtype)
    results = draw(backend.ops, backend.device, *arguments)
    for result, expected in zip(results, draw(reference, torch.device("cpu"), *arguments), strict=True):
        assert_same_bits(result, expected)


def test_equal_words_go_to_the_lowest_bank_vector(backend):
    # One in some 4000 rows of this length has two equal words among its 53 largest; this one has them at the end.
    words = reference.draw_words(1, 20_000, 2052)[0]
    first, second = 1391, 11_591
    assert words[first] == words[second]
    for count, last in ((52, [first]), (53, [first, second])):
        logits, candidates = draw(backend.ops, backend.device, 1, 20_000, count, seed=2052)
        assert candidates[0, 51:].tolist() == last
        assert (logits[0, 51:] == logits[0, 51]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_candidates_are_the_largest_of_all(backend, dtype, generator):
    seed = any_seed(generator)
    dense, _ = draw(backend.ops, backend.device, 50, 500, seed=seed, dtype=dtype)
    for count in (1, 30, 499, 500):
        logits, candidates = draw(backend.ops, backend.device, 50, 500, count, seed, dtype=dtype)
        assert_same_bits(logits, dense.gather(1, candidates.long()))
        assert (logits.diff(dim=1) <= 0).all()  # also where rounding has made them equal
        assert torch.equal(candidates.sort(dim=1).values.diff(dim=1) > 0, torch.ones(50, count - 1, dtype=torch.bool).to(
            backend.device))  # fmt: skip
        rest = dense.scatter(1, candidates.long(), -math.inf)
        assert (rest.amax(dim=1) <= logits[:, -1]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_number_depends_on_its_place_alone(backend, dtype, generator):
    seed = any_seed(generator)
    large, _ = draw(backend.ops, backend.device, 40, 600, seed=seed, dtype=dtype)
    small, _ = draw(backend.ops, backend.device, 11, 333, seed=seed, dtype=dtype)
    assert_same_bits(small, large[:11, :333])
    most = draw(backend.ops, backend.device, 40, 600, 200, seed, dtype=dtype)
    few = draw(backend.ops, backend.device, 11, 600, 50, seed, dtype=dtype)
    for result, want in zip(few, most, strict=True):
        assert_same_bits(result, want[:11, :50])


def test_std_scales_and_types_round(backend):
    unit, _ = draw(backend.ops, backend.device, 9, 100, seed=1, dtype=torch.float64)
    assert torch.equal(unit, unit.float().double())  # of each type the rounded float32
    for dtype in DTYPES:
        logits, _ = draw(backend.ops, backend.device, 9, 100, seed=1, dtype=dtype)
        assert_same_bits(logits, unit.to(dtype))
        scaled, _ = draw(backend.ops, backend.device, 9, 100, seed=1, dtype=dtype, std=0.25)
        assert_same_bits(scaled, (unit / 4).to(dtype))
        zero, _ = draw(backend.ops, backend.device, 9, 100, seed=1, dtype=dtype, std=0.0)
        assert (zero == 0).all()


@pytest.mark.parametrize(("rows", "vectors", "count"), [(0, 7, None), (5, 0, None), (0, 7, 3), (5, 7, 0), (0, 0, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_rows_or_columns(backend, rows, vectors, count, dtype):
    draw(backend.ops, backend.device, rows, vectors, count, dtype=dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(backend, dtype, layout):
    dense, _ = draw(backend.ops, backend.device, 33, 300, seed=3, dtype=dtype)
    expected = draw(backend.ops, backend.device, 33, 300, 21, seed=3, dtype=dtype)
    for want in ((dense, None), expected):
        logits, candidates = (x if x is None else not_contiguous(torch.zeros_like(x), layout) for x in want)
        assert layout == "one element off" or not logits.is_contiguous()
        backend.ops.draw_logits_(logits, candidates, 300, 3, 1.0)
        for result, each in zip((logits, candidates), want, strict=True):
            if each is not None:
                assert_same_bits(result, each)
                # Nothing was written beside it.
                assert result._base is None or result._base.count_nonzero() == result.count_nonzero()


# Randomness


@pytest.mark.backends("cpu", "cuda")  # of numbers that others have, too
def test_numbers_are_normal(backend, generator):
    count = 2**21
    logits, _ = draw(backend.ops, backend.device, 2**10, 2**11, seed=any_seed(generator), dtype=torch.float64)
    normals = logits.cpu().flatten().sort().values
    # Kolmogorov-Smirnov: P(sqrt(n) D > x) is at most 2 exp(-2 x^2)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    share = torch.special.ndtr(normals)
    distance = max((steps[1:] - share).max().item(), (share - steps[:-1]).max().item())
    assert math.sqrt(count) * distance <= math.sqrt(-math.log(FALSE_ALARM / 2) / 2)
    # Tails, which that hardly looks at: how many there are is all but Poisson's
    for limit in (3.0, 4.0, 5.0):
        for found in ((normals > limit).sum(), (normals < -limit).sum()):
            mean = torch.tensor(count, dtype=torch.float64) * torch.special.ndtr(
                torch.tensor(-limit, dtype=torch.float64)
            )
            at_most, at_least = torch.special.gammaincc(found + 1.0, mean), torch.special.gammainc(found.double(), mean)
            assert at_most > FALSE_ALARM and (found == 0 or at_least > FALSE_ALARM), (limit, found, mean)


@pytest.mark.backends("cpu", "cuda")
def test_neighbours_are_independent(backend, generator):
    seed = any_seed(generator) >> 1  # so that there is one after it
    logits, other = (
        draw(backend.ops, backend.device, 2**10, 2**10, seed=each, dtype=torch.float64)[0] for each in (seed, seed + 1)
    )
    high = draw(backend.ops, backend.device, 2**10, 2**10, seed=seed ^ 1 << 32, dtype=torch.float64)[0]
    pairs = {
        "columns": (logits[:, 1:], logits[:, :-1]),
        "columns of another philox": (logits[:, 4:], logits[:, :-4]),
        "rows": (logits[1:], logits[:-1]),
        "rows and columns": (logits, logits.t()),
        "seeds": (logits, other),
        "upper halves of seeds": (logits, high),
        "seeds and columns": (logits[:, 1:], other[:, :-1]),
    }
    limit = -torch.special.ndtri(torch.tensor(FALSE_ALARM / 2, dtype=torch.float64))
    for name, (left, right) in pairs.items():
        for transform in (lambda x: x, torch.square, torch.abs):
            products = (transform(left) - transform(left).mean()) * (transform(right) - transform(right).mean())
            if name == "rows and columns":  # each pair is there twice, and the diagonal is no pair
                products = products[tuple(torch.triu_indices(*products.shape, offset=1))]
            statistic = products.mean() / products.std() * math.sqrt(products.numel())
            assert statistic.abs() <= limit, (name, statistic)


# What torch expects of an operator that writes to its arguments


def good_arguments(device: torch.device) -> dict:
    logits = torch.zeros(6, 9, device=device)
    candidates = torch.zeros(6, 9, dtype=torch.int16, device=device)
    return {"logits": logits, "candidates": candidates, "num_vectors": 20, "seed": 0, "std": 1.0}


@pytest.mark.parametrize("device", ["backend", "meta"])
def test_good_arguments_are_good(backend, device):
    device = backend.device if device == "backend" else torch.device(device)
    arguments = good_arguments(device)
    for changes in ({}, {"num_vectors": 9}, {"candidates": None, "num_vectors": 9}, {"num_vectors": INT16_VECTORS}):
        backend.ops.draw_logits_(**arguments | changes)
    for seed in (-(2**63), 2**63 - 1):
        backend.ops.draw_logits_(**arguments | {"seed": seed, "std": 0.0})


def test_elements_that_share_memory_are_refused(backend):
    with pytest.raises(RuntimeError, match=torch_says("single memory location")):
        backend.ops.draw_logits_(torch.zeros(1, 9, device=backend.device).expand(6, 9), None, 9, 0, 1.0)


@pytest.mark.backends("cpu", "cuda")  # the emulated operators are kernels only
def test_autograd_knows_of_the_change(backend):
    parameter = torch.nn.Parameter(torch.ones(6, 9, device=backend.device))
    with pytest.raises(RuntimeError, match=torch_says("leaf Variable that requires grad")):
        backend.ops.draw_logits_(parameter, None, 9, 0, 1.0)
    assert (parameter == 1).all()
    with torch.no_grad():
        backend.ops.draw_logits_(parameter, None, 9, 0, 1.0)
    assert parameter._version == 1
    candidates = torch.zeros(6, 9, dtype=torch.int32, device=backend.device)
    backend.ops.draw_logits_(torch.zeros_like(parameter), candidates, 9, 0, 1.0)
    assert candidates._version == 1
    logits = parameter * 2
    backend.ops.draw_logits_(logits, None, 9, 0, 1.0)
    logits.sum().backward()
    assert (parameter.grad == 0).all()  # nothing is left of what there was


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", [None, *CANDIDATE_DTYPES], ids=str)
def test_opcheck(backend, dtype, index_dtype):
    logits = torch.zeros(6, 9, dtype=dtype, device=backend.device)
    candidates = None if index_dtype is None else torch.zeros_like(logits, dtype=index_dtype)
    torch.library.opcheck(backend.ops.draw_logits_, (logits, candidates, 9 if candidates is None else 30, -7, 0.5))
    torch.library.opcheck(
        backend.ops.draw_logits_, (logits.t(), candidates if candidates is None else candidates.t(), 6, 1, 1.0)
    )


@pytest.mark.backends("cpu", "cuda")
def test_compile(backend):
    def begin(rows: int):
        logits = torch.empty(rows, 9, device=backend.device)
        candidates = torch.empty(rows, 9, dtype=torch.int16, device=backend.device)
        backend.ops.draw_logits_(logits, candidates, 30, 5, 0.5)
        return logits * 2, candidates

    compiled = torch.compile(begin, fullgraph=True, backend="aot_eager")
    for rows in (6, 7):
        for result, want in zip(compiled(rows), begin(rows), strict=True):
            assert_same_bits(result, want)
