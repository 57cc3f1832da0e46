"""Rows out: a .csv, .tsv or .jsonl file that appears when it is complete, or JSON lines on the standard output."""

import csv
import json
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ..errors import CommandError
from ..files import atomic_replacement, refuse_unwritable
from .tables import Fields, format_of


def check_output_file(path: Path | None, overwrite: bool) -> None:
    """Refuses a file that cannot be written, before anything slow.

    Raises:
        CommandError: its format is unknown, it exists, or its folder does not.
    """
    if path is None:
        if overwrite:
            raise CommandError("--overwrite has no effect, because there is no --output. Leave it out.")
        return
    format_of(path, "--output")
    if path.suffix.lower() in (".gz", ".bz2"):
        raise CommandError(f"--output: {path} would be compressed, which is not supported. Leave out {path.suffix}.")
    if path.exists() and not (overwrite and path.is_file()):
        raise CommandError(f"--output: {path} already exists. Give another name, or --overwrite.")
    folder = path.absolute().parent
    try:
        refuse_unwritable(folder)
    except OSError as error:
        raise CommandError(f"--output: the folder {folder} cannot be written to: {error.strerror}.") from None


def refuse_same_folder(argument: str, folder: Path, other: str, source: Path | None) -> None:
    """Refuses a folder to write that is also read.

    Args:
        argument, other: what the user calls the two, for the message.

    Raises:
        CommandError: they are the same.
    """
    if source is not None and source.is_dir() and source.resolve() == folder.resolve():
        raise CommandError(f"{argument}: {folder} is also {other}, which would be lost. Give another folder.")


def check_columns(path: Path | None, first: Iterable[str], other: Iterable[str]) -> None:
    """Refuses rows of different columns in a table.

    Raises:
        CommandError: the columns ``other`` of a row are not those of the first, and only JSON lines can hold such rows.
    """
    if path is None or (form := format_of(path, "--output")) == ".jsonl":
        return
    if differing := set(first) ^ set(other):
        raise CommandError(
            f"--output: some rows have the column {min(differing)!r} and others do not, which a {form} file cannot hold. Give "
            "the name of a .jsonl file."
        )


class Writer:
    """Writes rows in the format of the file's name. All rows have the columns of the first."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._stack = ExitStack()
        self._file: IO[str] = sys.stdout
        self._table: csv.DictWriter[str] | None = None

    def __enter__(self) -> "Writer":
        if self.path is not None:
            temporary = self._stack.enter_context(atomic_replacement(self.path))
            # Half a surrogate pair becomes \\ud800 and the like, which JSON reads back.
            file = open(temporary, "x", encoding="utf-8", errors="backslashreplace", newline="")
            self._file = self._stack.enter_context(file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def row(self, fields: Fields) -> None:
        form = ".jsonl" if self.path is None else format_of(self.path, "--output")
        if form == ".jsonl":
            # Another encoding lacks characters, and what Python prints instead is not JSON.
            utf8 = self.path is not None or str(getattr(self._file, "encoding", "")).lower().replace("-", "") == "utf8"
            self._file.write(json.dumps(fields, ensure_ascii=not utf8) + "\n")
            return
        if form == ".tsv":  # has no quoting, so tabs and line breaks cannot be written
            fields = {_in_a_line(name): _in_a_line(value) for name, value in fields.items()}
        if self._table is None:
            style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if form == ".tsv" else {}
            self._table = csv.DictWriter(self._file, list(fields), lineterminator="\n", **style)  # type: ignore[arg-type]
            self._table.writeheader()
        check_columns(self.path, self._table.fieldnames, fields)
        self._table.writerow(
            {name: json.dumps(value) if isinstance(value, (dict, list)) else value for name, value in fields.items()}
        )


def _in_a_line(value: Any) -> Any:
    return " ".join(value.split()) if isinstance(value, str) else value
