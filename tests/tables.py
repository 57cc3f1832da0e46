"""A table of texts and labels that a model of a few kilobytes can learn."""

import csv
import random
from pathlib import Path

WORDS = {"fresh": ["good", "fine", "great", "warm"], "rotten": ["bad", "poor", "awful", "dull"]}
FILLERS = ["a", "the", "film", "story", "it", "is", "and", "with", "very"]


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of ``text``, ``label``, ``film`` and ``title``: one word in five tells the label, in turn."""
    generator = random.Random(seed)
    rows = []
    for index in range(count):
        label = ("fresh", "rotten")[index % 2]
        words = [*generator.choices(FILLERS, k=generator.randint(3, 9)), generator.choice(WORDS[label])]
        generator.shuffle(words)
        rows.append({"text": " ".join(words), "label": label, "film": f"film {index % 10}", "title": f"the {index}"})
    return rows


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
