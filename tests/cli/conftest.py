"""A classifier of a few kilobytes, a table that it can learn, and the command run on them."""

import csv
import os
import random
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it

import pytest

from vblora.cli import main

WORDS = {"fresh": ["good", "fine", "great", "warm"], "rotten": ["bad", "poor", "awful", "dull"]}
FILLERS = ["a", "the", "film", "story", "it", "is", "and", "with", "very"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with a tokenizer of our own words, as ``save_pretrained`` writes them."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("model")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLERS, *WORDS["fresh"], *WORDS["rotten"]]
    BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}, model_max_length=64).save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


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


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "rows.csv", make_rows(120))


@pytest.fixture
def finetune(tiny_model: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs ``vblora finetune`` on the tiny model into ``tmp_path/"out"``, unless told otherwise: the exit code."""

    def run(*arguments: str | Path, model: str | Path | None = tiny_model, output: Path | None = None) -> int:
        arguments = ["--epochs", "1", "--num-vectors", "16", "--vector-length", "16", "--r", "2", *arguments]
        if model is not None:
            arguments += ["--model", model]
        return main(["finetune", *map(str, arguments), "--output", str(output or tmp_path / "out")])

    return run
