"""Atomic writes, and safetensors files."""

import codecs
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark starts with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    codecs.BOM_UTF8: "UTF-8",
}


def refuse_lfs_pointer(path: Path) -> None:
    """Raises ValueError if a file is what Git leaves in place of a large file that it has not downloaded."""
    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(
                f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull` in its repository to download it."
            )


def byte_order_mark(start: bytes) -> str | None:
    """The encoding whose byte-order mark a text starts with, such as ``"UTF-16"``; None without a mark."""
    return next((encoding for mark, encoding in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), None)


@contextmanager
def atomic_replacement(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write; on exit, syncs the file and renames it to ``path``.

    If the process dies or the block raises, the old file stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)  # makes the new name durable


def sync(path: Path) -> None:
    """Waits until a file, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file atomically."""
    with atomic_replacement(path) as temporary, open(temporary, "xb") as file:
        file.write(data)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically. Equal content gives equal bytes if ``metadata`` has at most one key."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_file(path, to_safetensors(tensors, metadata))


def read_tensors(
    path: Path, wanted: Callable[[str], bool] = lambda _name: True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors that ``wanted`` selects by name, and the metadata, of a safetensors file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or a Git LFS pointer.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    refuse_lfs_pointer(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if wanted(name)]  # noqa: SIM118 (not a dict)
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}.") from None
