"""PEFT's calls, and what they are here: each row runs and does what PEFT's call does to the model's output.

``python -m tests.test_peft_calls`` writes the table of docs/peft.md anew.
"""

import ast
import re
from pathlib import Path

import peft
import pytest
import torch

import vblora
from tests.small_models import bert

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs" / "peft.md"
CALLS = {
    "get_peft_model(model, config)": "vblora.inject(model, config)",
    "peft_model.print_trainable_parameters()": "vblora.print_trainable_parameters(model)",
    "peft_model.save_pretrained(directory)": "vblora.save(model, directory)",
    "PeftModel.from_pretrained(base, directory)": "vblora.load(base, directory)",
    "PeftModel.from_pretrained(base, directory, is_trainable=True)": "vblora.load(base, directory, is_trainable=True)",
    'peft_model.load_adapter(directory, "b")': 'vblora.load(model, directory, adapter_name="b")',
    'peft_model.add_adapter("b", config)': 'vblora.inject(model, config, adapter_name="b")',
    'peft_model.set_adapter("default")': 'vblora.set_adapter(model, "default")',
    "peft_model.active_adapters": "vblora.active_adapters(model)",
    'peft_model.delete_adapter("default")': 'vblora.delete_adapter(model, "default")',
    "with peft_model.disable_adapter(): ...": "with vblora.disabled(model): ...",
    "peft_model.merge_adapter()": "vblora.merge(model)",
    "peft_model.unmerge_adapter()": "vblora.unmerge(model)",
    "peft_model.merge_and_unload()": "vblora.eject(vblora.merge(model, release=True))",
    "peft_model.unload()": "vblora.eject(model)",
    "get_peft_model_state_dict(peft_model)": "vblora.adapter_state_dict(model)",
}
SIZES = {"num_vectors": 16, "vector_length": 8, "target_modules": ["query", "value"]}
IDS = torch.arange(12).view(2, 6)
TABLE = re.compile(r"^\| PEFT \| vblora \|\n(?:\|.*\n)+", re.MULTILINE)


def table() -> str:
    rows = [f"| `{theirs}` | `{ours}` |" for theirs, ours in CALLS.items()]
    return "\n".join(["| PEFT | vblora |", "|---|---|", *rows, ""])


def base_model():
    torch.manual_seed(0)
    return bert().eval()


@pytest.mark.parametrize(("theirs", "ours"), CALLS.items(), ids=CALLS)
def test_a_row_runs(theirs, ours, tmp_path):
    config = peft.VBLoRAConfig(**SIZES, init_vector_bank_bound=0.5)
    model, base = base_model(), base_model()
    plain = base(IDS).logits
    if "inject(model, config)" not in ours:
        vblora.inject(model, config)
        with torch.no_grad():
            model.vblora.default.bank.vectors.normal_()
        vblora.save(model, tmp_path)
        if "unmerge" in ours:
            vblora.merge(model)
    adapted = model(IDS).logits
    names = {"vblora": vblora, "model": model, "base": base, "config": config, "directory": tmp_path, "seen": []}
    exec(ours.replace("...", "seen.append(model(__import__('torch').arange(12).view(2, 6)).logits)"), names)
    after = names["seen"][0] if names["seen"] else (base if "load(base" in ours else model)(IDS).logits
    without = "disable" in theirs or theirs.endswith(".unload()") or "delete" in theirs
    if "inject(model, config)" in ours:
        assert list(model.vblora) == ["default"] and not torch.equal(after, plain)
    else:
        torch.testing.assert_close(after, plain if without else adapted)
        assert not torch.allclose(adapted, plain)
    if '"b"' in ours:
        assert list(model.vblora) == ["default", "b"]


def test_the_docs_have_these_rows():
    assert TABLE.findall(DOCS.read_text(encoding="utf-8")) == [table()], "run python -m tests.test_peft_calls"


def test_calls_of_the_table_are_pefts():
    for theirs in CALLS:
        name = re.search(r"(\w+)(?=\(|$)", theirs)[1]
        assert any(hasattr(kind, name) for kind in (peft, peft.PeftModel, peft.tuners.tuners_utils.BaseTuner)), name


def functions_of(path: Path) -> set[str]:
    return {
        node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    }


def test_each_feature_names_a_test_that_exists():
    text = DOCS.read_text(encoding="utf-8").partition("## Feature by feature")[2]
    path = None
    rows = [
        line.strip("|\n ").split(" | ")
        for line in text.splitlines()
        if line.startswith("| ") and "vblora |" not in line
    ]
    assert len(rows) > 30
    for feature, *_, shown in rows:
        shown = shown.removeprefix("the same")  # as in the row above
        named = re.findall(r"`([^`]+)`", shown)
        assert named or not shown, f"{feature!r} is shown by no test"
        for name in named:
            file, _, function = name.partition("::")
            if not file.endswith(".py"):  # a test of the file that was named last
                file, function = "", name
            if file:
                path = TESTS / file if (TESTS / file).exists() else TESTS.parent / file
            assert path is not None and path.exists(), f"{feature!r}: there is no {name}"
            assert not function or function in functions_of(path), f"{feature!r}: {path.name} has no {function}"


if __name__ == "__main__":
    DOCS.write_text(TABLE.sub(lambda _: table(), DOCS.read_text(encoding="utf-8")), encoding="utf-8")
