"""JSON that is checked before it is used: a file may hold any value in any place."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias, TypeVar

from ..files import refuse_lfs_pointer

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"
JsonObject: TypeAlias = dict[str, Json]
_T = TypeVar("_T")

_NAMES: dict[type, str] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "an integer",
    bool: "true or false",
}


def parse_object(text: str | bytes) -> JsonObject:
    """The JSON object in ``text``.

    Raises:
        ValueError: ``text`` is not JSON, or JSON of another type.
    """
    try:
        return as_type("the JSON", json.loads(text, object_pairs_hook=unique), dict)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply.") from None


class RepeatedFieldError(ValueError):
    """A JSON object has a field twice, so readers may disagree on its value."""


def unique(pairs: list[tuple[str, Json]]) -> JsonObject:
    """The object of these fields, for ``json.loads``.

    Raises:
        RepeatedFieldError: a name is there twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedFieldError(f"the field {shortened(max(names, key=names.count))} is there twice")
    return values


def read_object(path: Path) -> JsonObject:
    """The JSON object in a file, which may start with a byte-order mark.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it does not hold a JSON object, or is a Git LFS pointer.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    refuse_lfs_pointer(path)
    try:
        return parse_object(path.read_bytes())  # from bytes: a byte-order mark tells the encoding
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from None


def as_type(name: str, value: Json, kind: type[_T]) -> _T:
    """``value``, which must be of type ``kind``. True and False are not integers.

    Raises:
        ValueError: ``value`` is of another type.
    """
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{name} is {shortened(value)}, but must be {_NAMES[kind]}.")
    return value


def as_list(name: str, value: Json, kind: type[_T]) -> list[_T]:
    """``value``, which must be an array of ``kind``.

    Raises:
        ValueError: ``value`` or an item of it is of another type.
    """
    return [as_type(f"item {i} of {name}", item, kind) for i, item in enumerate(as_type(name, value, list))]


def field(values: Mapping[str, Json], name: str, kind: type[_T]) -> _T:
    """The required field ``name``.

    Raises:
        ValueError: the field is missing or of another type.
    """
    if name not in values:
        raise ValueError(f"it lacks the field `{name}`.")
    return as_type(f"`{name}`", values[name], kind)


def optional_field(values: Mapping[str, Json], name: str, kind: type[_T], default: _T) -> _T:
    """The field ``name``, or ``default`` if it is missing or null.

    Raises:
        ValueError: the field is of another type.
    """
    value = values.get(name)
    return default if value is None else as_type(f"`{name}`", value, kind)


def shortened(value: Json) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
