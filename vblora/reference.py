"""The reference: the operators of `torch.ops.vblora` in plain PyTorch, written for readers, not for speed.

Each function has the arguments and results of its operator, and defines what the operator computes; `admixture` is
differentiable by autograd. The tests compare every backend with this module in float64. Models use it only within transforms of
``torch.func``, which the operators have no rules for.

Symbols: S rows, one per sub-vector; M logits per row, k of them selected; a bank of h vectors of length b.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import (
    accumulation_dtype,
    check_add_updates,
    check_admixture,
    check_admixture_backward,
    check_compose,
    check_draw_logits,
    check_draw_uniform,
)

_require = torch._check_value  # raises a ValueError


def admixture(
    logits: Tensor, bank: Tensor, candidates: Tensor | None, k: int, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The top-k admixture module of VB-LoRA (arXiv 2405.15179, eq. 3.3): `u = sum_s w_s alpha_s`, `w = softmax(top_k(sigma))`.

    sigma is a row of `logits`, alpha_s a vector of `bank`, and u a sub-vector; eq. 3.1 and 3.2 concatenate sub-vectors into
    the rows of A and B.

    Args:
        logits: (S, M), float32, float64, bfloat16 or float16.
        bank: (h, b), the dtype of `logits`.
        candidates: (S, M), int16 or int32: the bank vector of each logit; several logits can have the same one. An index outside
            0..h-1 is selected like any other but contributes nothing. None requires M = h: column j has vector j.
        k: the number of logits to select per row, 1 <= k <= M.
        out_dtype: dtype of `subvectors`, one of the four above; None for the bank's.

    Returns:
        subvectors: (S, b), summed in float32 (float64 for float64 inputs) in descending order of the logits and rounded once.
        indices: (S, k), int32: columns of `logits`, largest logit first. NaN counts as largest. Ties go to the lowest bank
            vector, then to the lowest column.
        weights: (S, k), float32 (float64 for float64 inputs): the softmax of the selected logits. A logit of -inf has weight 0.
            If NaN or +inf is selected, or only -inf, the row is NaN.

    Raises:
        ValueError: a shape, a dtype, a device or k is invalid.
    """
    check_admixture(logits, bank, candidates, k, out_dtype, require=_require)
    columns = _best_columns(logits, candidates, k)
    selected = logits.gather(1, columns).to(accumulation_dtype(logits.dtype))
    weights = torch.softmax(selected, dim=1)
    vectors = columns if candidates is None else candidates.long().gather(1, columns)
    subvectors = _mix(bank, vectors, weights)
    return subvectors.to(out_dtype or bank.dtype), columns.int(), weights


def admixture_backward(
    grad_subvectors: Tensor | None,
    grad_weights: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    bank: Tensor,
    candidates: Tensor | None,
    num_candidates: int,
    need_logits: bool,
    need_bank: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of `admixture`.

    For a row with incoming gradients g of the sub-vector and gw of the weights, let v_j be the bank vector of its j-th selected
    logit and `d_j = <g, v_j> + gw_j`. The gradient of that logit is `w_j (d_j - sum_i w_i d_i)`; the row adds `w_j g` to the
    gradient of v_j.

    Args:
        grad_subvectors: (S, b), float32, float64, bfloat16 or float16; None for zero.
        grad_weights: (S, k), the dtype of `weights`; None for zero. At least one of the two must be given.
        indices, weights: (S, k), the results of `admixture`. An index outside 0..M-1 contributes nothing.
        bank, candidates: the arguments of `admixture`.
        num_candidates: M.
        need_logits, need_bank: which gradients to compute.

    Returns:
        grad_logits: (S, M), the bank's dtype, zero where a logit was not selected; shape (0,) if not needed.
        grad_bank: (h, b), the bank's dtype, summed in float32 (float64 for a float64 bank) and rounded once; shape (0,) if not
            needed.

    Raises:
        ValueError: a shape, a dtype or a device is invalid.
    """
    check_admixture_backward(
        grad_subvectors, grad_weights, indices, weights, bank, candidates, num_candidates, require=_require
    )
    dtype = accumulation_dtype(bank.dtype)
    num_rows, k = indices.shape
    num_vectors, length = bank.shape
    column_exists = (indices >= 0) & (indices < num_candidates)
    columns = torch.where(column_exists, indices, 0).long()
    vectors = columns if candidates is None else candidates.long().gather(1, columns)
    vectors, vector_exists = _vectors_that_exist(torch.where(column_exists, vectors, -1), num_vectors)

    grad_w = torch.zeros_like(weights) if grad_weights is None else grad_weights.clone()
    grad_bank = bank.new_zeros(num_vectors + 1, length, dtype=dtype)  # the last row collects what belongs to no vector
    if grad_subvectors is not None:
        grad = grad_subvectors.to(dtype)
        table = _with_a_zero_row(bank.to(dtype))
        for j in range(k):
            products = (grad * table[vectors[:, j]]).sum(1)
            grad_w[:, j] += torch.where(vector_exists[:, j], products, 0)
            grad_bank.index_add_(0, vectors[:, j], weights[:, j, None] * grad)

    grad_selected = weights * (grad_w - (weights * grad_w).sum(1, keepdim=True))
    grad_logits = bank.new_zeros(num_rows, num_candidates, dtype=dtype)
    grad_logits.scatter_add_(1, columns, torch.where(column_exists, grad_selected, 0))
    return (
        grad_logits.to(bank.dtype) if need_logits else bank.new_empty(0),
        grad_bank[:num_vectors].to(bank.dtype) if need_bank else bank.new_empty(0),
    )


def compose(bank: Tensor, indices: Tensor, weights: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """The sub-vectors of a deployed adapter: the sum of eq. 3.3 for given bank indices and weights.

    Args:
        bank: (h, b), float32, float64, bfloat16 or float16.
        indices: (S, k), uint8, int16, int32 or int64: bank vectors. An index outside 0..h-1 contributes nothing.
        weights: (S, k), float32 (float64 for a float64 bank).
        out_dtype: float32, float64, bfloat16 or float16; None for the bank's dtype.

    Returns:
        subvectors: (S, b), summed like those of `admixture`.

    Raises:
        ValueError: a shape, a dtype or a device is invalid.
    """
    check_compose(bank, indices, weights, out_dtype, require=_require)
    return _mix(bank, indices.long(), weights).to(out_dtype or bank.dtype)


def add_updates_(y: Tensor, x: Tensor, A: Tensor, B: Tensor, adapters: Tensor | None = None) -> None:
    """Adds low-rank updates to a layer's output in place, `y += (x A^T) B`, with the factors of each row's adapter.

    For inference: nothing is recorded for autograd.

    Args:
        y: (..., out), float32, float64, bfloat16 or float16. Each element is summed in float32 (float64 for float64) and rounded
            once.
        x: (..., in), the shape of `y` but for the last dimension. It must not share memory with `y`.
        A, B: (adapters, rank, in) and (adapters, rank, out), rank <= 4096. Without `adapters`: (rank, in) and (rank, out), the
            factors of all rows.
        adapters: (n,), int64: the adapter of each row. The positions of `y`, all its dimensions but the last, are n rows one
            after the other. A row whose index is outside 0..adapters-1 keeps its bits; -1 is meant for that.

    Raises:
        ValueError: a shape, a dtype or a device is invalid.
    """
    check_add_updates(y, x, A, B, adapters, require=_require)
    dtype = accumulation_dtype(y.dtype)
    if adapters is None:
        A, B, adapters = A[None], B[None], torch.zeros(1, dtype=torch.int64)
    of_row = (len(adapters), math.prod(y.shape[:-1]) // max(len(adapters), 1))
    rows, inputs = y.reshape(*of_row, y.shape[-1]).clone(), x.reshape(*of_row, x.shape[-1])
    for row, adapter in enumerate(adapters.tolist()):
        if 0 <= adapter < len(A):
            hidden = inputs[row].to(dtype) @ A[adapter].to(dtype).T
            rows[row] = rows[row].to(dtype) + hidden @ B[adapter].to(dtype)
    y.copy_(rows.view(y.shape))


def draw_logits_(logits: Tensor, candidates: Tensor | None, num_vectors: int, seed: int, std: float) -> None:
    """Draws an adapter's initial logits in place: normal numbers that depend only on the seed, the row and the bank vector.

    Each number is `standard_normal` of its word (`draw_words`) times `std`, rounded to the 24 bits of float32 and then to the
    logits' dtype. With candidates, only the M largest numbers of a row are kept, so `admixture` selects the same vectors as among
    all h. (This function holds all h numbers; the operator does not.)

    Args:
        logits: (S, M), float32, float64, bfloat16 or float16; overwritten. Without candidates M = h, in the order of the bank;
            with candidates in descending order.
        candidates: (S, M), int16 (for h <= 32768) or int32; overwritten with the bank vector of each logit. Ties between words
            go to the lowest bank vector.
        num_vectors: h >= M.
        seed: signed 64-bit integer.
        std: standard deviation; finite and not negative.

    Raises:
        ValueError: a shape, a dtype, a device or a value is invalid.
    """
    check_draw_logits(logits, candidates, num_vectors, std, require=_require)
    num_rows, num_columns = logits.shape
    words = draw_words(num_rows, num_vectors, seed)
    if candidates is not None:
        words, order = words.sort(dim=1, descending=True, stable=True)
        words = words[:, :num_columns]
        candidates.copy_(order[:, :num_columns])
    logits.copy_(_round_to_24_bits(standard_normal(words) * std).to(accumulation_dtype(logits.dtype)))


def draw_uniform_(values: Tensor, seed: int, stream: int, bound: float) -> None:
    """Draws uniform numbers in [-bound, bound) in place; each depends only on the seed, the stream, the row and the column.

    Each number is `bound * (w - 2^23) / 2^23` in float64, where w is the upper 24 bits of its word (`draw_words`), rounded to the
    24 bits of float32 and then to the tensor's dtype, which may round up to `bound`.

    Args:
        values: (rows, columns), float32, float64, bfloat16 or float16; overwritten.
        seed: signed 64-bit integer.
        stream: 0 to 2^32 - 1; streams of one seed are independent. Logits use 0, VeRA's A and B use 1 and 2.
        bound: finite and not negative.

    Raises:
        ValueError: a shape, a dtype, a device or a value is invalid.
    """
    check_draw_uniform(values, stream, bound, require=_require)
    num_rows, num_columns = values.shape
    steps = (draw_words(num_rows, num_columns, seed, stream) >> 8) - 2**23
    values.copy_(_round_to_24_bits(steps.double() * 2.0**-23 * bound).to(accumulation_dtype(values.dtype)))


def draw_words(num_rows: int, num_columns: int, seed: int, stream: int = 0) -> Tensor:
    """(rows, columns), int64: a random 32-bit word per element. Four neighbouring columns share the counter
    `(column // 4, row % 2^32, row // 2^32, stream)`; each takes the word at `column % 4`."""
    quarters = torch.arange(-(-num_columns // 4))
    rows = torch.arange(num_rows)[:, None]
    counter = torch.broadcast_tensors(quarters, rows & _LOW, rows >> 32, torch.tensor(stream))
    return philox(seed, torch.stack(counter, dim=-1)).flatten(1)[:, :num_columns]


def philox(key: int, counter: Tensor) -> Tensor:
    """Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011).

    Args:
        key: 64 bits, signed or unsigned; the lower half is the first word of the key.
        counter: (..., 4), int64: 32-bit words.

    Returns:
        (..., 4), int64: 32-bit words.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key & _LOW, key >> 32 & _LOW
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return torch.stack((c0, c1, c2, c3), dim=-1)


def standard_normal(words: Tensor) -> Tensor:
    """The quantile of the standard normal distribution at `(word + 0.5) / 2^32`, strictly increasing in the word.

    PPND16 of Wichura's AS 241 (Applied Statistics 37, 1988) without its third formula, which is for probabilities below e^-25.
    IEEE 754 defines the rounding of every operation, so the result is defined to the last bit.

    Args:
        words: int64, 0 to 2^32 - 1.

    Returns:
        float64, of the same shape.
    """
    q = (words.double() - 2.0**31 + 0.5) * 2.0**-32  # the probability minus one half, exact
    central = q * _polynomial(_CENTRAL_ABOVE, 0.180625 - q * q) / _polynomial(_CENTRAL_BELOW, 0.180625 - q * q)
    t = torch.sqrt(-_logarithm(0.5 - q.abs())) - 1.6
    tail = _polynomial(_TAIL_ABOVE, t) / _polynomial(_TAIL_BELOW, t)
    return torch.where(q.abs() <= 0.425, central, torch.where(q < 0, -tail, tail))


_LOW = 2**32 - 1
_CENTRAL_ABOVE = (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
                  1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080)  # fmt: skip
_CENTRAL_BELOW = (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
                  5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0)  # fmt: skip
_TAIL_ABOVE = (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258,
               3.64784832476320460504, 5.76949722146069140550, 4.63033784615654529590, 1.42343711074968357734)  # fmt: skip
_TAIL_BELOW = (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
               6.89767334985100004550e-1, 1.67638483018380384940, 2.05319162663775882187, 1.0)  # fmt: skip
_ARTANH = tuple(2.0 / n for n in range(19, 0, -2))  # of 2 artanh(s) / s in s^2


def _product(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """The high and low 32-bit words of a product, computed in steps that fit in 63 bits."""
    upper, lower = constant * (word >> 16), constant * (word & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _LOW


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Coefficients of the highest power first. Multiplications and additions are separate, never fused."""
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _logarithm(x: Tensor) -> Tensor:
    """ln x = e ln 2 + 2 artanh((m - 1) / (m + 1)) for x = 2^e m, m in [sqrt(1/2), sqrt(2)); x is normal and positive."""
    sqrt_half = 0x3FE6A09E667F3BCD
    bits = x.view(torch.int64) + (0x3FF0000000000000 - sqrt_half)
    exponent = ((bits >> 52) - 1023).double()
    m = ((bits & (2**52 - 1)) + sqrt_half).view(torch.float64)
    s = (m - 1.0) / (m + 1.0)
    return exponent * math.log(2) + s * _polynomial(_ARTANH, s * s)


def _round_to_24_bits(x: Tensor) -> Tensor:
    """Rounds float64 to the precision of float32, to nearest even, but keeps float64's range."""
    bits = x.view(torch.int64)
    return ((bits + 0x0FFFFFFF + (bits >> 29 & 1)) & ~0x1FFFFFFF).view(torch.float64)


def _best_columns(logits: Tensor, candidates: Tensor | None, k: int) -> Tensor:
    """(S, k): the columns of each row's k largest logits, best first."""
    # Two stable sorts, by vector and then by logit: equal logits stay in the order of their vectors, and equal vectors in the
    # order of their columns. A descending sort puts NaN first and treats -0.0 and 0.0 as equal.
    if candidates is None:
        by_vector = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape)
    else:
        by_vector = candidates.sort(dim=1, stable=True).indices
    by_logit = logits.detach().gather(1, by_vector).sort(dim=1, descending=True, stable=True).indices
    return by_vector.gather(1, by_logit[:, :k])


def _mix(bank: Tensor, vectors: Tensor, weights: Tensor) -> Tensor:
    """(S, b): the weighted sum of each row's bank vectors in the weights' dtype, summed in the order of the columns."""
    vectors, exists = _vectors_that_exist(vectors, len(bank))
    weights = torch.where(exists, weights, 0)
    table = _with_a_zero_row(bank.to(weights.dtype))
    subvectors = table.new_zeros(len(vectors), bank.shape[1])
    for j in range(vectors.shape[1]):
        subvectors = subvectors + weights[:, j, None] * table[vectors[:, j]]
    return subvectors


def _vectors_that_exist(vectors: Tensor, num_vectors: int) -> tuple[Tensor, Tensor]:
    """Replaces indices outside 0..h-1 by h; also returns the mask of those inside."""
    exists = (vectors >= 0) & (vectors < num_vectors)
    return torch.where(exists, vectors, num_vectors), exists


def _with_a_zero_row(table: Tensor) -> Tensor:
    return torch.cat([table, table.new_zeros(1, table.shape[1])])
