"""`vblora plot`, and the numbers that it draws."""

import json
import math

import pytest
import torch

import vblora
from tests.small_models import Net
from vblora.cli import main

pytestmark = pytest.mark.usefixtures("rendered")

CONFIG = vblora.VBLoRAConfig(
    r=2, num_vectors=12, vector_length=4, topk=2, num_candidates=6, target_modules=["up", "down"], seed=3
)


@pytest.fixture
def adapter(tmp_path):
    model = vblora.inject(Net(blocks=2), CONFIG)
    adapter = model.vblora.default
    with torch.no_grad():
        adapter.logits[0, 3] += 0.25  # of row 0, four candidates were tried
        adapter.logits[5, 0] = adapter.logits[5, 1]  # equal weights
    vblora.save(model, tmp_path / "adapter")
    return adapter, tmp_path / "adapter"


def numbers(folder, capsys) -> dict:
    assert main(["plot", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_numbers(adapter, capsys):
    adapter, folder = adapter
    found = numbers(folder, capsys)
    chosen = [row.topk(2) for row in adapter.logits.detach()]
    vectors = [adapter.candidates[i][row.indices].tolist() for i, row in enumerate(chosen)]
    weights = [row.values.softmax(0).tolist() for row in chosen]
    assert found["counts"] == [sum(v in row for row in vectors) for v in range(12)]
    assert found["depths"][0] == 4 and found["depths"][5] == 1 and sum(found["depths"]) == 5
    entropies = [-sum(w * math.log(w) for w in row) / math.log(2) for row in weights]
    assert found["entropies"] == pytest.approx(entropies, abs=1e-5)
    assert found["entropies"][5] == pytest.approx(1)

    of_layer = adapter.num_subvectors // 4  # four layers of the same sizes
    use = torch.zeros(4, 12)
    for row, (names, shares) in enumerate(zip(vectors, weights, strict=True)):
        for name, share in zip(names, shares, strict=True):
            use[row // of_layer, name] += share
    expected = torch.nn.functional.cosine_similarity(use[:, None], use[None], dim=-1)
    assert torch.allclose(torch.tensor(found["sharing"]), expected, atol=1e-5)
    assert found["summary"]["vectors_used"] == sum(count > 0 for count in found["counts"])


def test_an_adapter_to_deploy_has_no_depths(adapter, tmp_path, capsys):
    assert main(["convert", str(adapter[1]), str(tmp_path / "deploy"), "--form", "deploy"]) == 0
    capsys.readouterr()
    before, after = numbers(adapter[1], capsys), numbers(tmp_path / "deploy", capsys)
    assert after["depths"] is None and after["counts"] == before["counts"]


def test_the_picture(adapter, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["plot", str(adapter[1])]) == 0
    assert (adapter[1] / "bank.png").read_bytes().startswith(b"\x89PNG")
    assert "deepest 4" in capsys.readouterr().out
    assert main(["plot", str(adapter[1]), "--output", str(tmp_path / "x.gif")]) == 2
    assert "must be a .png file" in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_picture(adapter, monkeypatch, capsys):
    figure = pytest.importorskip("matplotlib.figure")

    def fail(_figure, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure.Figure, "savefig", fail)
    before = sorted(adapter[1].iterdir())
    assert main(["plot", str(adapter[1])]) == 1
    assert "bank.png cannot be written" in capsys.readouterr().err
    assert sorted(adapter[1].iterdir()) == before


def test_other_methods_have_no_bank(tmp_path, capsys):
    vblora.save(vblora.inject(Net(blocks=1), vblora.LoraConfig(target_modules=["up"])), tmp_path / "lora")
    assert main(["plot", str(tmp_path / "lora"), "--json"]) == 2
    assert "is a lora adapter, which has no bank" in capsys.readouterr().err
    for options, told in (
        (["x.jpg"], "must be a .png file."),
        (["x.png", "--json"], "--output has no effect, because --json"),
    ):
        assert main(["plot", str(tmp_path / "lora"), "--output", *options]) == 2
        assert told in capsys.readouterr().err
