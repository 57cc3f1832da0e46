"""Tables of labelled texts: reading, checking and splitting them."""

import bz2
import csv
import difflib
import gzip
import json
import random
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from ..errors import CommandError
from ..files import byte_order_mark, refuse_lfs_pointer

_FORMATS = (".csv", ".tsv", ".jsonl")
_COMPRESSIONS = (".gz", ".bz2")
_MAX_DIGITS = 4300  # that Python turns into an int, in JSON and elsewhere

_Fields = dict[str, object]


class Columns(NamedTuple):
    """Names of the columns to read."""

    text: str
    label: str
    pair: str | None = None
    group: str | None = None

    def by_option(self) -> dict[str, str]:
        """The columns to read, by the option of the command line that names each."""
        names = {
            "--text-column": self.text,
            "--pair-column": self.pair,
            "--label-column": self.label,
            "--group-column": self.group,
        }
        return {option: name for option, name in names.items() if name is not None}


class Row(NamedTuple):
    text: str
    label: str
    pair: str | None
    group: str | None


def read_rows(path: Path, columns: Columns, option: str, keep_labels: list[str] | None = None) -> list[Row]:
    """All rows of a file, except those whose label is not in ``keep_labels``.

    Args:
        path: a .csv, .tsv or .jsonl file, which may be compressed as .gz or .bz2.
        columns: what to read from it.
        option: the option that gave the path, for messages.
        keep_labels: None keeps all rows.

    Raises:
        CommandError: the file cannot be read, or a row has no text or no label. The message names the first such line.
    """
    if not path.is_file():
        raise CommandError(f"{option}: {path} is {'a folder' if path.is_dir() else 'not there'}; give a file.")
    read = _read_jsonl if _format_of(path, option) == ".jsonl" else _read_table
    rows: list[Row] = []
    labels: Counter[str] = Counter()
    try:
        _check_encoding(path, option)
        for line, fields in read(path, columns, option):
            where = f"{option}: {path}, line {line}"
            label = _value(fields, columns.label, where)
            labels[label] += 1
            if keep_labels is None or label in keep_labels:
                text = _value(fields, columns.text, where)
                pair = None if columns.pair is None else _value(fields, columns.pair, where)
                group = None if columns.group is None else _value(fields, columns.group, where)
                rows.append(Row(text, label, pair, group))
    except (OSError, EOFError, zlib.error) as error:
        raise CommandError(f"{option}: {path} cannot be read: {error}.") from None
    except UnicodeDecodeError as error:
        raise CommandError(f"{option}: {path} is not UTF-8 text: {error}. Convert it to UTF-8.") from None
    for label in keep_labels or []:
        if label not in labels:
            raise CommandError(
                f"--keep-labels: {label!r} is not a label in {path}, whose labels are {_join(sorted(labels))}."
            )
    if not rows:
        raise CommandError(f"{option}: {path} has no rows.")
    return rows


def labels_of(rows: list[Row], path: Path, column: str) -> list[str]:
    """The classes of a data set, sorted: by value if all are whole numbers, else as text.

    Raises:
        CommandError: there are fewer than two, or so many that the column is unlikely to hold labels.
    """
    labels = {row.label for row in rows}
    if len(labels) < 2:
        raise CommandError(
            f"--label-column: all rows of {path} have the label {rows[0].label!r}, but a classifier needs at least two labels."
        )
    if len(labels) > len(rows) / 2:
        raise CommandError(
            f"--label-column: {column!r} has {len(labels)} different values in {len(rows)} rows of {path}. "
            "Labels must repeat more often; is it the right column?"
        )
    if all(label.isdecimal() and len(label) <= _MAX_DIGITS for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))  # "1" and "01" are equal as numbers
    return sorted(labels)


def check_labels(rows: list[Row], labels: list[str], where: str) -> None:
    """Refuses rows whose label no training row has."""
    unknown = sorted({row.label for row in rows} - set(labels))
    if unknown:
        raise CommandError(
            f"{where} have the label {unknown[0]!r}, which no training row has; its labels are {_join(labels)}."
        )


def split_rows(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and about ``fraction`` of the rows to evaluate on, in a random order that ``seed`` determines.

    A group is never split, and evaluation leaves out rows whose text is also trained on.

    Raises:
        CommandError: one of the two would be empty.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.text if row.group is None else row.group, []).append(row)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    train: list[Row] = []
    held_out: list[Row] = []
    for name in order:
        (held_out if len(held_out) < fraction * len(rows) else train).extend(groups[name])
    held_out = without_texts_of(train, held_out)
    if not train or not held_out:
        raise CommandError(
            f"--eval-fraction: {fraction} of {len(rows)} rows in {len(groups)} groups leaves "
            f"{len(train)} to train on and {len(held_out)} to evaluate; each needs at least one. Add rows, or give --eval-data."
        )
    return train, held_out


def without_texts_of(train: list[Row], rows: list[Row]) -> list[Row]:
    """The rows whose texts are not trained on."""
    seen = {(row.text, row.pair) for row in train}
    return [row for row in rows if (row.text, row.pair) not in seen]


def sample_rows(rows: list[Row], count: int | None, seed: int) -> list[Row]:
    """``count`` rows, drawn at random; all rows if there are no more than that."""
    if count is None or count >= len(rows):
        return rows
    return random.Random(seed).sample(rows, count)


def _format_of(path: Path, option: str) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in _FORMATS:
        raise CommandError(
            f"{option}: the format of {path.name} is unknown; "
            f"its name must end in {', '.join(_FORMATS)}, optionally followed by .gz or .bz2."
        )
    return suffixes[-1]


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


def _read_table(path: Path, columns: Columns, option: str) -> Iterator[tuple[int, _Fields]]:
    csv.field_size_limit(sys.maxsize)  # the default refuses fields above 128 KiB
    # Tab-separated values have no quoting (IANA's definition, and common data sets): a quote is part of the text.
    tabs = _format_of(path, option) == ".tsv"
    with _open(path) as file:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(file, strict=True)
        line = 1  # on which the current row begins
        try:
            header = next(reader, [])
            for needed, name in columns.by_option().items():
                if header.count(name) != 1:
                    fault = "is there more than once" if name in header else "is not there"
                    raise CommandError(f"{needed}: column {name!r} {fault} in {path}{_hint(name, header)}")
            line = reader.line_num + 1
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
                # Other columns may share a name, such as the empty ones that spreadsheets add: one of them is left.
                if fields:  # not an empty line
                    yield line, dict(zip(header, fields, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise CommandError(f"{option}: {path}, line {line}: {error}.") from None


def _read_jsonl(path: Path, columns: Columns, option: str) -> Iterator[tuple[int, _Fields]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{option}: {path}, line {number}"
            try:
                fields = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise CommandError(f"{where} is not valid JSON: {error}.") from None
            except ValueError:
                raise CommandError(
                    f"{where} has an integer of more than {_MAX_DIGITS} digits. Write it as a string."
                ) from None
            if not isinstance(fields, dict):
                raise CommandError(f"{where} is not a JSON object; each line must be one.")
            for needed, name in columns.by_option().items():
                if name not in fields:
                    raise CommandError(
                        f"{needed}: column {name!r} is not there in {path}, line {number}{_hint(name, fields)}"
                    )
            yield number, fields


def _value(fields: _Fields, column: str, where: str) -> str:
    """A field as text. JSON's whole numbers and booleans are allowed: they are common as labels."""
    value = fields[column]
    if not isinstance(value, (int, str)):
        raise CommandError(
            f"{where}: column {column!r} is {json.dumps(value):.100}; it must be a string or a whole number."
        )
    text = str(value).strip()
    if not text:
        raise CommandError(f"{where}: column {column!r} is empty. Fill it in, or remove the line.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CommandError(
            f"{where}: column {column!r} contains {text[error.start]!r}, half of a surrogate pair, which is not a character. "
            "Remove it, or write both halves."
        ) from None
    return text


def _hint(name: str, header: Iterable[str]) -> str:
    header = list(header)
    near = difflib.get_close_matches(name, header, n=1)
    if name in header:  # more than once
        return "."
    return f"; did you mean {near[0]!r}?" if near else f"; there are {_join(header)}."


def _join(names: Iterable[str]) -> str:
    quoted = [repr(name) for name in names]
    return ", ".join(quoted[:10]) + (f" and {len(quoted) - 10} more" if len(quoted) > 10 else "") or "none"
