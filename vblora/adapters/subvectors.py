"""How the factors of targets are cut into sub-vectors."""

import math
from collections.abc import Sequence

from torch import Tensor

from ..errors import listed
from .base import Factors, Target

_DEFAULT_LENGTH = 256  # of bank vectors, as in the paper and PEFT


def rows_of_factors(targets: tuple[Target, ...], r: int, vector_length: int) -> list[int]:
    """The number of rows of each factor: A and B of the first target, of the second, ... Each rank has ⌈width / b⌉."""
    return [r * -(-width // vector_length) for width in _widths(targets)]


def as_factors(parts: Sequence[Tensor], targets: tuple[Target, ...]) -> list[Factors]:
    """The factors of each target, cut to its widths: A ``(r, in_features)`` and B ``(r, out_features)``.

    ``parts`` holds the sub-vectors of each factor as ``(r, *)``.
    """
    # Cutting per factor keeps the zeros that a slice's backward makes as few as that factor has elements.
    factors = [
        part if part.shape[1] == width else part[:, :width] for part, width in zip(parts, _widths(targets), strict=True)
    ]
    return [Factors(*pair) for pair in zip(factors[::2], factors[1::2], strict=True)]


def default_length(targets: tuple[Target, ...], pad: bool) -> int:
    """The largest b up to 256 that divides every width; with ``pad``, 256 or the largest width, whichever is smaller."""
    if pad:
        return min(max(_widths(targets)), _DEFAULT_LENGTH)
    common = math.gcd(*_widths(targets))
    return max(length for length in range(1, min(common, _DEFAULT_LENGTH) + 1) if common % length == 0)


def uneven(targets: tuple[Target, ...], vector_length: int) -> list[Target]:
    """The targets with a width that ``vector_length`` does not divide."""
    return [t for t in targets if t.in_features % vector_length or t.out_features % vector_length]


def check_widths(targets: tuple[Target, ...], vector_length: int, pad: bool) -> None:
    """Refuses a ``vector_length`` that does not divide every width, unless ``pad``."""
    refused = [] if pad else uneven(targets, vector_length)
    if not refused:
        return
    common = math.gcd(*_widths(targets))
    layers = listed(refused, lambda target: f"`{target.name}` ({target.in_features} -> {target.out_features})")
    lengths = ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)
    raise ValueError(
        f"`vector_length` is {vector_length}, but must divide `in_features` and `out_features` of each target. "
        f"It does not for: {layers}. Allowed lengths: {lengths}; with pad=True, any length."
    )


def _widths(targets: tuple[Target, ...]) -> list[int]:
    return [width for target in targets for width in (target.in_features, target.out_features)]
