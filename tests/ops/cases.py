"""Test cases for the operators, and comparisons of results."""

from __future__ import annotations

import functools
import itertools
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from vblora import reference
from vblora.arguments import FLOAT_DTYPES

DTYPES = FLOAT_DTYPES
NAN, INF = float("nan"), float("inf")

# The largest allowed ||result - exact|| / ||exact|| per dtype of the result. For the half types: the unit roundoff (2^-8, 2^-11),
# which bounds the single rounding that is allowed. For the others: a few times the measured error.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 4e-15, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def torch_says(message: str) -> str:
    """What an error from torch itself contains: its message from 2.13 on; before, only that a call failed."""
    return message if torch.__version__ >= (2, 13) else "API call failed"


@dataclass(frozen=True)
class Case:
    """A size to test. `columns` is M; without candidates it is also the number of bank vectors."""

    dtype: torch.dtype
    rows: int
    columns: int
    length: int
    k: int
    candidates: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    # Of the bank. If None and there are candidates, drawn at random around the number of columns.
    vectors: int | None = None

    def __str__(self) -> str:
        short = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.candidates, self.out_dtype)]
        return f"{short[0]}-S{self.rows}-M{self.columns}-b{self.length}-k{self.k}-{short[1]}-to-{short[2]}"


@functools.cache
def pairwise_cases() -> list[Case]:
    """A small set of cases that covers every pair of values of any two fields (with k <= M), and a few cases without rows."""
    factors = {
        "dtype": DTYPES,
        "rows": (1, 7, 33, 257),
        "columns": (1, 2, 17, 128, 300, 2048),
        "length": (1, 3, 8, 17, 64, 256),
        "k": (1, 2, 3, 4, 5, 8, "all"),
        "candidates": (None, torch.int16, torch.int32),
        "out_dtype": (None, *DTYPES),
    }
    names = list(factors)

    def allowed(values: dict) -> bool:
        k, columns = values.get("k"), values.get("columns")
        if k == "all":
            return columns is None or columns <= 300  # the oracle is slow
        return k is None or columns is None or k <= columns

    def pairs(values: dict) -> set:
        return set(itertools.combinations([(name, values[name]) for name in names if name in values], 2))

    missing = {}  # an ordered set
    for first, second in itertools.combinations(names, 2):
        for pair in itertools.product(factors[first], factors[second]):
            if allowed(values := dict(zip((first, second), pair, strict=True))):
                missing |= dict.fromkeys(pairs(values))

    rng = random.Random(2405)  # the same cases in each run; only the numbers in them are new
    cases = [Case(dtype, 0, 17, 8, 2, candidates) for dtype in DTYPES for candidates in (None, torch.int16)]
    while missing:
        values = dict(rng.choice(list(missing)))
        for name in rng.sample(names, len(names)):
            if name not in values:
                options = [values | {name: value} for value in factors[name]]
                options = [option for option in options if allowed(option)]
                gains = [len(pairs(option) & missing.keys()) for option in options]
                values = rng.choice([option for option, gain in zip(options, gains, strict=True) if gain == max(gains)])
        for pair in pairs(values):
            missing.pop(pair, None)
        cases.append(Case(**values | {"k": values["columns"] if values["k"] == "all" else values["k"]}))
    return cases


@dataclass
class Inputs:
    logits: Tensor
    bank: Tensor
    candidates: Tensor | None
    grad_subvectors: Tensor
    grad_weights: Tensor

    def to(self, device: torch.device) -> Inputs:
        return Inputs(**{name: x if x is None else x.to(device) for name, x in vars(self).items()})


def make_inputs(case: Case, generator: torch.Generator, device: torch.device) -> Inputs:
    def normal(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)

    vectors = case.vectors or case.columns
    if case.candidates is not None and case.vectors is None and torch.rand((), generator=generator) < 0.5:
        vectors = max(1, case.columns // 3)  # so that candidates repeat within a row
    return Inputs(
        logits=normal(case.rows, case.columns, case.dtype),
        bank=normal(vectors, case.length, case.dtype),
        candidates=None
        if case.candidates is None
        else random_candidates(case.rows, case.columns, vectors, generator).to(case.candidates),
        grad_subvectors=normal(case.rows, case.length, case.out_dtype or case.dtype),
        grad_weights=normal(case.rows, case.k, reference.accumulation_dtype(case.dtype)),
    ).to(device)


def random_candidates(rows: int, columns: int, vectors: int, generator: torch.Generator) -> Tensor:
    """(rows, columns) bank vectors in random order, distinct within a row if there are enough."""
    order = torch.rand(rows, max(columns, vectors), generator=generator).argsort(dim=1)
    return order[:, :columns] % vectors


def exact(inputs: Inputs, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The oracle's float64 results on the CPU from the same rounded inputs, and the magnitude of the sub-vectors' terms."""
    inputs = inputs.to(torch.device("cpu"))
    logits, bank = inputs.logits.double(), inputs.bank.double()
    magnitude, _, _ = reference.admixture(logits, bank.abs(), inputs.candidates, k)
    return *reference.admixture(logits, bank, inputs.candidates, k), magnitude


def assert_close(
    result: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    computed_in: torch.dtype | None = None,
    magnitude: Tensor | None = None,
) -> None:
    """`result` has this dtype and equals `expected` to its tolerance; infinities and NaN are in the same places.

    A sum that cancels is small beside its terms. So its error is measured by `magnitude`, the sum of their absolute values (only
    the norm is used), as far as it comes from summing in `computed_in`, and by the sum itself as far as from its own rounding.
    """
    assert result.dtype == dtype
    assert result.shape == expected.shape
    assert result.is_contiguous()
    magnitude = expected if magnitude is None else magnitude
    result, expected, magnitude = result.cpu().double(), expected.cpu().double(), magnitude.cpu().double()
    finite = expected.isfinite()
    torch.testing.assert_close(result[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True)
    error = (result[finite] - expected[finite]).norm().item()
    norm, summed = expected[finite].norm().item(), magnitude[magnitude.isfinite()].norm().item()
    allowed = TOLERANCE[dtype] * norm + TOLERANCE[computed_in or dtype] * summed
    assert error <= allowed, f"||error|| is {error:.2e}, allowed are {allowed:.2e}; ||expected|| is {norm:.2e}"


def assert_same_bits(result: Tensor, expected: Tensor) -> None:
    """Same dtype, shape and bits: stricter than torch.equal, for which -0.0 is 0.0 and NaN is not NaN."""
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    same = bits(result) == bits(expected)
    assert same.all(), f"{(~same).sum()} of {same.numel()} differ, the first at {(~same).nonzero()[0].tolist()}"


def bits(tensor: Tensor) -> Tensor:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return tensor.detach().contiguous().cpu().view(integer)


def not_contiguous(tensor: Tensor, how: str) -> Tensor:
    """The same values with other strides."""
    if how == "transposed":
        other = tensor.t().contiguous().t()
    elif how == "columns of a wider one":
        other = torch.stack([tensor, torch.zeros_like(tensor)], dim=2).flatten(1)[:, ::2]
    elif how == "rows of a longer one":
        other = torch.stack([torch.zeros_like(tensor), tensor], dim=1).flatten(0, 1)[1::2]
    elif how == "one element off":  # contiguous, but not aligned to anything
        other = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    elif how == "expanded":
        other = tensor[:1].expand(tensor.shape)
        return other
    else:
        raise ValueError(how)
    assert torch.equal(other, tensor)
    return other


LAYOUTS = ("transposed", "columns of a wider one", "rows of a longer one", "one element off")
