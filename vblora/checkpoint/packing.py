"""Packing: rows as the part that training changed, and small integers as bits."""

import torch
from torch import Tensor

_ROWS = 4096  # at a time, so that temporary tensors stay small


def pack_prefixes(values: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Packs ``values`` ``(S, M)`` so that they can be restored bit for bit: each row up to its last element that has changed.

    Args:
        values: of any floating-point dtype.
        initial: the values before the changes, ``(S, M)``; None means zeros.

    Returns:
        The length of each row's part ``(S,)``, int16 or (for large M) int32; and the parts, one after the other.
    """
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize]
    small = torch.int16 if values.shape[1] < 2**15 else torch.int32
    places = torch.arange(1, values.shape[1] + 1, dtype=small, device=values.device)
    lengths, parts = [], []
    for start in range(0, len(values), _ROWS):
        rows = values[start : start + _ROWS].contiguous()
        was = torch.zeros_like(rows) if initial is None else initial[start : start + _ROWS].contiguous()
        touched = rows.view(bits) != was.view(bits)
        length = (touched * places).amax(1) if values.shape[1] else rows.new_zeros(len(rows), dtype=small)
        lengths.append(length)
        parts.append(rows[places <= length[:, None]])
    if not lengths:
        return values.new_zeros(0, dtype=small), values.new_zeros(0)
    return torch.cat(lengths), torch.cat(parts)


def unpack_prefixes(lengths: Tensor, values: Tensor, initial: Tensor) -> Tensor:
    """The values ``(S, M)`` that :func:`pack_prefixes` packed. Overwrites ``initial`` and returns it.

    Raises:
        ValueError: ``lengths`` do not fit ``initial`` or ``values``.
    """
    rows, columns = initial.shape
    if lengths.shape != (rows,) or lengths.is_floating_point():
        raise ValueError(f"the lengths are {lengths.dtype} {tuple(lengths.shape)}, but must be {rows} integers.")
    lengths = lengths.long()
    if rows and not 0 <= int(lengths.min()) <= int(lengths.max()) <= columns:
        raise ValueError(f"a row of {columns} has a length of {int(lengths.min())} or {int(lengths.max())}.")
    if values.shape != (int(lengths.sum()),) or values.dtype != initial.dtype:
        raise ValueError(
            f"the values are {values.dtype} {tuple(values.shape)}, but must be {int(lengths.sum())} of {initial.dtype}."
        )
    places = torch.arange(columns, device=initial.device)
    for start, (length, part) in enumerate(
        zip(lengths.split(_ROWS), values.split([int(part.sum()) for part in lengths.split(_ROWS)]), strict=True)
    ):
        initial[start * _ROWS : (start + 1) * _ROWS][places < length[:, None]] = part
    return initial


def pack_bits(integers: Tensor, bits: int) -> Tensor:
    """Integers from 0 to 2^bits - 1 as bytes, uint8: ``bits`` bits each, low bits first. Zeros fill the last byte."""
    single = integers.flatten().long()[:, None] >> torch.arange(bits, device=integers.device) & 1
    single = torch.nn.functional.pad(single.flatten(), (0, -single.numel() % 8))
    return (single.view(-1, 8) << torch.arange(8, device=integers.device)).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The ``count`` integers, int64, that :func:`pack_bits` packed.

    Raises:
        ValueError: ``packed`` holds more or fewer bytes than they need.
    """
    if packed.dtype != torch.uint8 or packed.shape != (-(-count * bits // 8),):
        must = f"torch.uint8 ({-(-count * bits // 8)},)"
        raise ValueError(
            f"{count} integers of {bits} bits are {packed.dtype} {tuple(packed.shape)}, but must be {must}."
        )
    single = (packed.long()[:, None] >> torch.arange(8, device=packed.device) & 1).flatten()[: count * bits]
    return (single.view(count, bits) << torch.arange(bits, device=packed.device)).sum(1)
