"""The operators of `torch.ops.vblora` in plain PyTorch: the definition of what they compute, written to be read.

Each function takes what its operator takes and returns what it returns; `admixture` is differentiable by autograd. Nothing
here is fast. The tests hold every backend against this module, in float64, so it is also where to look a rule up.

Symbols, as everywhere: a sub-vector is one row; S rows, M logits a row, k of them mixed, a bank of h vectors of length b.
"""

from __future__ import annotations

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
