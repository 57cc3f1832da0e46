"""Tables of labelled texts: reading, checking, and splitting them.

Of the standard library alone, so that a fault in a file shows before anything slow is imported.
"""

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

_FORMATS = (".csv", ".tsv", ".jsonl")
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open}


class Columns(NamedTuple):
    """Names of the columns to read, and the arguments that give them (for messages)."""

    text: str
    label: str
    pair: str | None = None
    group: str | None = None

    def wanted(self) -> dict[str, str]:
        names = {
            "--text-column": self.text,
            "--pair-column": self.pair,
            "--label-column": self.label,
            "--group-column": self.group,
        }
        return {argument: name for argument, name in names.items() if name is not None}


class Row(NamedTuple):
    text: str
    label: str
    pair: str | None
    group: str | None


def read_rows(path: Path, columns: Columns, argument: str, keep_labels: list[str] | None = None) -> list[Row]:
    """All rows of a file, those of other labels than ``keep_labels`` left out.

    Args:
        path: a .csv, .tsv or .jsonl file, or one of these compressed as .gz or .bz2.
        columns: what to take from it.
        argument: the argument that gave the path, for messages.
        keep_labels: None keeps all.

    Raises:
        CommandError: the file cannot be read, or a row of it has no text or no label; the first such line is named.
    """
    if not path.is_file():
        raise CommandError(f"{argument}: {path} is {'a folder' if path.is_dir() else 'not there'}; give a file.")
    read = _read_jsonl if _format_of(path, argument) == ".jsonl" else _read_table
    rows, labels = [], Counter()
    try:
        for line, fields in read(path, columns, argument):
            where = f"{argument}: {path}, line {line}"
            label = _value(fields, columns.label, where)
            labels[label] += 1
            if keep_labels is None or label in keep_labels:
                text, pair, group = (
                    _value(fields, name, where) for name in (columns.text, columns.pair, columns.group)
                )
                rows.append(Row(text, label, pair, group))
    except (OSError, EOFError, zlib.error) as error:
        raise CommandError(f"{argument}: {path} cannot be read: {error}.") from None
    except UnicodeDecodeError as error:
        raise CommandError(f"{argument}: {path} is not UTF-8 text: {error}. Convert it to UTF-8.") from None
    for label in keep_labels or []:
        if label not in labels:
            raise CommandError(f"--keep-labels: {label!r} is no label in {path}; there are {_listed(labels)}.")
    if not rows:
        raise CommandError(f"{argument}: {path} holds no rows.")
    return rows


def labels_of(rows: list[Row], path: Path, column: str) -> list[str]:
    """The classes of a data set, in order.

    Raises:
        CommandError: fewer than two, or so many that the column cannot be one of labels.
    """
    labels = {row.label for row in rows}
    if len(labels) < 2:
        raise CommandError(
            f"--label-column: all rows of {path} have the label {rows[0].label!r}; it takes at least two labels."
        )
    if len(labels) > len(rows) / 2:
        raise CommandError(
            f"--label-column: {column!r} has {len(labels)} different values in {len(rows)} rows of {path}. "
            "A label must come up more often than that; is it the right column?"
        )
    if all(label.isdecimal() for label in labels):
        return sorted(labels, key=int)
    return sorted(labels)


def check_labels(rows: list[Row], labels: list[str], where: str) -> None:
    """Refuses rows with a label that is not among those that are trained on."""
    unknown = sorted({row.label for row in rows} - set(labels))
    if unknown:
        raise CommandError(
            f"{where} have the label {unknown[0]!r}, which no training row has; trained on are {_listed(labels)}."
        )


def split_rows(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and about ``fraction`` of the rows held out, in a random order that ``seed`` fixes.

    Rows of one group are never on both sides, and neither is the same text: a row that is held out and whose text is also
    trained on is dropped.

    Raises:
        CommandError: one side would be empty.
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
            f"{len(train)} to train on and {len(held_out)} to evaluate; each must have some. Give more rows, or --eval-data."
        )
    return train, held_out


def without_texts_of(train: list[Row], rows: list[Row]) -> list[Row]:
    """Those rows whose texts are not trained on."""
    seen = {(row.text, row.pair) for row in train}
    return [row for row in rows if (row.text, row.pair) not in seen]


def sample_rows(rows: list[Row], count: int | None, seed: int) -> list[Row]:
    """Up to ``count`` rows, drawn at random."""
    if count is None or count >= len(rows):
        return rows
    return random.Random(seed).sample(rows, count)


def _format_of(path: Path, argument: str) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _OPENERS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in _FORMATS:
        raise CommandError(
            f"{argument}: {path.name} is of no known kind; "
            f"its name must end in {', '.join(_FORMATS)}, or in that and .gz or .bz2."
        )
    return suffixes[-1]


def _open(path: Path) -> IO[str]:
    opener = _OPENERS.get(path.suffix.lower(), open)
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def _read_table(path: Path, columns: Columns, argument: str) -> Iterator[tuple[int, dict[str, object]]]:
    csv.field_size_limit(sys.maxsize)  # by default a text of more than 128 KiB is an error
    # Tab-separated values have no quoting (IANA's definition, and the usual data sets): a quote is a character of the text.
    tabs = _format_of(path, argument) == ".tsv"
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    with _open(path) as file:
        reader = csv.DictReader(file, **style)
        try:
            header = reader.fieldnames or []
            for needed, name in columns.wanted().items():
                if header.count(name) != 1:
                    fault = "is there more than once" if name in header else "is not there"
                    raise CommandError(f"{needed}: column {name!r} {fault} in {path}{_hint(name, header)}")
            for fields in reader:
                count = (
                    len(header) + len(fields[None]) if None in fields else sum(v is not None for v in fields.values())
                )
                if count != len(header):
                    cure = (
                        "Quotes do not count in a .tsv file."
                        if tabs
                        else "Quote a field that holds a comma or a line's end."
                    )
                    where = f"{argument}: {path}, line {reader.line_num}"
                    raise CommandError(f"{where}: {count} fields, but the header has {len(header)}. {cure}")
                yield reader.line_num, fields
        except csv.Error as error:
            raise CommandError(f"{argument}: {path}, line {reader.line_num}: {error}.") from None


def _read_jsonl(path: Path, columns: Columns, argument: str) -> Iterator[tuple[int, dict[str, object]]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise CommandError(f"{argument}: {path}, line {number} is no JSON: {error}.") from None
            if not isinstance(fields, dict):
                raise CommandError(f"{argument}: {path}, line {number} is no JSON object; each line must be one.")
            for needed, name in columns.wanted().items():
                if name not in fields:
                    raise CommandError(
                        f"{needed}: column {name!r} is not there in {path}, line {number}{_hint(name, fields)}"
                    )
            yield number, fields


def _value(fields: dict[str, object], column: str | None, where: str) -> str | None:
    """A field as text; None for a column that was not asked for. Whole numbers and booleans of JSON are fine as labels."""
    if column is None:
        return None
    value = fields[column]
    if not isinstance(value, (int, str)):
        raise CommandError(f"{where}: column {column!r} is {json.dumps(value)}; it must be a string or a whole number.")
    if not str(value).strip():
        raise CommandError(f"{where}: column {column!r} is empty. Fill it in, or remove the line.")
    return str(value).strip()


def _hint(name: str, header: Iterable[str]) -> str:
    header = list(header)
    near = difflib.get_close_matches(name, header, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {_listed(header)}."


def _listed(names: Iterable[str]) -> str:
    names = [repr(name) for name in names]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "none"
