"""A small table, and `vblora finetune` run on it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tables import make_rows, write_csv
from vblora.cli import main
from vblora.finetune import pictures


@pytest.fixture
def rendered() -> None:
    """For tests that want the pictures, too."""


@pytest.fixture(autouse=True)
def unrendered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are drawn, but not rendered into their files, which takes longer than training a tiny model."""
    if "rendered" not in request.fixturenames:
        monkeypatch.setattr(pictures, "_save", lambda _, path: path.touch())


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "rows.csv", make_rows(120))


@pytest.fixture
def finetune(tiny_model: Path, tmp_path: Path, one_thread: None) -> Callable[..., int]:
    """Runs ``vblora finetune`` on the tiny model into ``tmp_path/"out"``, unless told otherwise: the exit code."""

    def run(*arguments: str | Path, model: str | Path | None = tiny_model, output: Path | None = None) -> int:
        arguments = ["--epochs", "1", "--num-vectors", "16", "--vector-length", "16", "--r", "2", *arguments]
        if model is not None:
            arguments += ["--model", model]
        return main(["finetune", *map(str, arguments), "--output", str(output or tmp_path / "out")])

    return run
