"""How good predictions and completions are."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..errors import CommandError


def bleu(written: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU, in points, of completions each of which may have several references, as sacrebleu computes it."""
    import sacrebleu

    most = max(map(len, references))
    # sacrebleu takes the first references of all, then the second ones; None where there is no more
    columns: list[list[Any]] = [[one[i] if i < len(one) else None for one in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu([text.strip() for text in written], columns).score)


def check_bleu(count: int | None) -> None:
    """Refuses to compute BLEU without sacrebleu, before anything slow."""
    if count is not None and find_spec("sacrebleu") is None:
        raise CommandError("--bleu: the package sacrebleu is not installed. pip install sacrebleu")


def pearson(one: "np.ndarray[Any, Any]", other: "np.ndarray[Any, Any]") -> float:
    """The correlation of two series; 0 if one of them is constant."""
    one, other = (series.astype(np.float64) - series.mean(dtype=np.float64) for series in (one, other))
    norms = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / norms) if norms > 0 else 0.0


def spearman(one: "np.ndarray[Any, Any]", other: "np.ndarray[Any, Any]") -> float:
    """The correlation of two series' ranks. Equal values share the mean of their ranks."""
    return pearson(_ranks(one), _ranks(other))


def _ranks(series: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    _, places, counts = np.unique(series, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[places]
