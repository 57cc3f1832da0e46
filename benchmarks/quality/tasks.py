"""GLUE's tasks from a folder of TSV files in their official layouts: ``FOLDER/TASK/train.tsv`` and ``dev.tsv``."""

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Names of the columns, in whichever of GLUE's layouts.
_TEXTS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("#1 String", "#2 String"),
    ("sentence",),
)
_LABELS = ("score", "gold_label", "label", "is_duplicate", "Quality")
WORD_ORDER = "word-order"
_COLA = ["source", "label", "star", "sentence"]  # its files have no header


class Example(NamedTuple):
    texts: tuple[str, ...]
    label: float | int


class Task(NamedTuple):
    """``labels`` is empty where a score is predicted."""

    name: str
    train: list[Example]
    dev: list[Example]
    labels: list[str]

    @property
    def data(self) -> tuple[list[Example], list[Example]]:
        return self.train, self.dev

    @property
    def metric(self) -> str:
        return "Pearson" if not self.labels else "Matthews" if self.name == "CoLA" else "accuracy"

    def score(self, predicted: np.ndarray) -> float:
        """The metric on the development set, times 100."""
        wanted = np.array([example.label for example in self.dev])
        return 100 * float(_METRICS[self.metric](predicted, wanted))


def _accuracy(predicted: np.ndarray, wanted: np.ndarray) -> float:
    return (predicted == wanted).mean()


def _correlation(predicted: np.ndarray, wanted: np.ndarray) -> float:
    """Pearson's; between two binary labels it is Matthews' coefficient. 0 where one of the two is constant."""
    if predicted.std() == 0 or wanted.std() == 0:
        return 0.0
    return np.corrcoef(predicted, wanted)[0, 1]


_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "Pearson": _correlation,
    "Matthews": _correlation,
}


def read_tasks(
    folder: Path, names: list[str] | None = None, max_train: int | None = None, held_out: bool = False
) -> list[Task]:
    """All tasks in a folder, or those named, of which one may be ``"word-order"``.

    Args:
        max_train: rows to train on, drawn once for all (STS-B's file goes from one source of sentences to the next); all if None.
        held_out: the other training rows stand for the development set, which a search then never sees.

    Raises:
        FileNotFoundError, ValueError: no such task, or a file that is none of GLUE's layouts, or no row left to hold out; named.
    """
    found = {path.parent.name: path.parent for path in sorted(folder.glob("*/train.tsv"))}
    missing = [name for name in names or [] if name not in (*found, WORD_ORDER)]
    if missing or not found:
        raise FileNotFoundError(
            f"--data: {folder} has no {missing[0] if missing else 'TASK'}/train.tsv. Tasks in it: {', '.join(found) or 'none'}."
        )
    tasks = [
        _word_order([_read_task(path) for path in found.values()]) if name == WORD_ORDER else _read_task(found[name])
        for name in names or found
    ]
    return [_cut(task, max_train, held_out) for task in tasks]


def _cut(task: Task, max_train: int | None, held_out: bool) -> Task:
    train, others = task.train, []
    if max_train is not None:
        rows = random.Random(0).sample(train, len(train))
        train, others = rows[:max_train], rows[max_train:]
    if held_out and not others:
        raise ValueError(
            f"--held-out: {task.name} has {len(task.train)} training rows, and all of them are trained on, so none is held out. "
            "Give a smaller --max-train."
        )
    return task._replace(train=train, dev=others if held_out else task.dev)


def _word_order(tasks: list[Task]) -> Task:
    """Sentences of tasks about pairs, in half of which a word was moved: to be told from the others. A stand-in for
    acceptability, which a sentence encoder has to learn, and where there are no other data."""
    examples = [example for task in tasks for example in (*task.train, *task.dev) if len(example.texts) == 2]
    sentences = sorted({text for example in examples for text in example.texts if 6 <= len(text.split()) <= 22})
    rng = random.Random(0)
    rng.shuffle(sentences)
    made = [_with_a_word_moved(sentence, rng) if rng.random() < 0.5 else sentence for sentence in sentences]
    labelled = [Example((new,), int(new == old)) for new, old in zip(made, sentences, strict=True)]
    return Task(WORD_ORDER, labelled[1000:], labelled[:1000], ["0", "1"])


def _with_a_word_moved(sentence: str, rng: random.Random) -> str:
    words = sentence.split()
    source = rng.randrange(len(words) - 2)
    for _ in range(20):  # to where it makes a difference
        place = rng.randrange(len(words) - 1)
        if place != source and words[place].lower() != words[source].lower():
            break
    words.insert(place, words.pop(source))
    return " ".join(words)


def _read_task(folder: Path) -> Task:
    train, dev = (_read_rows(folder / f"{part}.tsv") for part in ("train", "dev"))
    is_score = train[1]
    if is_score:
        label_of, labels = float, []
    else:
        labels = sorted({label for rows, _ in (train, dev) for _, label in rows})
        label_of = {label: index for index, label in enumerate(labels)}.__getitem__
    examples = [[Example(texts, label_of(label)) for texts, label in rows] for rows, _ in (train, dev)]
    return Task(folder.name, examples[0], examples[1], labels)


def _read_rows(path: Path) -> tuple[list[tuple[tuple[str, ...], str]], bool]:
    if not path.is_file():
        raise FileNotFoundError(f"--data: there is no {path}.")
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    header = rows[0] if rows else []
    if len(header) == len(_COLA) and header[1] in ("0", "1"):
        header = _COLA
    else:
        rows = rows[1:]
    texts = next((names for names in _TEXTS if set(names) <= set(header)), None)
    label = next((name for name in _LABELS if name in header), None)
    if texts is None or label is None:
        raise ValueError(f"--data: {path} has the columns {', '.join(header)}, which are none of GLUE's.")
    columns = [header.index(name) for name in texts]
    label_column = header.index(label)
    complete = [row for row in rows if len(row) == len(header)]  # a few of the official files' lines are not
    if not complete:
        raise ValueError(f"--data: {path} has no rows.")
    return [(tuple(row[i].strip() for i in columns), row[label_column]) for row in complete], label == "score"
