"""Five tasks, each with rows to train on, rows to choose by, and rows to report."""

import csv
import random
import re
from pathlib import Path
from typing import NamedTuple

from vblora.finetune import data, demo

from ..quality.tasks import Example, Task, read_tasks

NAMES = ("SST-2", "MRPC", "STS-B", "Rotten Tomatoes", "E2E")
# SST-2 is made of sentences from Rotten Tomatoes, so a bank that is tried on one has seen neither.
_RELATED = {"SST-2": {"Rotten Tomatoes"}, "Rotten Tomatoes": {"SST-2"}}


class Rows(NamedTuple):
    train: int = 1500
    choose: int = 1000  # training rows held out
    report: int = 2000  # at most, of the development or test set


def others(name: str) -> list[str]:
    """The tasks that a bank for ``name`` may be trained on."""
    return [other for other in NAMES if other != name and other not in _RELATED.get(name, ())]


def read(name: str, glue: Path, e2e: Path, rows: Rows, *, report: bool = False) -> Task:
    """A task whose ``dev`` is the rows to choose by, or those to report.

    Raises:
        FileNotFoundError, KeyError: the task's files are not there, or it has no such name.
    """
    if name == "Rotten Tomatoes":
        train, choose, test = _rotten_tomatoes()
        labels = demo.LABELS
    elif name == "E2E":
        train, choose, test = _e2e(e2e, rows.train)
        labels = ["0", "1"]
    else:
        task = read_tasks(glue, [name], rows.train, held_out=not report)[0]
        return task._replace(dev=task.dev[: rows.report if report else rows.choose])
    return Task(name, train[: rows.train], test[: rows.report] if report else choose[: rows.choose], labels)


def _rotten_tomatoes() -> tuple[list[Example], list[Example], list[Example]]:
    """Snippets of reviews; no film is in two of the three parts."""
    rows = data.read_rows(demo.find_data(), demo.COLUMNS, "--data", demo.LABELS)
    rest, test = data.split_rows(rows, 0.2, 0)
    train, choose = data.split_rows(rest, 0.25, 1)
    rng = random.Random(0)
    parts = [rng.sample(part, len(part)) for part in (train, choose, test)]
    first, second, third = ([Example((row.text,), demo.LABELS.index(row.label)) for row in part] for part in parts)
    return first, second, third


def _e2e(folder: Path, count: int) -> tuple[list[Example], list[Example], list[Example]]:
    """Whether a sentence says what the data say: pairs, in half of which one value of the data was exchanged."""
    files = [_read_e2e(folder / name) for name in ("devset.csv", "testset_w_refs.csv")]
    values: dict[str, set[str]] = {}
    for rows in files:
        for meaning, _ in rows:
            for slot, value in meaning.items():
                values.setdefault(slot, set()).add(value)
    rng = random.Random(0)
    train, test = ([_pair(meaning, text, values, rng) for meaning, text in rows] for rows in files)
    rng.shuffle(train)
    rng.shuffle(test)
    return train[:count], train[count:], test


def _read_e2e(path: Path) -> list[tuple[dict[str, str], str]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return [(dict(re.findall(r"(\w+)\[([^\]]*)\]", row["mr"])), row["ref"]) for row in csv.DictReader(file)]


def _pair(meaning: dict[str, str], text: str, values: dict[str, set[str]], rng: random.Random) -> Example:
    label = int(rng.random() < 0.5)
    if not label:
        slot = rng.choice(
            [slot for slot in meaning if slot not in ("name", "near") and len(values[slot]) > 1] or ["name"]
        )
        meaning = meaning | {slot: rng.choice(sorted(values[slot] - {meaning[slot]}))}
    return Example((", ".join(f"{slot}: {value}" for slot, value in meaning.items()), text), label)
