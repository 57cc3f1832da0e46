"""The operators of `torch.ops.vblora` in plain PyTorch: the definition of what they compute, written to be read.

Each function takes what its operator takes and returns what it returns; `admixture` is differentiable by autograd. Nothing
here is fast. The tests hold every backend against this module, in float64, so it is also where to look a rule up.

Symbols, as everywhere: a sub-vector is one row; S rows, M logits a row, k of them mixed, a bank of h vectors of length b.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CANDIDATE_DTYPES = (torch.int16, torch.int32)
INDEX_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What weights are, and sums run, in: float32, or float64 where the inputs are float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def admixture(
    logits: Tensor, bank: Tensor, candidates: Tensor | None, k: int, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The top-k admixture module of VB-LoRA (arXiv 2405.15179, eq. 3.3): `u = sum_s w_s alpha_s`, `w = softmax(top_k(sigma))`.

    sigma is a row of `logits` and alpha the vectors of `bank`; u is a sub-vector, which eq. 3.1 and 3.2 join into the rows
    of a LoRA pair.

    Args:
        logits: (S, M), float32, float64, bfloat16 or float16.
        bank: (h, b), of the same dtype.
        candidates: (S, M), int16 or int32: the bank vector that each logit stands for; more than one may stand for the same.
            None, where M = h: column j stands for vector j. One outside 0..h-1 is selected like any other, but adds nothing.
        k: how many logits of a row are mixed, 1 <= k <= M.
        out_dtype: of `subvectors`, any of the four; the bank's if None.

    Returns:
        subvectors: (S, b). Summed in float32 (float64 for float64 inputs) from the best logit to the least, rounded once.
        indices: (S, k), int32: columns of `logits`, the largest logit first. A NaN counts as largest. Among equal logits
            the lowest bank vector comes first, and for the same vector the lowest column.
        weights: (S, k), float32 (float64 for float64 inputs): the softmax of the selected logits. A logit of -inf has weight 0;
            NaN, +inf, and nothing but -inf among the selected make the row NaN.

    Raises:
        ValueError: a shape, a dtype or k is not as above; the message names the argument.
    """
    _check_matrix("logits", logits, FLOAT_DTYPES)
    _check_matrix("bank", bank, (logits.dtype,))
    num_columns = logits.shape[1]
    if candidates is None:
        _require(num_columns == len(bank), f"logits must have a column for each of the bank's {len(bank)} vectors when there "
                 f"are no candidates, got {num_columns}")  # fmt: skip
    else:
        _check_matrix("candidates", candidates, CANDIDATE_DTYPES, tuple(logits.shape))
    _require(1 <= k <= num_columns, f"k must be between 1 and the {num_columns} columns of logits, got {k}")
    _check_out_dtype(out_dtype)

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
    """The gradients of `admixture`, from what it returned.

    With v_j the bank vector of a row's j-th selected logit, and g, gw the row's incoming gradients:
    `d_j = <g, v_j> + gw_j`, the gradient of that logit is `w_j (d_j - sum_i w_i d_i)`, and v_j is owed `w_j g`.

    Args:
        grad_subvectors: (S, b), any of the four float dtypes; None for zero.
        grad_weights: (S, k), of the weights' dtype; None for zero, but not both.
        indices, weights: (S, k), as `admixture` returned them. An index outside 0..M-1 has no vector and gets no gradient.
        bank, candidates: as `admixture` was given them.
        num_candidates: M.
        need_logits, need_bank: which gradients to compute.

    Returns:
        grad_logits: (S, M), of the bank's dtype, zero where a logit was not selected; empty, of shape (0,), if not needed.
        grad_bank: (h, b), of the bank's dtype: all that a vector is owed, summed in float32 (float64) and rounded once; empty,
            of shape (0,), if not needed.

    Raises:
        ValueError: a shape or a dtype is not as above; the message names the argument.
    """
    _check_matrix("bank", bank, FLOAT_DTYPES)
    dtype = accumulation_dtype(bank.dtype)
    _check_matrix("indices", indices, (torch.int32,))
    _check_matrix("weights", weights, (dtype,), tuple(indices.shape))
    num_rows, k = indices.shape
    num_vectors, length = bank.shape
    _require(
        grad_subvectors is not None or grad_weights is not None, "grad_subvectors and grad_weights cannot both be None"
    )
    if grad_subvectors is not None:
        _check_matrix("grad_subvectors", grad_subvectors, FLOAT_DTYPES, (num_rows, length))
    if grad_weights is not None:
        _check_matrix("grad_weights", grad_weights, (dtype,), (num_rows, k))
    if candidates is None:
        _require(num_candidates == num_vectors, f"num_candidates must be the bank's {num_vectors} vectors when there are no "
                 f"candidates, got {num_candidates}")  # fmt: skip
    else:
        _check_matrix("candidates", candidates, CANDIDATE_DTYPES, (num_rows, num_candidates))

    column_exists = (indices >= 0) & (indices < num_candidates)
    columns = torch.where(column_exists, indices, 0).long()
    vectors = columns if candidates is None else candidates.long().gather(1, columns)
    vectors, vector_exists = _vectors_that_exist(torch.where(column_exists, vectors, -1), num_vectors)

    grad_w = torch.zeros_like(weights) if grad_weights is None else grad_weights.clone()
    grad_bank = bank.new_zeros(num_vectors + 1, length, dtype=dtype)  # the last row takes what is owed to no vector
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
    """The sub-vectors of an adapter that keeps only what was selected: the sum of eq. 3.3, without the choice.

    Args:
        bank: (h, b), float32, float64, bfloat16 or float16.
        indices: (S, k), uint8, int16, int32 or int64: bank vectors. One outside 0..h-1 adds nothing.
        weights: (S, k), float32 (float64 if the bank is).
        out_dtype: any of the four float dtypes; the bank's if None.

    Returns:
        subvectors: (S, b), summed like `admixture`'s. The operator is for inference and has no gradient.

    Raises:
        ValueError: a shape or a dtype is not as above; the message names the argument.
    """
    _check_matrix("bank", bank, FLOAT_DTYPES)
    _check_matrix("indices", indices, INDEX_DTYPES)
    _check_matrix("weights", weights, (accumulation_dtype(bank.dtype),), tuple(indices.shape))
    _check_out_dtype(out_dtype)
    return _mix(bank, indices.long(), weights).to(out_dtype or bank.dtype)


def draw_logits_(logits: Tensor, candidates: Tensor | None, num_vectors: int, seed: int, std: float) -> None:
    """The logits that an adapter begins with: normals, in place, each a function of seed, row and bank vector alone.

    The word of a row and a bank vector is `philox`'s (`draw_words`), its number is `standard_normal` of it times `std`, rounded
    to the 24 bits of float32 and then to the logits' dtype. With candidates only the M largest of a row's h numbers are kept, in
    which `admixture` finds the same best ones as among all h. (All h are held here; the operator does without.)

    Args:
        logits: (S, M), float32, float64, bfloat16 or float16; written to. All numbers of a row without candidates, where
            M = h, in the order of the bank vectors; the M largest in descending order with candidates.
        candidates: (S, M), int16 (for h <= 32768) or int32; written to: the bank vectors that the M numbers belong to. Equal
            words, of which a bank vector's number is an increasing function, go to the lowest bank vector first.
        num_vectors: h >= M.
        seed: any integer of 64 bits, signed.
        std: of the numbers; finite, at least 0.

    Raises:
        ValueError: a shape, a dtype or a value is not as above; the message names the argument.
    """
    _check_matrix("logits", logits, FLOAT_DTYPES)
    num_rows, num_columns = logits.shape
    _require(0 <= num_vectors < 2**31, f"num_vectors must be between 0 and 2^31 - 1, got {num_vectors}")
    if candidates is None:
        _require(num_columns == num_vectors, f"logits must have num_vectors={num_vectors} columns when there are no "
                 f"candidates, got {num_columns}")  # fmt: skip
    else:
        _check_matrix("candidates", candidates, CANDIDATE_DTYPES, tuple(logits.shape))
        _require(
            num_vectors <= torch.iinfo(candidates.dtype).max + 1, f"candidates must be int32 for {num_vectors} vectors"
        )
        _require(
            num_columns <= num_vectors, f"logits must have at most num_vectors={num_vectors} columns, got {num_columns}"
        )
    _require(0 <= std < math.inf, f"std must be finite and not negative, got {std}")

    words = draw_words(num_rows, num_vectors, seed)
    if candidates is not None:
        words, order = words.sort(dim=1, descending=True, stable=True)
        words = words[:, :num_columns]
        candidates.copy_(order[:, :num_columns])
    logits.copy_(_round_to_24_bits(standard_normal(words) * std).to(accumulation_dtype(logits.dtype)))


def draw_uniform_(values: Tensor, seed: int, stream: int, bound: float) -> None:
    """Uniform numbers from -bound up to but not including bound, in place, each a function of seed, stream, row and column alone.

    The leading 24 bits of a place's word (`draw_words`), less 2^23 and over 2^23, are what `bound` is multiplied by, in float64;
    the product is rounded to the 24 bits of float32 and then to the tensor's dtype (which may round up to `bound`).

    Args:
        values: (rows, columns), float32, float64, bfloat16 or float16; written to.
        seed: any integer of 64 bits, signed.
        stream: what it is for, 0 to 2^32 - 1: those of one seed are independent. 0 is for logits, 1 and 2 for VeRA's A and B.
        bound: finite, at least 0.

    Raises:
        ValueError: a shape, a dtype or a value is not as above; the message names the argument.
    """
    _check_matrix("values", values, FLOAT_DTYPES)
    _require(0 <= stream < 2**32, f"stream must be between 0 and 2^32 - 1, got {stream}")
    _require(0 <= bound < math.inf, f"bound must be finite and not negative, got {bound}")
    steps = (draw_words(*values.shape, seed, stream) >> 8) - 2**23
    values.copy_(_round_to_24_bits(steps.double() * 2.0**-23 * bound).to(accumulation_dtype(values.dtype)))


def draw_words(num_rows: int, num_columns: int, seed: int, stream: int = 0) -> Tensor:
    """(rows, columns), int64: the 32-bit word of each place. The counter of four neighbouring columns is
    `(column // 4, row % 2^32, row // 2^32, stream)`; a column's word is the one at `column % 4`."""
    quarters = torch.arange(-(-num_columns // 4))
    rows = torch.arange(num_rows)[:, None]
    counter = torch.broadcast_tensors(quarters, rows & _LOW, rows >> 32, torch.tensor(stream))
    return philox(seed, torch.stack(counter, dim=-1)).flatten(1)[:, :num_columns]


def philox(key: int, counter: Tensor) -> Tensor:
    """Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011).

    Args:
        key: 64 bits, signed or not; the low half is the first word of the key.
        counter: (..., 4), int64: words of 32 bits.

    Returns:
        (..., 4), int64: words of 32 bits.
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

    By PPND16 of Wichura's AS 241 (Applied Statistics 37, 1988), without its third formula, for probabilities below e^-25. Each
    operation is one that IEEE 754 rounds exactly, so that there is one right answer, to the last bit.

    Args:
        words: int64, 0 to 2^32 - 1.

    Returns:
        float64, of the same shape.
    """
    q = (words.double() - 2.0**31 + 0.5) * 2.0**-32  # the probability less one half, exactly
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
    """The two 32-bit words of a product of two, high and low, in steps that fit in 63 bits."""
    upper, lower = constant * (word >> 16), constant * (word & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _LOW


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """The highest power first. No operation that could be fused."""
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _logarithm(x: Tensor) -> Tensor:
    """ln x = e ln 2 + 2 artanh((m - 1) / (m + 1)) of x = 2^e m with m from sqrt(1/2) to sqrt(2); x normal, greater than 0."""
    sqrt_half = 0x3FE6A09E667F3BCD
    bits = x.view(torch.int64) + (0x3FF0000000000000 - sqrt_half)
    exponent = ((bits >> 52) - 1023).double()
    m = ((bits & (2**52 - 1)) + sqrt_half).view(torch.float64)
    s = (m - 1.0) / (m + 1.0)
    return exponent * math.log(2) + s * _polynomial(_ARTANH, s * s)


def _round_to_24_bits(x: Tensor) -> Tensor:
    """float64 to as many bits as float32 has, to nearest even: what a conversion does, but for numbers outside its range."""
    bits = x.view(torch.int64)
    return ((bits + 0x0FFFFFFF + (bits >> 29 & 1)) & ~0x1FFFFFFF).view(torch.float64)


def _best_columns(logits: Tensor, candidates: Tensor | None, k: int) -> Tensor:
    """(S, k): the columns of each row's k largest logits, best first."""
    # Two stable sorts, the less important first: equal logits stay in the order of their bank vectors, and equal vectors in the
    # order of their columns. Sorting in descending order puts NaN first, and takes -0.0 and 0.0 for equal.
    if candidates is None:
        by_vector = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape)
    else:
        by_vector = candidates.sort(dim=1, stable=True).indices
    by_logit = logits.detach().gather(1, by_vector).sort(dim=1, descending=True, stable=True).indices
    return by_vector.gather(1, by_logit[:, :k])


def _mix(bank: Tensor, vectors: Tensor, weights: Tensor) -> Tensor:
    """(S, b): the weighted sum of each row's bank vectors, in the weights' dtype, in the order of the columns."""
    vectors, exists = _vectors_that_exist(vectors, len(bank))
    weights = torch.where(exists, weights, 0)
    table = _with_a_zero_row(bank.to(weights.dtype))
    subvectors = table.new_zeros(len(vectors), bank.shape[1])
    for j in range(vectors.shape[1]):
        subvectors = subvectors + weights[:, j, None] * table[vectors[:, j]]
    return subvectors


def _vectors_that_exist(vectors: Tensor, num_vectors: int) -> tuple[Tensor, Tensor]:
    """Bank vectors with h in the place of those outside 0..h-1, and a mask of those inside."""
    exists = (vectors >= 0) & (vectors < num_vectors)
    return torch.where(exists, vectors, num_vectors), exists


def _with_a_zero_row(table: Tensor) -> Tensor:
    return torch.cat([table, table.new_zeros(1, table.shape[1])])


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_matrix(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None = None
) -> None:
    _require(tensor.dim() == 2, f"{name} must have two dimensions, got shape {tuple(tensor.shape)}")
    _require(
        shape is None or tuple(tensor.shape) == shape, f"{name} must have shape {shape}, got {tuple(tensor.shape)}"
    )
    allowed = " or ".join(str(dtype) for dtype in dtypes)
    _require(tensor.dtype in dtypes, f"{name} must be {allowed}, got {tensor.dtype}")


def _check_out_dtype(out_dtype: torch.dtype | None) -> None:
    _require(
        out_dtype is None or out_dtype in FLOAT_DTYPES, f"out_dtype must be one of {FLOAT_DTYPES}, got {out_dtype}"
    )
