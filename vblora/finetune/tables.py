"""Files of rows: CSV, TSV and JSONL, read row by row, with a message that names the line of whatever is wrong."""

import bz2
import csv
import difflib
import gzip
import itertools
import json
import math
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from ..checkpoint.json_objects import RepeatedFieldError, unique
from ..errors import CommandError, listed
from ..files import byte_order_mark, refuse_lfs_pointer

_FORMATS = (".csv", ".tsv", ".jsonl")
_COMPRESSIONS = (".gz", ".bz2")
MAX_DIGITS = 4300  # that Python turns into an int, in JSON and elsewhere

Fields = dict[str, object]


def read(path: Path, option: str, columns: Mapping[str, str]) -> Iterator[tuple[str, Fields]]:
    """Where each row of a file is, for messages, and its fields.

    The file is read as the rows are asked for, so it may be larger than memory.

    Args:
        path: a .csv, .tsv or .jsonl file, which may be compressed as .gz or .bz2.
        option: the option that gave the path, for messages.
        columns: the columns that must be there, by the option that names each.

    Raises:
        CommandError: the file cannot be read. The message names the first line that is wrong.
    """
    if not path.is_file():
        raise CommandError(
            f"{option}: {path} is a folder. Give a file." if path.is_dir() else f"{option}: there is no file {path}."
        )
    rows = _read_jsonl if format_of(path, option) == ".jsonl" else _read_table
    try:
        _check_encoding(path, option)
        for line, fields in rows(path, columns, option):
            yield f"{option}: {path}, line {line}", fields
    except (OSError, EOFError, zlib.error) as error:
        raise CommandError(f"{option}: {path} cannot be read: {error}.") from None
    except UnicodeDecodeError as error:
        raise CommandError(f"{option}: {path} is not UTF-8 text: {error}. Convert it to UTF-8.") from None


def first_row(path: Path, option: str) -> Fields:
    """The fields of a file's first row, which tell its columns.

    Raises:
        CommandError: the file cannot be read, or has no rows.
    """
    for _, fields in read(path, option, {}):
        return fields
    raise CommandError(f"{option}: {path} has no rows.")


def find_column(name: str, header: Iterable[str]) -> str:
    """The column ``name``, or else the only one whose name is the same but for upper case and spaces around it.

    If there is none, ``name``: :func:`read` refuses it.
    """
    names = list(header)
    near = [other for other in names if other.strip().casefold() == name.strip().casefold()]
    return near[0] if name not in names and len(near) == 1 else name


def refuse_one_twice(columns: Mapping[str, str | None]) -> None:
    """Refuses one column for two parts of a row, such as text and label: a model that reads what it is to predict learns nothing.

    Args:
        columns: the column of each part, by what its option is called.
    """
    part_of: dict[str, str] = {}
    for part, column in columns.items():
        if column is not None and (other := part_of.setdefault(column, part)) != part:
            raise CommandError(f"--{part}-column: is {column!r}, as is --{other}-column. Give two different columns.")


def format_of(path: Path, option: str) -> str:
    """ ".csv", ".tsv" or ".jsonl"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in _FORMATS:
        reads = option != "--output"
        advice = " Write each object of the .json file on a line of its own." * (reads and suffixes[-1:] == [".json"])
        raise CommandError(
            f"{option}: the format of {path.name} is unknown; "
            f"its name must end in {', '.join(_FORMATS)}{', optionally followed by .gz or .bz2' * reads}.{advice}"
        )
    return suffixes[-1]


def value(fields: Fields, column: str, where: str) -> str:
    """A field as text. JSON's numbers and booleans are allowed: they are common as labels."""
    found = fields[column]
    if not isinstance(found, (int, float, str)):
        raise CommandError(f"{where}: column {column!r} is {json.dumps(found):.100}; it must be a string or a number.")
    if isinstance(found, float) and not math.isfinite(found):
        raise CommandError(
            f"{where}: column {column!r} is {json.dumps(found)}, which stands for a missing value. Remove the line."
        )
    text = str(found)
    if not text.strip():
        raise CommandError(f"{where}: column {column!r} is empty. Fill it in, or remove the line.")
    check_characters(text, f"{where}: column {column!r}")
    return text


def check_characters(text: str, where: str) -> None:
    if "\0" in text:
        raise CommandError(f"{where} contains a NUL character, as damaged files do. Remove it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CommandError(
            f"{where} contains {text[error.start]!r}, half of a surrogate pair, which is not a character. "
            "Remove it, or write both halves."
        ) from None


def quoted(names: Iterable[str]) -> str:
    """What a user's file or option calls columns, labels and adapters, for a message."""
    return listed(names, repr, 10)


def _check_encoding(path: Path, option: str) -> None:
    """Refuses a Git LFS pointer, and text with the byte-order mark of another encoding than UTF-8."""
    try:
        refuse_lfs_pointer(path)
    except ValueError as error:
        raise CommandError(f"{option}: {error}") from None
    with _open(path, "latin-1") as file:  # in which each character is a byte
        encoding = byte_order_mark(file.read(4).encode("latin-1"))
    if encoding not in (None, "UTF-8"):
        raise CommandError(
            f"{option}: {path} is {encoding} text, as its byte-order mark shows, not UTF-8. Convert it to UTF-8."
        )


def _open(path: Path, encoding: str = "utf-8-sig") -> IO[str]:
    # newline="": the csv module needs line ends as they are
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding=encoding, newline="")
    if path.suffix.lower() == ".bz2":
        return bz2.open(path, "rt", encoding=encoding, newline="")
    return open(path, encoding=encoding, newline="")


def _read_table(path: Path, columns: Mapping[str, str], option: str) -> Iterator[tuple[int, Fields]]:
    csv.field_size_limit(sys.maxsize)  # the default refuses fields above 128 KiB
    # Tab-separated values have no quoting (IANA's definition, and common data sets): a quote is part of the text.
    tabs = format_of(path, option) == ".tsv"
    with _open(path) as file:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(file, strict=True)
        line = 1  # on which the current row begins
        try:
            header = next(reader, [])
            for needed, name in columns.items():
                if header.count(name) != 1:
                    fault = f"several columns {name!r}" if name in header else f"no column {name!r}"
                    raise CommandError(f"{needed}: {path} has {fault}{_hint(name, header, columns_of_csv=not tabs)}")
            line = reader.line_num + 1
            header = _distinct(header)
            for fields in reader:
                if fields and len(fields) != len(header):
                    advice = (
                        "Quotes have no meaning in a .tsv file."
                        if tabs
                        else "Quote a field that contains a comma or a line break."
                    )
                    raise CommandError(
                        f"{option}: {path}, line {line}: {len(fields)} fields, but the header has {len(header)}. {advice}"
                    )
                if fields:  # not an empty line
                    yield line, dict(zip(header, fields, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise CommandError(f"{option}: {path}, line {line}: {error}.") from None


def _distinct(header: list[str]) -> list[str]:
    """The names of columns, of which none may be lost: of two with one name, such as an empty one, the second gets a number."""
    names: list[str] = []
    for name in header:
        numbered = (f"{name}.{number}" for number in itertools.count(1))
        names.append(name if name not in names else next(other for other in numbered if other not in (*names, *header)))
    return names


def _read_jsonl(path: Path, columns: Mapping[str, str], option: str) -> Iterator[tuple[int, Fields]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{option}: {path}, line {number}"
            try:
                fields = json.loads(line.rstrip(), object_pairs_hook=unique)  # or the position after it is on line 2
            except json.JSONDecodeError as error:
                raise CommandError(
                    f"{where} is not valid JSON: {error.msg}, at column {error.colno}. Each line must be one JSON object."
                ) from None
            except (RepeatedFieldError, RecursionError) as error:
                raise CommandError(f"{where} is not valid JSON: {error}.") from None
            except ValueError:
                raise CommandError(
                    f"{where} has an integer of more than {MAX_DIGITS} digits. Write it as a string."
                ) from None
            if not isinstance(fields, dict):
                raise CommandError(f"{where} is not a JSON object; each line must be one.")
            for needed, name in columns.items():
                if name not in fields:
                    raise CommandError(f"{needed}: {path}, line {number}, has no column {name!r}{_hint(name, fields)}")
            yield number, fields


def _hint(name: str, header: Iterable[str], columns_of_csv: bool = False) -> str:
    header = list(header)
    near = difflib.get_close_matches(name, header, n=1)
    if name in header:  # more than once
        return "."
    if columns_of_csv and len(header) == 1:
        for separator, what in ((";", "semicolons"), ("\t", "tabs")):
            if separator in header[0]:
                advice = "Name it .tsv." if separator == "\t" else "Save it with commas."
                return f": its columns are separated by {what}, but those of a .csv file must be by commas. {advice}"
    return f"; did you mean {near[0]!r}?" if near else f"; its columns are {quoted(header)}."
