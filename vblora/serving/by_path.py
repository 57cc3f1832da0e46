"""Adapters by path, for an engine such as vLLM: its front end sends its workers a path, and they read the adapter."""

import hashlib
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..adapters import Target
from ..bank import VectorBank
from ..checkpoint import folder, native
from ..checkpoint.contents import is_finite
from ..checkpoint.json_objects import read_object
from ..checkpoint.peft.lora import factor_tensors
from ..errors import VBLoRAWarning
from ..files import open_tensors
from .packed import PackedAdapter, Reader

_VERSIONED = re.compile(r"(.+)@([0-9a-f]{16})")
_OTHER_PEFT_TYPES = ("VBLORA", "VERA")  # PEFT's adapters that engines do not read


class AdaptersByPath:
    """Adapters that are read once, and then held packed.

    A path is that of a folder, or ``FOLDER@VERSION``, which is what :meth:`resolve` returns. The version is a hash of the files,
    so such a path always means the same adapter. An engine that evicts an adapter asks for its path again, and gets the adapter
    that it had, even if the folder has changed or is gone by then.

    Args:
        banks: the vector banks that folders name by their file's hash.
        max_rank: a larger rank is refused.
        capacity_bytes: bytes of packed adapters that are held, without what they share. The least recently used make room, and
            are read again when they are asked for.
    """

    def __init__(self, banks: list[VectorBank], *, max_rank: int, capacity_bytes: int) -> None:
        self._reader = Reader(None, None, banks, max_rank, torch.device("cpu"), exact=False)
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[str, PackedAdapter] = OrderedDict()  # the most recently used last
        self._bytes = 0

    def resolve(self, directory: Path, name: str, layers: Mapping[str, Target] | None = None) -> str | None:
        """The path of a sound adapter in a directory. None: there is no folder of that name.

        Args:
            layers: the layers of the model, by name. None: whether the adapter fits is not checked.

        Raises:
            FileNotFoundError, ValueError: the adapter cannot be served. The message says why.
        """
        path = folder.folder_in(directory, name)
        if path is None:
            return None
        version = _version(path)
        adapter = self._read_version(path, version)
        _check_fit(adapter.targets, layers)
        lora_tensors(adapter, torch.float32)
        return f"{path.absolute()}@{version}"

    def read(self, path: str) -> PackedAdapter | None:
        """The adapter of a path, which is then held. None: engines read what is there themselves, such as a LoRA of PEFT's.

        Raises:
            FileNotFoundError, ValueError: it cannot be read.
        """
        with self._lock:
            held = self._held.get(path)
            adapter = self._of_version(path, held) if _VERSIONED.fullmatch(path) else self._of_folder(Path(path), held)
            self._forget(path)
            if adapter is not None:
                self._held[path] = adapter
                self._bytes += adapter.nbytes
            while self._bytes > self._capacity_bytes and len(self._held) > 1:
                self._forget(next(iter(self._held)))
            return adapter

    def held(self, path: str) -> PackedAdapter | None:
        """What :meth:`read` has returned, if it is still held."""
        with self._lock:
            return self._held.get(path)

    def _of_version(self, path: str, held: PackedAdapter | None) -> PackedAdapter:
        if held is not None:
            return held
        directory, _, version = path.rpartition("@")
        return self._read_version(Path(directory), version)

    def _read_version(self, directory: Path, version: str) -> PackedAdapter:
        """The adapter of a folder whose files have this hash before and after they are read."""
        unchanged = _version(directory) == version
        adapter = self._reader.read(directory)
        if not unchanged or _version(directory) != version:
            raise ValueError(
                f"{directory} has changed since its name was resolved. Unload the adapter in the engine, then name it again."
            )
        return adapter

    def _of_folder(self, path: Path, held: PackedAdapter | None) -> PackedAdapter | None:
        """The adapter of a folder that the user named, and may have changed."""
        if not (path / folder.TENSORS_FILE).is_file():
            return held
        try:
            return self._reader.read(path) if _is_ours(path) else None
        except (OSError, ValueError) as error:
            if held is None:
                raise
            warnings.warn(
                f"{path} cannot be read any more, so the adapter that was read before is served: {error}", VBLoRAWarning
            )
            return held

    def _forget(self, path: str) -> None:
        adapter = self._held.pop(path, None)
        self._bytes -= 0 if adapter is None else adapter.nbytes


def lora_tensors(adapter: PackedAdapter, dtype: torch.dtype) -> dict[str, Tensor]:
    """The adapter as PEFT's files of LoRA have it: tensors by name, which need a ``lora_alpha`` equal to the rank.

    Raises:
        ValueError: a layer is neither linear nor an embedding, or an update is not finite in ``dtype``.
    """
    for target in adapter.targets:
        if target.kind not in ("linear", "embedding"):
            raise ValueError(f"its layer `{target.name}` is a {target.kind}, which engines do not adapt.")
    tensors = {name: tensor.to(dtype) for name, tensor in factor_tensors(adapter.factors(torch.float32)).items()}
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(f"its `{name}` is not finite in {dtype}.")
    return tensors


def _check_fit(targets: tuple[Target, ...], layers: Mapping[str, Target] | None) -> None:
    """Refuses what engines accept in silence: they ignore unknown layers, and copy narrower factors into a part of a layer's."""
    if layers is None:
        return
    for target in targets:
        own = layers.get(target.name)
        if own is None:
            raise ValueError(f"it adapts `{target.name}`, which the model does not have.")
        if own != target:
            there, here = (f"{one.kind} {one.in_features} -> {one.out_features}" for one in (target, own))
            raise ValueError(f"it adapts `{target.name}`, which is {there} there, but {here} in the model.")


def _is_ours(path: Path) -> bool:
    """Whether a folder's adapter is in a format that engines do not read themselves."""
    with open_tensors(path / folder.TENSORS_FILE) as file:
        if native.METADATA in (file.metadata() or {}):
            return True
    try:
        return read_object(path / folder.CONFIG_FILE).get("peft_type") in _OTHER_PEFT_TYPES
    except FileNotFoundError:
        return False


def _version(path: Path) -> str:
    digest = hashlib.sha256()
    for name in (folder.TENSORS_FILE, folder.CONFIG_FILE):
        file = path / name
        digest.update(hashlib.sha256(file.read_bytes() if file.is_file() else b"").digest())
    return digest.hexdigest()[:16]
