"""Checks of arguments that stand on nothing else."""


def check_count(name: str, value: int) -> None:
    """Refuses anything but a positive integer, by name."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r}, but must be an integer.")
    if value < 1:
        raise ValueError(f"`{name}` is {value}, but must be at least 1.")
