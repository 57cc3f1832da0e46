"""What the operators require of their arguments: one function per operator, for tracing (:mod:`vblora.ops`) and for the oracle
(:mod:`vblora.reference`).

``csrc/prepare.cpp`` makes the same checks in the same order, with the same messages, before a kernel runs.
``tests/ops/test_arguments.py`` holds all three to one table of messages.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CANDIDATE_DTYPES = (torch.int16, torch.int32)
INDEX_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)

MOST_RANKS = 4096  # of an update: they fit in a GPU's shared memory

Require = Callable[[bool, Callable[[], str]], None]  # torch._check, or a function like it that raises another error


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights and of sums: float64 for float64 inputs, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Arguments:
    """Checks of one operator's arguments. Sizes may be symbolic, so each condition is passed to torch as it is."""

    def __init__(self, operator: str, name: str, first: Tensor, require: Require) -> None:
        self.operator = operator
        self.name = name
        self.device = first.device
        self.require = require

    def check(self, holds: bool, message: Callable[[], str]) -> None:
        self.require(holds, lambda: f"vblora::{self.operator}: {message()}")

    def on_device(self, name: str, tensor: Tensor) -> None:
        self.check(
            tensor.device == self.device,
            lambda: f"`{name}` is on {tensor.device}, but must be on {self.device}, the device of `{self.name}`.",
        )

    def matrix(self, name: str, tensor: Tensor) -> None:
        self.on_device(name, tensor)
        self.check(tensor.dim() == 2, lambda: f"`{name}` has shape {tuple(tensor.shape)}, but must have 2 dimensions.")

    def shape(self, name: str, tensor: Tensor, rows: int, columns: int, source: str) -> None:
        self.matrix(name, tensor)
        for size, wanted in zip(tensor.shape, (rows, columns), strict=True):
            self.check(
                size == wanted,
                lambda: f"`{name}` has shape {tuple(tensor.shape)}, but must have {(rows, columns)}, {source}.",
            )

    def dtype(self, name: str, dtype: torch.dtype, wanted: torch.dtype, source: str) -> None:
        self.check(dtype == wanted, lambda: f"`{name}` is {dtype}, but must be {wanted}, {source}.")

    def one_of(self, name: str, dtype: torch.dtype, allowed: Sequence[torch.dtype]) -> None:
        *most, last = map(str, allowed)
        self.check(dtype in allowed, lambda: f"`{name}` is {dtype}; allowed are {', '.join(most)} and {last}.")

    def flags(self, name: str, tensor: Tensor, rows: int) -> None:
        self.on_device(name, tensor)
        self.check(
            tuple(tensor.shape) == (rows,),
            lambda: f"`{name}` has shape {tuple(tensor.shape)}, but must have ({rows},), the rows of `{self.name}`.",
        )
        self.dtype(name, tensor.dtype, torch.bool, "since it is written")
        self.check(tensor.is_contiguous(), lambda: f"`{name}` is not contiguous, but must be, since it is written.")

    def weights(self, tensor: Tensor, indices: Tensor, bank: Tensor) -> None:
        self.shape("weights", tensor, indices.shape[0], indices.shape[1], "the shape of `indices`")
        self.dtype("weights", tensor.dtype, accumulation_dtype(bank.dtype), f"since `bank` is {bank.dtype}")

    def columns_without_candidates(self, columns: int, vectors: int, found: str) -> None:
        self.check(
            columns == vectors,
            lambda: f"{found}, but `bank` has {vectors} vectors; without `candidates` both must be equal.",
        )

    def multiple_of_ranks(self, size: int, ranks: int) -> None:
        self.check(
            size >= 0 and size % ranks == 0,
            lambda: f"`sizes` holds {size}, but each size must be a multiple of `ranks`, {ranks}.",
        )

    def nonnegative(self, name: str, value: float) -> None:
        self.check(0 <= value < math.inf, lambda: f"`{name}` is {value:g}, but must be finite and not negative.")

    def between(self, name: str, value: int, last: int) -> None:
        for holds in (value >= 0, value <= last):
            self.check(holds, lambda: f"`{name}` is {value}, but must be between 0 and {last}.")


def check_admixture(
    logits: Tensor,
    bank: Tensor,
    candidates: Tensor | None,
    k: int,
    out_dtype: torch.dtype | None,
    *,
    require: Require = torch._check,
) -> None:
    arguments = _Arguments("admixture", "logits", logits, require)
    arguments.matrix("logits", logits)
    arguments.matrix("bank", bank)
    arguments.one_of("logits", logits.dtype, FLOAT_DTYPES)
    arguments.dtype("bank", bank.dtype, logits.dtype, "the dtype of `logits`")
    arguments.one_of("out_dtype", out_dtype or bank.dtype, FLOAT_DTYPES)
    rows, columns = logits.shape
    if candidates is None:
        arguments.columns_without_candidates(columns, bank.shape[0], f"`logits` has {columns} columns")
    else:
        arguments.shape("candidates", candidates, rows, columns, "the shape of `logits`")
        arguments.one_of("candidates", candidates.dtype, CANDIDATE_DTYPES)
    for holds in (k >= 1, k <= columns):
        arguments.check(
            holds, lambda: f"`k` is {k}, but must be between 1 and {columns}, the number of columns of `logits`."
        )


def check_admixture_parts(logits: Tensor, exhausted: Tensor | None, sizes: list[int], ranks: int) -> None:
    arguments = _Arguments("admixture_parts", "logits", logits, torch._check)
    arguments.check(ranks >= 1, lambda: f"`ranks` is {ranks}, but must be at least 1.")
    rows = logits.shape[0]
    for size in sizes:
        arguments.multiple_of_ranks(size, ranks)
    total = sum(sizes)
    arguments.check(
        total == rows, lambda: f"`sizes` adds up to {total}, but must add up to {rows}, the number of rows of `logits`."
    )
    if exhausted is not None:
        arguments.flags("exhausted", exhausted, rows)


def check_admixture_backward(
    grad_subvectors: Tensor | None,
    grad_weights: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    bank: Tensor,
    candidates: Tensor | None,
    num_candidates: int,
    *,
    require: Require = torch._check,
) -> None:
    arguments = _Arguments("admixture_backward", "indices", indices, require)
    arguments.check(
        grad_subvectors is not None or grad_weights is not None,
        lambda: "`grad_subvectors` and `grad_weights` are both None; pass at least one.",
    )
    arguments.matrix("indices", indices)
    arguments.dtype("indices", indices.dtype, torch.int32, "the dtype that admixture returns")
    arguments.matrix("bank", bank)
    arguments.one_of("bank", bank.dtype, FLOAT_DTYPES)
    rows, k = indices.shape
    vectors, length = bank.shape
    arguments.weights(weights, indices, bank)
    if grad_subvectors is not None:
        arguments.shape(
            "grad_subvectors", grad_subvectors, rows, length, "the rows of `indices`, the columns of `bank`"
        )
        arguments.one_of("grad_subvectors", grad_subvectors.dtype, FLOAT_DTYPES)
    if grad_weights is not None:
        arguments.shape("grad_weights", grad_weights, rows, k, "the shape of `weights`")
        arguments.dtype("grad_weights", grad_weights.dtype, weights.dtype, "the dtype of `weights`")
    if candidates is None:
        arguments.columns_without_candidates(num_candidates, vectors, f"`num_candidates` is {num_candidates}")
    else:
        arguments.shape("candidates", candidates, rows, num_candidates, "the rows of `indices`, `num_candidates`")
        arguments.one_of("candidates", candidates.dtype, CANDIDATE_DTYPES)
    arguments.check(
        k <= num_candidates,
        lambda: f"`num_candidates` is {num_candidates}, but must be at least {k}, the number of columns of `indices`.",
    )


def check_compose(
    bank: Tensor,
    indices: Tensor,
    weights: Tensor,
    out_dtype: torch.dtype | None,
    *,
    require: Require = torch._check,
) -> None:
    arguments = _Arguments("compose", "bank", bank, require)
    arguments.matrix("bank", bank)
    arguments.one_of("bank", bank.dtype, FLOAT_DTYPES)
    arguments.matrix("indices", indices)
    arguments.one_of("indices", indices.dtype, INDEX_DTYPES)
    arguments.weights(weights, indices, bank)
    arguments.one_of("out_dtype", out_dtype or bank.dtype, FLOAT_DTYPES)


def check_add_updates(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, adapters: Tensor | None = None, *, require: Require = torch._check
) -> None:
    arguments = _Arguments("add_updates_", "y", y, require)
    arguments.one_of("y", y.dtype, FLOAT_DTYPES)
    arguments.check(y.dim() >= 1, lambda: "`y` has no dimensions, but must have at least 1.")

    def shaped(name: str, tensor: Tensor, sizes: Sequence[int], wanted: Callable[[], str]) -> None:
        for holds in (tensor.dim() == len(sizes), *(a == b for a, b in zip(tensor.shape, sizes, strict=False))):
            arguments.check(holds, lambda: f"`{name}` has shape {tuple(tensor.shape)}, but must have {wanted()}.")

    for name, tensor in (("x", x), ("A", A), ("B", B)):
        arguments.on_device(name, tensor)
        arguments.dtype(name, tensor.dtype, y.dtype, "the dtype of `y`")
        if name == "x":
            sizes = (*y.shape[:-1], *x.shape[-1:])
            shaped("x", x, sizes, lambda: f"the shape of `y`, {tuple(y.shape)}, except in the last dimension")
    leading = ("rank",) if adapters is None else ("adapters", "rank")
    with_ = "without" if adapters is None else "with"
    columns = x.shape[-1]
    shaped(
        "A",
        A,
        (*A.shape[: len(leading)], columns),
        lambda: f"({', '.join(leading)}, {columns}), {with_} `adapters`",
    )
    out = y.shape[-1]
    shaped(
        "B",
        B,
        (*A.shape[:-1], out),
        lambda: f"the shape of `A`, {tuple(A.shape)}, with a last dimension of {out}",
    )
    rank = A.shape[-2]
    arguments.check(rank <= MOST_RANKS, lambda: f"`A` has rank {rank}, but must have at most {MOST_RANKS}.")
    if adapters is not None:
        arguments.on_device("adapters", adapters)
        arguments.dtype("adapters", adapters.dtype, torch.int64, "an index for each row")
        arguments.check(
            adapters.dim() == 1, lambda: f"`adapters` has shape {tuple(adapters.shape)}, but must have 1 dimension."
        )
        rows, positions = adapters.shape[0], math.prod(y.shape[:-1])
        arguments.check(
            positions == 0 if rows == 0 else positions % rows == 0,
            lambda: f"`adapters` has {rows} rows, which must divide the {positions} positions of `y`.",
        )


def check_draw_logits(
    logits: Tensor, candidates: Tensor | None, num_vectors: int, std: float, *, require: Require = torch._check
) -> None:
    arguments = _Arguments("draw_logits_", "logits", logits, require)
    arguments.matrix("logits", logits)
    arguments.one_of("logits", logits.dtype, FLOAT_DTYPES)
    rows, columns = logits.shape
    arguments.between("num_vectors", num_vectors, torch.iinfo(torch.int32).max)
    if candidates is None:
        arguments.check(
            columns == num_vectors,
            lambda: (
                f"`logits` has {columns} columns, but must have {num_vectors}, `num_vectors`, without `candidates`."
            ),
        )
    else:
        arguments.shape("candidates", candidates, rows, columns, "the shape of `logits`")
        arguments.one_of("candidates", candidates.dtype, CANDIDATE_DTYPES)
        most = torch.iinfo(candidates.dtype).max + 1
        arguments.check(
            num_vectors <= most,
            lambda: (
                f"`candidates` is {candidates.dtype}, which can hold {most} vectors, but `num_vectors` is "
                f"{num_vectors}; use torch.int32."
            ),
        )
        arguments.check(
            columns <= num_vectors,
            lambda: f"`logits` has {columns} columns, but must have at most {num_vectors}, `num_vectors`.",
        )
    arguments.nonnegative("std", std)


def check_draw_uniform(values: Tensor, stream: int, bound: float, *, require: Require = torch._check) -> None:
    arguments = _Arguments("draw_uniform_", "values", values, require)
    arguments.matrix("values", values)
    arguments.one_of("values", values.dtype, FLOAT_DTYPES)
    arguments.between("stream", stream, 2**32 - 1)
    arguments.nonnegative("bound", bound)
