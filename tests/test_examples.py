"""The examples run as they are: each script with --quick, the notebook in full."""

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# What each script prints last, with any numbers.
PRINTS = {
    "by_hand.py": "Loaded into a fresh network: ",
    "chat.py": "Without it: ",
    "classifier.py": "of 12 held-out texts are right",
    "serving.py": "None: b'> ",
    "vit.py": "of 128 new images are right",
}
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_all_are_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == PRINTS.keys()


@pytest.mark.parametrize("script", PRINTS)
def test_a_script(script, tmp_path, monkeypatch, capsys):
    if script == "chat.py":
        pytest.importorskip("trl")
    assert len((EXAMPLES / script).read_text(encoding="utf-8").splitlines()) < 80
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "output"
    monkeypatch.setattr(sys, "argv", [script, "--quick", "--output", str(output)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert output.exists()
    assert PRINTS[script] in capsys.readouterr().out


@pytest.mark.slow
def test_the_notebook(tmp_path, monkeypatch, capsys):
    """Without Jupyter: its cells are plain Python, and run in order."""
    pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    names = {"display": print}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["execution_count"], "the notebook was saved without running it"
            exec(compile("".join(cell["source"]), "tour.ipynb", "exec"), names)
    assert "The loaded model gives the same bits" in capsys.readouterr().out
