"""Argument checks that every other module may import."""


def check_count(name: str, value: int) -> None:
    """Raises unless ``value`` is a positive integer; the message names the argument."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r}, but must be an integer.")
    if value < 1:
        raise ValueError(f"`{name}` is {value}, but must be at least 1.")
