"""torch.export of a model with its adapter, and of one that has become a plain model."""

import subprocess
import sys

import pytest
import torch

import vblora
from tests.small_models import bert, gpt2, llama, relative_error

SIZES = {"r": 2, "num_vectors": 16, "vector_length": 8, "init_vector_bank_bound": 1.0}
DYNAMIC = ({0: torch.export.Dim("batch", min=1, max=64)},)


def ids(batch: int) -> tuple[torch.Tensor]:
    return (torch.randint(3, 50, (batch, 9)),)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("make", [bert, lambda: llama(use_cache=False), lambda: gpt2(use_cache=False)])
def test_an_injected_model_exports(make, strict):
    model = vblora.inject(make().eval(), vblora.VBLoRAConfig(**SIZES))
    program = torch.export.export(model, ids(3), dynamic_shapes=DYNAMIC, strict=strict)
    composed = [node for node in program.graph.nodes if node.target is torch.ops.vblora.admixture.default]
    assert len(composed) == 1
    other = ids(5)
    assert relative_error(program.module()(*other).logits, model(*other).logits) < 1e-6


def test_a_merged_model_exports_and_runs_without_us(tmp_path):
    model = vblora.inject(bert(return_dict=False).eval(), vblora.VBLoRAConfig(**SIZES))
    vblora.merge(model)
    x = ids(4)
    merged = torch.export.export(model, x, dynamic_shapes=DYNAMIC)
    assert not any(node.target is torch.ops.vblora.admixture.default for node in merged.graph.nodes)
    vblora.eject(vblora.merge(vblora.unmerge(model), release=True))
    program = torch.export.export(model, x, dynamic_shapes=DYNAMIC)
    expected = model(*x)[0]
    assert relative_error(merged.module()(*x)[0], expected) < 1e-6
    assert not any("vblora" in name for name in program.state_dict)
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((x, expected.detach()), tmp_path / "expected.pt")
    script = (
        "import sys, torch, transformers; x, expected = torch.load('expected.pt')\n"
        "out = torch.export.load('model.pt2').module()(*x)[0]\n"
        "assert 'vblora' not in sys.modules; torch.testing.assert_close(out, expected)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
