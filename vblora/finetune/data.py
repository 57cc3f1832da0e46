"""Labelled texts: reading, checking and splitting them."""

import math
import random
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from ..errors import CommandError
from . import tables
from .notices import print_warning

_MISSING = ("nan", "none", "null", "na", "n/a", "<na>")  # what programs write where there is no label


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

    def in_file(self, path: Path, option: str) -> "Columns":
        """The columns as a file calls them, whose names may differ in upper case."""
        header = tables.first_row(path, option)
        names = {part: name and tables.find_column(name, header) for part, name in self._asdict().items()}
        return Columns(**names)


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
    columns = columns.in_file(path, option)
    tables.refuse_one_twice({part: getattr(columns, part) for part in ("text", "pair", "label")})
    rows: list[Row] = []
    labels: Counter[str] = Counter()
    for where, fields in tables.read(path, option, columns.by_option()):
        label = tables.value(fields, columns.label, where).strip()
        labels[label] += 1
        if keep_labels is None or label in keep_labels:
            others = [
                None if column is None else tables.value(fields, column, where).strip()
                for column in (columns.pair, columns.group)
            ]
            rows.append(Row(tables.value(fields, columns.text, where).strip(), label, *others))
    for label in keep_labels or []:
        if label not in labels:
            raise CommandError(
                f"--keep-labels: {label!r} is not a label in {path}, whose labels are {tables.quoted(sorted(labels))}."
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
    if all(label.isdecimal() and len(label) <= tables.MAX_DIGITS for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))  # "1" and "01" are equal as numbers
    return sorted(labels)


def warn_of_odd_labels(rows: list[Row], path: Path, command: str) -> None:
    """Says which labels look like one class in two spellings, and which have a single row."""
    counts = Counter(row.label for row in rows)
    alike: dict[object, list[str]] = {}
    for label in sorted(counts):
        alike.setdefault(_meaning(label), []).append(label)
    for labels in alike.values():
        if len(labels) > 1:
            print_warning(
                f"{path}: the labels {tables.quoted(labels)} look alike, but are different classes. If they are one, write "
                "them alike.",
                command,
            )
    missing = [label for label in sorted(counts) if label.casefold() in _MISSING]
    if missing:
        print_warning(
            f"{path}: the label {tables.quoted(missing)} is a class, though it looks like a missing value.", command
        )
    single = sorted(label for label, count in counts.items() if count == 1)
    if single:
        print_warning(f"{path}: only one row has the label {tables.quoted(single)}.", command)


def _meaning(label: str) -> object:
    try:
        return float(label)
    except ValueError:
        return " ".join(unicodedata.normalize("NFKC", label).split()).casefold()


def are_scores(rows: list[Row]) -> bool:
    """Whether labels are scores: all are numbers, and some have a fraction."""
    try:
        scores = [float(label) for label in {row.label for row in rows}]
    except ValueError:
        return False
    return any(not math.isfinite(score) or score != round(score) for score in scores)


def check_scores(rows: list[Row], where: str) -> None:
    """Refuses rows whose label is no finite number, or that all have the same one."""
    for row in rows:
        try:
            finite = math.isfinite(float(row.label))
        except ValueError:
            finite = False
        if not finite:
            raise CommandError(
                f"{where} have the label {row.label!r}, but for --task regression it must be a finite number. Remove "
                "these rows, or give --task classification if the labels are classes."
            )
    if len({float(row.label) for row in rows}) < 2:
        raise CommandError(f"{where} all have the score {rows[0].label}, so there is nothing to learn or to compare.")


def check_labels(rows: list[Row], labels: list[str], where: str) -> None:
    """Refuses rows whose label no training row has."""
    unknown = sorted({row.label for row in rows} - set(labels))
    if unknown:
        raise CommandError(
            f"{where} have the label {unknown[0]!r}, which no training row has; its labels are {tables.quoted(labels)}."
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
