"""What an adapter's state dict tells beside its tensors, as integers."""

import hashlib
import itertools
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Target


def as_integer(value: float) -> int:
    """The bits of a float64, as a signed integer."""
    number: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return number


def as_float(bits: int) -> float:
    """What :func:`as_integer` was given."""
    value: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return value


def layout_hash(targets: "Sequence[Target]", r: int) -> int:
    """A number for what an adapter's tensors are of: the rank, and the layers by their sizes and names. What the names begin
    with in common does not count, because it depends on which module was injected."""
    parts = [target.name.split(".") for target in targets]
    columns = zip(*(names[:-1] for names in parts), strict=False)
    common = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns)))
    layers = [
        (names[common:], target.kind, target.in_features, target.out_features)
        for names, target in zip(parts, targets, strict=True)
    ]
    return int.from_bytes(hashlib.sha256(repr((r, layers)).encode()).digest()[:8], signed=True)
