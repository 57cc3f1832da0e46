"""Every warning of the package has its category."""

import ast
import warnings
from pathlib import Path

import pytest
from torch import nn

import vblora

PACKAGE = Path(vblora.__file__).parent


def test_every_warning_is_raised_with_the_package_category():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "warn"):
                category = [ast.unparse(argument) for argument in node.args[1:2]]
                found.append((f"{path.relative_to(PACKAGE)}:{node.lineno}", category))
    assert len(found) > 5
    assert [place for place, category in found if category != ["VBLoRAWarning"]] == []


def test_a_filter_turns_warnings_into_errors():
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    assert issubclass(vblora.VBLoRAWarning, UserWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("error", vblora.VBLoRAWarning)
        with pytest.raises(vblora.VBLoRAWarning, match="leaves out"):
            vblora.inject(model, vblora.VBLoRAConfig(target_modules="all-linear", num_vectors=8, vector_length=4))
