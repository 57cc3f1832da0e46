"""Scores of what a model wrote."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

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
