"""What a head predicts: one of several classes, or a score."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Row
from .scores import pearson, spearman

Array = np.ndarray[Any, Any]


class Head(Protocol):
    """What differs between classes and scores. Outputs are ``(rows, classes)``, or ``(rows, 1)`` for a score."""

    metric: str  # by which epochs are compared

    def target(self, row: Row) -> float | int:
        """The label that the model is trained on."""

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor: ...

    def measure(self, outputs: Array, labels: Array) -> dict[str, float]:
        """All metrics of a model's outputs."""

    def predict(self, outputs: Array) -> list[dict[str, object]]:
        """What to write of each row."""

    def model_options(self) -> dict[str, Any]:
        """Of transformers' configuration."""


@dataclass
class Classes:
    labels: list[str]
    metric = "accuracy"

    def target(self, row: Row) -> int:
        return self.labels.index(row.label)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels)

    def measure(self, outputs: Array, labels: Array) -> dict[str, float]:
        return {"accuracy": float((outputs.argmax(-1) == labels).mean())}

    def predict(self, outputs: Array) -> list[dict[str, object]]:
        shares = torch.from_numpy(outputs).double().softmax(-1)
        return [
            {"predicted": self.labels[int(row.argmax())], "probability": round(float(row.max()), 6)} for row in shares
        ]

    def model_options(self) -> dict[str, Any]:
        return {
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "problem_type": "single_label_classification",
        }


@dataclass
class Scores:
    """The head learns a score less the mean, in units of the standard deviation, so that its learning rate suits any scale."""

    mean: float
    deviation: float
    metric = "pearson"

    def target(self, row: Row) -> float:
        return (float(row.label) - self.mean) / self.deviation

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(outputs[:, 0], labels)

    def measure(self, outputs: Array, labels: Array) -> dict[str, float]:
        return {"pearson": pearson(outputs[:, 0], labels), "spearman": spearman(outputs[:, 0], labels)}

    def predict(self, outputs: Array) -> list[dict[str, object]]:
        return [{"predicted": float(value) * self.deviation + self.mean} for value in outputs[:, 0]]

    def model_options(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}


def find_head(labels: list[str] | None, scale: dict[str, float] | None) -> Head:
    """The head for classes, or for scores of this mean and deviation."""
    if labels is not None:
        return Classes(labels)
    assert scale is not None
    return Scores(**scale)
