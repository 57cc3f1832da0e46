"""Atomic writes, and safetensors files."""

import codecs
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

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

_LOCK_TRIALS = 100  # a second; files are renamed in a moment


def refuse_lfs_pointer(path: Path) -> None:
    """Raises ValueError if a file is what Git leaves in place of a large file that it has not downloaded."""
    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(
                f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull` in its repository to download it."
            )


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def byte_order_mark(start: bytes) -> str | None:
    """The encoding whose byte-order mark a text starts with, such as ``"UTF-16"``; None without a mark."""
    return next((encoding for mark, encoding in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), None)


@contextmanager
def atomic_replacement(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write; on exit, syncs the file and renames it to ``path``.

    If the process dies or the block raises, the old file stays.
    """
    temporary = _temporary(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)  # makes the new name durable


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill; on exit, renames it to ``path``, which must not exist or be empty.

    If the block raises, nothing of it stays.
    """
    path = path.resolve()  # Path(".") has no name, and a link cannot be replaced by a folder
    temporary = _temporary(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, path)  # replaces an empty folder
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)  # makes the new name durable


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def is_failed_file(error: Exception) -> bool:
    """Whether an error is that of a file which cannot be read or written, such as on a full disk, whoever raises it."""
    if isinstance(error, SafetensorError):
        return "I/O error" in str(error)
    if isinstance(error, RuntimeError):  # torch.save's
        return "inline_container" in str(error) or "PytorchStreamWriter" in str(error)
    return isinstance(error, OSError)


def refuse_unwritable(folder: Path) -> None:
    """Raises OSError if no file can be made in a folder. Permissions do not tell: some file systems ignore them."""
    with tempfile.TemporaryFile(dir=folder):
        pass


def sync(path: Path) -> None:
    """Waits until a file, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file atomically."""
    write_files({path: data})


def to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file. Equal content gives equal bytes."""
    data = to_safetensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    if metadata is None or len(metadata) < 2:
        return data
    # The package writes the keys of `metadata` in a random order.
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start]) | {"__metadata__": dict(sorted(metadata.items()))}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return data[:8] + text.ljust(start - 8) + data[start:]


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically."""
    write_file(path, to_bytes(tensors, metadata))


def write_files(files: dict[Path, bytes], describing: Collection[Path] = ()) -> None:
    """Writes several files. They are renamed, one after the other, once all are on disk: a full one leaves the old files.

    Of several processes that write the same files at once, all files of the last one stay.

    Args:
        describing: those of ``files`` that tell what is in the others. An old one that tells something else is removed before
            the first is renamed: if the process dies then, one is missing, and no old one is read with new files.
    """
    temporaries = {_temporary(path): path for path in files}
    try:
        for temporary, path in temporaries.items():
            with open(temporary, "xb") as file:
                file.write(files[path])
            sync(temporary)
        with locked({path.parent for path in files}):
            for path in describing:
                if path.is_file() and path.read_bytes() != files[path]:
                    path.unlink()
                    sync(path.parent)
            for temporary, path in temporaries.items():
                os.replace(temporary, path)
    except BaseException:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        raise
    for folder in {path.parent for path in files}:
        sync(folder)  # makes the new names durable


@contextmanager
def locked(folders: set[Path], shared: bool = False) -> Iterator[None]:
    """Keeps other processes from renaming files in the folders with :func:`write_files`.

    Args:
        shared: several readers may be in a folder at once.
    """
    with ExitStack() as stack:
        for folder in sorted(folders):
            with suppress(OSError):  # a folder that cannot be listed, or a network file system without locks
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)  # which unlocks it
                _lock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


def _lock(descriptor: int, kind: int) -> None:
    """Waits for a lock, but not for ever: somebody may hold one on the folder during all of a training."""
    for _ in range(_LOCK_TRIALS):
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return
        time.sleep(0.01)


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file at any path, also one that is not UTF-8. Its tensors are maps of the file: clone what you keep.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or a Git LFS pointer.
    """
    with _opened(path) as (_, tensors):
        yield tensors


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    refuse_lfs_pointer(path)
    try:
        with open(path, "rb") as file, safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt") as tensors:
            yield file, tensors
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}.") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, in memory: writing over the file changes nothing.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or a Git LFS pointer.
    """
    with open_tensors(path) as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)


def read_tensors_and_bytes(path: Path) -> tuple[dict[str, Tensor], bytes]:
    """The tensors of a safetensors file, and its bytes, of the same file if another process replaces it meanwhile.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or a Git LFS pointer.
    """
    with _opened(path) as (file, tensors):
        return {name: tensors.get_tensor(name).clone() for name in tensors.keys()}, file.read()  # noqa: SIM118
