"""A real encoder and real sentences, both from packages: enough to train on in seconds."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from vblora.errors import CommandError
from vblora.finetune import data, demo


def _found(find: Callable[[], Path]) -> Path:
    try:
        return find()
    except CommandError as error:  # on a machine with a GPU, where nothing can be installed
        pytest.skip(str(error))


def batches(count: int = 32, size: int = 4, max_length: int = 16) -> list[dict[str, Tensor]]:
    """Snippets of film reviews with their labels, on the default device."""
    device = torch.get_default_device()
    return [{name: x.to(device) for name, x in batch.items()} for batch in _batches(count, size, max_length)]


@functools.cache
def _batches(count: int, size: int, max_length: int) -> list[dict[str, Tensor]]:
    rows = data.read_rows(_found(demo.find_data), demo.COLUMNS, "--data", demo.LABELS)
    rows = data.sample_rows(rows, count * size, 0)
    tokenizer = AutoTokenizer.from_pretrained(_found(demo.find_model))
    inputs = tokenizer([row.text for row in rows], truncation=True, max_length=max_length, padding="max_length")
    with torch.device("cpu"):  # tests on all devices share it
        labels = torch.tensor([demo.LABELS.index(row.label) for row in rows])
        tensors = {name: torch.tensor(inputs[name]) for name in ("input_ids", "attention_mask")} | {"labels": labels}
    return [{name: tensor[i : i + size] for name, tensor in tensors.items()} for i in range(0, count * size, size)]


@functools.cache
def _encoder(layers: int) -> nn.Module:
    torch.manual_seed(0)
    path = _found(demo.find_model)
    with torch.device("cpu"):
        return AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=2, num_hidden_layers=layers, hidden_dropout_prob=0.0, dtype=torch.float32
        )


def encoder(layers: int = 2) -> nn.Module:
    """The first layers of all-MiniLM-L6-v2, with a head for two labels: the same each time, on the default device."""
    return copy.deepcopy(_encoder(layers)).to(torch.get_default_device())
