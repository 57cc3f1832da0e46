"""Tasks for language models: a prompt and what should follow it. E2E's restaurants from a folder, and chats of our own."""

import csv
import random
from pathlib import Path
from typing import NamedTuple

from . import chats

E2E, CHAT = "E2E", "chat"
_HELD_OUT_MEANINGS = 100
_HELD_OUT_CHATS = 400


class Pair(NamedTuple):
    """``prompt`` is a text, or the turns of a chat, of which the user has the first and the last."""

    prompt: str | tuple[str, ...]
    completion: str


class Prompt(NamedTuple):
    text: str
    references: tuple[str, ...]


class TextTask(NamedTuple):
    """``dev`` is for the loss; ``prompts``, which may be empty, are completed and compared with their references."""

    name: str
    train: list[Pair]
    dev: list[Pair]
    prompts: list[Prompt]

    @property
    def data(self) -> tuple[list[Pair], list[Pair], list[Prompt]]:
        return self.train, self.dev, self.prompts


def read_e2e(
    folder: Path,
    max_train: int | None = None,
    max_dev: int | None = None,
    max_prompts: int | None = None,
    held_out: bool = False,
) -> TextTask:
    """Restaurants, each by its meaning representation, and sentences that people wrote for it.

    Trains on the official development set without the sentences of 100 meanings, which are the same for all; tests on the
    official test set.

    Args:
        max_train, max_dev, max_prompts: how many rows of each are drawn; all if None.
        held_out: the sentences of those 100 meanings stand for the test set, which a search then never sees.

    Raises:
        FileNotFoundError, ValueError: a file is not there, or has other columns; named.
    """
    development = _by_meaning(folder / "devset.csv")
    meanings = sorted(development)
    random.Random(0).shuffle(meanings)
    if len(meanings) <= _HELD_OUT_MEANINGS:
        raise ValueError(
            f"--data: {folder / 'devset.csv'} has {len(meanings)} meaning representations; {_HELD_OUT_MEANINGS} are held out, "
            "so that it needs more than that."
        )
    train = {meaning: development[meaning] for meaning in meanings[_HELD_OUT_MEANINGS:]}
    if held_out:
        test = {meaning: development[meaning] for meaning in meanings[:_HELD_OUT_MEANINGS]}
    else:
        test = _by_meaning(folder / "testset_w_refs.csv")
    prompts = [Prompt(_e2e_prompt(meaning), tuple(references)) for meaning, references in test.items()]
    return TextTask(
        E2E, _drawn(_e2e_pairs(train), max_train), _drawn(_e2e_pairs(test), max_dev), _drawn(prompts, max_prompts)
    )


def make_chats(max_train: int | None = None, max_dev: int | None = None, held_out: bool = False) -> TextTask:
    """Chats by ``chats.py``. Those that are held out for a search and those of the test are others."""
    made = chats.make(2 * _HELD_OUT_CHATS + 6000)
    pairs = [Pair(tuple(chat[:-1]), chat[-1]) for chat in made]
    parts = pairs[:_HELD_OUT_CHATS], pairs[_HELD_OUT_CHATS : 2 * _HELD_OUT_CHATS], pairs[2 * _HELD_OUT_CHATS :]
    return TextTask(CHAT, _drawn(parts[2], max_train), _drawn(parts[1 if held_out else 0], max_dev), [])


def _drawn(rows: list, count: int | None) -> list:
    """That many, drawn once for all, since neighbours are alike; all if None."""
    return rows if count is None else random.Random(0).sample(rows, min(count, len(rows)))


def _e2e_prompt(meaning: str) -> str:
    return f"Restaurant: {meaning}\nDescription:"


def _e2e_pairs(references: dict[str, list[str]]) -> list[Pair]:
    return [Pair(_e2e_prompt(meaning), f" {text}") for meaning, texts in references.items() for text in texts]


def _by_meaning(path: Path) -> dict[str, list[str]]:
    """The sentences of each meaning representation, each on one line."""
    if not path.is_file():
        raise FileNotFoundError(
            f"--data: there is no {path}. Give the folder of the E2E data, which has devset.csv and testset_w_refs.csv."
        )
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        if not {"mr", "ref"} <= set(rows.fieldnames or ()):
            raise ValueError(f"--data: {path} has the columns {', '.join(rows.fieldnames or ())}; E2E's are mr, ref.")
        found: dict[str, list[str]] = {}
        for row in rows:
            if row["ref"] is None:
                raise ValueError(f"--data: {path}, line {rows.line_num}, has no `ref`.")
            found.setdefault(row["mr"].strip(), []).append(" ".join(row["ref"].split()))
    return found
