"""Each row of the table of PEFT's calls in docs/peft.md runs, and does what PEFT's call does to the model's output."""

import re
from pathlib import Path

import peft
import pytest
import torch

import vblora
from tests.small_models import bert

TEXT = (Path(__file__).parent.parent / "docs" / "peft.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([^`]+)` \| `((?:with )?vblora\.[^`]+)`", TEXT.partition("## PEFT's calls")[2], re.MULTILINE)
SIZES = {"num_vectors": 16, "vector_length": 8, "target_modules": ["query", "value"]}
IDS = torch.arange(12).view(2, 6)


def base_model():
    torch.manual_seed(0)
    return bert().eval()


def test_there_are_rows():
    assert len(ROWS) == 15


@pytest.mark.parametrize(("theirs", "ours"), ROWS, ids=[theirs for theirs, _ in ROWS])
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
    after = names["seen"][0] if names["seen"] else (base if "vblora.load" in ours else model)(IDS).logits
    without = "disable" in theirs or theirs.endswith(".unload()") or "delete" in theirs
    if "inject(model, config)" in ours:
        assert list(model.vblora) == ["default"] and not torch.equal(after, plain)
    else:
        torch.testing.assert_close(after, plain if without else adapted)
        assert not torch.allclose(adapted, plain)
