"""The vector bank: what all adapted layers of a model are mixed from."""

import torch
from torch import nn


class VectorBank(nn.Module):
    """A bank of ``num_vectors`` (h) trainable vectors of ``vector_length`` (b) elements (VB-LoRA, arXiv 2405.15179, §3.2).

    Args:
        num_vectors: h, vectors in the bank.
        vector_length: b, elements of a vector.
        init_bound: vectors start uniform in ``[-init_bound, init_bound]``. Not zero: a bank of zeros has no gradient.
        device, dtype: of the parameter, as in ``torch.nn.Linear``.

    Attributes:
        vectors: ``(h, b)`` parameter.

    Raises:
        TypeError: a size that is no integer.
        ValueError: a size below 1, or an ``init_bound`` that is not above 0.
    """

    def __init__(
        self,
        num_vectors: int,
        vector_length: int,
        init_bound: float = 0.02,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_count("num_vectors", num_vectors)
        check_count("vector_length", vector_length)
        if not init_bound > 0:
            raise ValueError(f"`init_bound` is {init_bound}, but must be above 0: a bank of zeros gets no gradient.")
        self.init_bound = init_bound
        self.vectors = nn.Parameter(torch.empty(num_vectors, vector_length, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def num_vectors(self) -> int:
        return self.vectors.shape[0]

    @property
    def vector_length(self) -> int:
        return self.vectors.shape[1]

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.vectors, -self.init_bound, self.init_bound)

    def extra_repr(self) -> str:
        return f"num_vectors={self.num_vectors}, vector_length={self.vector_length}"


def check_count(name: str, value: int) -> None:
    """Refuses anything but a positive integer, by name."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r}, but must be an integer.")
    if value < 1:
        raise ValueError(f"`{name}` is {value}, but must be at least 1.")
