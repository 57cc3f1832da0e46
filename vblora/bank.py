"""The vector bank: what all adapted layers of a model are mixed from."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .checks import check_count
from .distributed import whole
from .files import read_tensors, write_tensors


class BankFile(NamedTuple):
    """The file that a bank was read from."""

    name: str
    sha256: str  # of the file
    content: str  # SHA-256 of the vectors as they came out of it


class VectorBank(nn.Module):
    """A bank of ``num_vectors`` (h) trainable vectors of ``vector_length`` (b) elements (VB-LoRA, arXiv 2405.15179, §3.2).

    Args:
        num_vectors: h, vectors in the bank.
        vector_length: b, elements of a vector.
        init_bound: vectors start uniform in ``[-init_bound, init_bound]``. Not zero: a bank of zeros has no gradient.
        pairs: each vector 2i + 1 starts as the negative of vector 2i, for adapters with ``init="noop"``.
        device, dtype: of the parameter, as in ``torch.nn.Linear``.

    Attributes:
        vectors: ``(h, b)`` parameter.
        file: the file that it was read from, or None. An adapter whose bank is still what that file holds is saved without its
            bank, which is named by its hash.

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
        pairs: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_count("num_vectors", num_vectors)
        check_count("vector_length", vector_length)
        if not init_bound > 0:
            raise ValueError(f"`init_bound` is {init_bound}, but must be above 0: a bank of zeros gets no gradient.")
        if pairs and num_vectors % 2:
            raise ValueError(f"`num_vectors` is {num_vectors}, but must be even for a bank of pairs.")
        self.init_bound = init_bound
        self.pairs = pairs
        self.file: BankFile | None = None
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
        if self.pairs:
            with torch.no_grad():
                self.vectors[1::2] = -self.vectors[::2]

    def is_of_pairs(self) -> bool:
        """Whether each vector 2i + 1 is the negative of vector 2i."""
        if self.vectors.is_meta:
            return self.pairs
        return self.num_vectors % 2 == 0 and torch.equal(self.vectors[1::2], -self.vectors[::2])

    def save(self, path: str | os.PathLike, dtype: torch.dtype | None = None) -> str:
        """Writes the bank into a file of its own, for adapters to share (:meth:`from_file`).

        Args:
            path: of a safetensors file, written under a temporary name and renamed.
            dtype: what its elements are rounded to; ``torch.int8`` has a scale a vector. None keeps them exactly.

        Returns:
            The file's SHA-256, by which adapters name it.
        """
        path = Path(path)
        write_tensors(path, encode_vectors(whole(self.vectors), dtype))
        return _sha256(path.read_bytes())

    @classmethod
    def from_file(cls, path: str | os.PathLike, *, device: torch.device | str | None = None) -> "VectorBank":
        """The bank that :meth:`save` wrote, in float32.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or holds something else.
        """
        path = Path(path)
        tensors, _ = read_tensors(path)
        try:
            vectors = decode_vectors(tensors)
        except ValueError as error:
            raise ValueError(f"{path} is no file of a vector bank: {error}") from None
        bank = cls(*vectors.shape, device="meta")
        bank.vectors = nn.Parameter(vectors.float().to(device))
        bank.file = BankFile(path.name, _sha256(path.read_bytes()), bank._content())
        return bank

    def unchanged(self) -> bool:
        """Whether it is what its file holds."""
        return self.file is not None and self._content() == self.file.content

    def _content(self) -> str:
        vectors = whole(self.vectors).contiguous()
        return _sha256(f"{vectors.dtype} {tuple(vectors.shape)}".encode() + vectors.view(torch.uint8).numpy().tobytes())

    def extra_repr(self) -> str:
        return f"num_vectors={self.num_vectors}, vector_length={self.vector_length}"


def encode_vectors(vectors: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A bank as tensors of a file: ``vectors``, and for int8 the ``scales`` ``(h,)``, in float32.

    Raises:
        ValueError: another ``dtype``, or vectors that are not finite.
    """
    if not vectors.isfinite().all():
        raise ValueError("the vector bank holds an infinite or NaN element.")
    if dtype is None:
        return {"vectors": vectors}
    if dtype == torch.int8:
        scales = vectors.float().abs().amax(1) / 127
        steps = vectors.float() / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        return {"vectors": steps.round().clamp(-127, 127).to(torch.int8), "scales": scales}
    if dtype not in _DTYPES:
        allowed = ", ".join(map(str, (*_DTYPES, torch.int8)))
        raise ValueError(f"`bank_dtype` is {dtype}; allowed are {allowed}.")
    rounded = vectors.to(dtype)
    if not rounded.isfinite().all():
        raise ValueError(f"`bank_dtype` is {dtype}, in which the largest element of the bank is infinite.")
    return {"vectors": rounded}


def decode_vectors(tensors: dict[str, Tensor]) -> Tensor:
    """The vectors of :func:`encode_vectors`; of int8 in float32, others as they are.

    Raises:
        ValueError: these are not such tensors.
    """
    vectors, scales = tensors.get("vectors"), tensors.get("scales")
    if vectors is None or tensors.keys() - {"vectors", "scales"}:
        raise ValueError(f"it holds {', '.join(sorted(tensors)) or 'no tensor'}.")
    if vectors.dim() != 2 or 0 in vectors.shape:
        raise ValueError(f"`vectors` is {tuple(vectors.shape)}, but must be (h, b).")
    if (vectors.dtype == torch.int8) != (scales is not None):
        raise ValueError(f"`vectors` is {vectors.dtype} {'with' if scales is not None else 'without'} `scales`.")
    if scales is not None:
        if scales.dtype != torch.float32 or scales.shape != vectors.shape[:1]:
            raise ValueError(f"`scales` is {scales.dtype} {tuple(scales.shape)}, but must be float32, one a vector.")
        vectors = vectors.float() * scales[:, None]
    elif vectors.dtype not in (*_DTYPES, torch.float64):
        raise ValueError(f"`vectors` is {vectors.dtype}.")
    if not vectors.isfinite().all():
        raise ValueError("`vectors` holds an infinite or NaN element.")
    return vectors


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
