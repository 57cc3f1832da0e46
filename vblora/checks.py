"""Argument checks that every other module may import."""

import math
import numbers


def check_count(name: str, value: int) -> None:
    """Raises unless ``value`` is a positive integer; the message names the argument."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r}, but must be an integer.")
    if value < 1:
        raise ValueError(f"`{name}` is {value}, but must be at least 1.")


def check_flag(name: str, value: bool) -> None:
    """Raises unless ``value`` is True or False; the message names the argument."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r}, but must be True or False.")


def check_number(name: str, value: float) -> float:
    """``value`` as a float. Raises unless it is a real number; the message names the argument."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r}, but must be a number.")
    return float(value)


def check_not_negative(name: str, value: float) -> float:
    """``value`` as a float. Raises unless it is at least 0; the message names the argument."""
    if not check_number(name, value) >= 0:
        raise ValueError(f"`{name}` is {value}, but must be at least 0.")
    return float(value)


def check_seed(name: str, value: int) -> None:
    """Raises unless ``value`` is a signed 64-bit integer; the message names the argument."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r}, but must be an integer.")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"`{name}` is {value}, but must be a signed 64-bit integer.")


def check_positive(name: str, value: float) -> float:
    """``value`` as a float. Raises unless it is positive and finite; the message names the argument."""
    if not 0 < check_number(name, value) < math.inf:
        raise ValueError(f"`{name}` is {value}, but must be positive and finite.")
    return float(value)
