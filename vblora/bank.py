"""The vector bank that all adapted layers of a model share."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .checks import check_count, check_positive
from .distributed import gather_to_cpu
from .errors import listed
from .files import read_tensors, read_tensors_and_bytes, to_bytes, write_file


class BankFile(NamedTuple):
    """The file that a bank was loaded from or saved to."""

    name: str
    sha256: str  # of the file
    content: str  # SHA-256 of the vectors as loaded or saved


class VectorBank(nn.Module):
    """A bank of ``num_vectors`` (h) trainable vectors of length ``vector_length`` (b) (VB-LoRA, arXiv 2405.15179, §3.2).

    Args:
        num_vectors: h, the number of vectors.
        vector_length: b, the length of each vector.
        init_bound: vectors are initialized uniformly in ``[-init_bound, init_bound]``. Must be positive: a bank of zeros gets no
            gradient.
        pairs: initialize vector 2i + 1 to the negative of vector 2i, for adapters with ``init="noop"``.
        device, dtype: device and dtype of the parameter.

    Attributes:
        vectors: ``(h, b)`` parameter.
        file: the file that the bank was loaded from or last saved to, or None. While the bank equals its file, an adapter is
            saved with the file's hash in place of the bank.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is less than 1, ``init_bound`` is not positive, or ``pairs`` is set and ``num_vectors`` is odd.
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
        check_positive("init_bound", init_bound)  # a bank of zeros gets no gradient
        if pairs and num_vectors % 2:
            raise ValueError(f"`num_vectors` is {num_vectors}, but must be even for a bank of pairs.")
        self.init_bound = init_bound
        self.pairs = pairs
        self.file: BankFile | None = None
        self.adapters = 0  # how many were made over it
        self.vectors = nn.Parameter(torch.empty(num_vectors, vector_length, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def num_vectors(self) -> int:
        return self.vectors.shape[0]

    @property
    def vector_length(self) -> int:
        return self.vectors.shape[1]

    def reset_parameters(self) -> None:
        """Draws the vectors again, from torch's generator."""
        nn.init.uniform_(self.vectors, -self.init_bound, self.init_bound)
        if self.pairs:
            with torch.no_grad():
                self.vectors[1::2] = -self.vectors[::2]

    def is_of_pairs(self) -> bool:
        """Whether vector 2i + 1 is the negative of vector 2i for every i."""
        if self.vectors.is_meta:
            return self.pairs
        return self.num_vectors % 2 == 0 and torch.equal(self.vectors[1::2], -self.vectors[::2])

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> str:
        """Saves the bank to a file that several adapters can share; load it with :meth:`from_file`.

        An adapter that is saved afterwards names this file instead of holding the bank, unless the bank was rounded, or has
        changed since.

        Args:
            path: safetensors file, written atomically.
            dtype: round to float32, bfloat16, float16 or int8 (with one scale per vector). None saves the exact values.

        Returns:
            The file's SHA-256, which adapters refer to.

        Raises:
            ValueError: another dtype, or the bank is not finite in it.
        """
        data, file = self.to_file(path, dtype)
        write_file(Path(path), data)
        self.file = file or self.file
        return _sha256(data)

    def to_file(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> tuple[bytes, BankFile | None]:
        """The bytes that :meth:`save` writes, and what adapters store about the file; None if it rounds the bank."""
        tensors = encode_vectors(gather_to_cpu(self.vectors), dtype, "dtype")
        data = to_bytes(tensors)
        if torch.equal(decode_vectors(tensors), gather_to_cpu(self.vectors)) and self.vectors.dtype == torch.float32:
            return data, BankFile(Path(path).name, _sha256(data), self._content())
        return data, None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> "VectorBank":
        """Loads a bank that :meth:`save` wrote, or the bank of an adapter that holds its own, as float32.

        Args:
            path: the bank's file; or the folder of an adapter that :func:`vblora.save` or PEFT wrote, or the tensors' file in
                it. The bank of such a folder counts as the file that :meth:`save` would write for it: other adapters can share
                it while the folder's adapter stays as it is.
            device: device of the bank; by default the CPU.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged or does not hold a bank.
        """
        path = Path(path)
        folder = path if path.is_dir() else path.parent if path.name == _ADAPTER_FILE else None
        if path.is_dir() and not (path / _ADAPTER_FILE).is_file():
            inner = path / "bank.safetensors"  # as `vblora train-bank` writes it
            advice = f"{inner}" if inner.is_file() else "a bank's file, or the folder of an adapter"
            raise FileNotFoundError(f"{path} is a folder without {_ADAPTER_FILE}. Give {advice}.")
        data = b""  # read once: another process may replace the file
        if folder is None:
            tensors, data = read_tensors_and_bytes(path)
        else:
            tensors = _bank_of_adapter(folder, read_tensors(folder / _ADAPTER_FILE)[0])
        try:
            vectors = decode_vectors(tensors)
        except ValueError as error:
            raise ValueError(f"{path} does not hold a vector bank: {error}") from None
        bank = cls(*vectors.shape, device="meta")
        bank.vectors = nn.Parameter(vectors.float().to(device))
        bank.file = BankFile((folder or path).absolute().name, _sha256(data or to_bytes(tensors)), bank._content())
        return bank

    def unchanged(self) -> bool:
        """Whether the bank equals the file that it was loaded from or last saved to."""
        return self.file is not None and self._content() == self.file.content

    def _content(self) -> str:
        vectors = gather_to_cpu(self.vectors).contiguous()
        return _sha256(f"{vectors.dtype} {tuple(vectors.shape)}".encode() + vectors.view(torch.uint8).numpy().tobytes())

    def extra_repr(self) -> str:
        return f"num_vectors={self.num_vectors}, vector_length={self.vector_length}"


def encode_vectors(
    vectors: Tensor, dtype: torch.dtype | None = None, argument: str = "bank_dtype"
) -> dict[str, Tensor]:
    """Encodes a bank as a file's tensors: ``vectors``, and for int8 also float32 ``scales`` ``(h,)``.

    Args:
        argument: the caller's name of ``dtype``, for messages.

    Raises:
        ValueError: the dtype is not supported, or the vectors are not finite in it.
    """
    if not vectors.isfinite().all():
        raise ValueError(
            "the vector bank holds an infinite or NaN element: training diverged. Train again with lower learning rates."
        )
    if dtype is None:
        return {"vectors": vectors}
    if dtype == torch.int8:
        scales = vectors.float().abs().amax(1) / 127
        steps = vectors.float() / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        return {"vectors": steps.round().clamp(-127, 127).to(torch.int8), "scales": scales}
    if dtype not in _DTYPES:
        allowed = ", ".join(map(str, (*_DTYPES, torch.int8)))
        raise ValueError(f"`{argument}` is {dtype}; allowed are {allowed}.")
    rounded = vectors.to(dtype)
    if not rounded.isfinite().all():
        raise ValueError(
            f"`{argument}` is {dtype}, in which the largest element of the bank is infinite; use torch.bfloat16."
        )
    return {"vectors": rounded}


def decode_vectors(tensors: dict[str, Tensor]) -> Tensor:
    """Decodes the result of :func:`encode_vectors`: int8 to float32, other dtypes unchanged.

    Raises:
        ValueError: the tensors do not encode a bank.
    """
    vectors, scales = tensors.get("vectors"), tensors.get("scales")
    if vectors is None or tensors.keys() - {"vectors", "scales"}:
        raise ValueError(f"its tensors are {listed(sorted(tensors))}; allowed are `vectors` and optional `scales`.")
    if vectors.dim() != 2 or 0 in vectors.shape:
        raise ValueError(f"`vectors` has shape {tuple(vectors.shape)}, but must be (h, b).")
    if (vectors.dtype == torch.int8) != (scales is not None):
        raise ValueError(
            f"`vectors` is {vectors.dtype} {'with' if scales is not None else 'without'} `scales`; int8 alone has scales."
        )
    if scales is not None:
        if scales.dtype != torch.float32 or scales.shape != vectors.shape[:1]:
            raise ValueError(f"`scales` is {scales.dtype} {tuple(scales.shape)}, but must be float32 of shape (h,).")
        vectors = vectors.float() * scales[:, None]
    elif vectors.dtype not in (*_DTYPES, torch.float64):
        raise ValueError(f"`vectors` is {vectors.dtype}, but must be a float dtype or torch.int8.")
    if not vectors.isfinite().all():
        raise ValueError("`vectors` holds an infinite or NaN element.")
    return vectors


def _bank_of_adapter(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the bank's own file, of those in an adapter's folder."""
    if _PEFT_BANK in tensors:
        return {"vectors": tensors[_PEFT_BANK]}
    found = {name.removeprefix(_OWN_BANK): tensor for name, tensor in tensors.items() if name.startswith(_OWN_BANK)}
    if not found:
        raise ValueError(
            f"the adapter in {folder} has no vector bank of its own. If it shares one, give that bank's file; other methods "
            "than VB-LoRA have none."
        )
    return found


# The bank in the folder of an adapter, vblora's and PEFT's
_ADAPTER_FILE = "adapter_model.safetensors"
_OWN_BANK = "bank."
_PEFT_BANK = "base_model.vblora_vector_bank"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
