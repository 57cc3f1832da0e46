"""Adapters whose last sub-vectors are cut (``pad=True``), in each form of a folder."""

import copy
import json
import re

import pytest
import safetensors.torch
import torch

import vblora
from tests.small_models import bert, gpt2, llama, relative_error
from vblora.checkpoint import folder
from vblora.checkpoint.folder import CONFIG_FILE, TENSORS_FILE
from vblora.cli import main

from .test_native import change_description
from .test_peft import IDS, ROUNDING, from_peft, ours, outputs, shaken

PAD = {"pad": True, "vector_length": 24, "target_modules": "all-linear"}  # of 16, 32, 64, 96 and 128 one is a multiple


@pytest.mark.parametrize("make", [bert, llama, gpt2])
@pytest.mark.parametrize("form", ["resume", "deploy"])
@pytest.mark.parametrize("num_candidates", [None, 6])
def test_comes_back_to_the_bit(make, form, num_candidates, tmp_path):
    base, model = ours(make, num_candidates=num_candidates, **PAD)
    vblora.save(model, tmp_path / "one", form=form)
    loaded = vblora.load(copy.deepcopy(base), tmp_path / "one")
    assert torch.equal(outputs(loaded), outputs(model))
    assert not torch.equal(outputs(base), outputs(model))
    assert loaded.vblora.default.num_subvectors == model.vblora.default.num_subvectors
    vblora.save(loaded, tmp_path / "two", form=form)
    assert (tmp_path / "one" / TENSORS_FILE).read_bytes() == (tmp_path / "two" / TENSORS_FILE).read_bytes()


def test_training_goes_on(tmp_path):
    base, model = ours(bert, **PAD)
    vblora.save(model, tmp_path)
    loaded = vblora.load(copy.deepcopy(base), tmp_path, is_trainable=True)
    for other in (model, loaded):
        other(IDS).logits.square().sum().backward()
    for one, other in zip(model.vblora.default.parameters(), loaded.vblora.default.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("make", [bert, llama, gpt2])
@pytest.mark.parametrize("r", [1, 3])
def test_peft_computes_the_same_from_lora(make, r, tmp_path):
    base, model = ours(make, r=r, **PAD)
    vblora.save(model, tmp_path, form="lora")
    assert relative_error(outputs(from_peft(base, tmp_path)), outputs(model)) < ROUNDING
    tensors = safetensors.torch.load_file(tmp_path / TENSORS_FILE)
    for target in model.vblora.default.targets:
        sizes = [tensors[f"base_model.model.{target.name}.lora_{side}.weight"].shape for side in "AB"]
        assert sizes == [(r, target.in_features), (target.out_features, r)]


@pytest.mark.parametrize("form", ["peft", "peft-topk"])
def test_pefts_form_is_refused(form, tmp_path, capsys):
    model = ours(llama, **PAD)[1]
    message = (
        r'`form` is "{}", but layer `model\.layers\.0\.self_attn\.q_proj` \(32 -> 32\).*`vector_length`=24.*"lora"'
    )
    with pytest.raises(ValueError, match=message.format(form)):
        vblora.save(model, tmp_path / "out", form=form)
    vblora.save(model, tmp_path / "adapter")
    assert main(["convert", str(tmp_path / "adapter"), str(tmp_path / "out"), "--form", form]) == 2
    assert "sub-vectors that are cut" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["info", str(tmp_path / "adapter")]) == 0
    assert re.search(r"pad\W+True\b", capsys.readouterr().out)


@pytest.mark.parametrize("form", ["peft", "peft-topk", "resume"])
def test_where_every_width_is_divided_it_changes_nothing(form, tmp_path):
    base, model = ours(bert, pad=True)
    vblora.save(model, tmp_path, form=form)
    if form != "resume":
        assert "pad" not in json.loads((tmp_path / CONFIG_FILE).read_text())
        assert relative_error(outputs(from_peft(base, tmp_path)), outputs(model)) < ROUNDING
    loaded = vblora.load(copy.deepcopy(base), tmp_path)
    assert relative_error(outputs(loaded), outputs(model)) < ROUNDING
    if form != "peft-topk":  # over an adapter with the other `pad`, too
        other = shaken(ours(bert, pad=form == "peft")[1])
        vblora.load(other, tmp_path)
        assert relative_error(outputs(other), outputs(model)) < ROUNDING


def test_a_folder_of_before_there_was_pad(tmp_path):
    base, model = ours(bert)
    vblora.save(model, tmp_path)
    with safetensors.safe_open(tmp_path / TENSORS_FILE, framework="pt") as file:
        description = json.loads(file.metadata()["vblora"])
    assert description["config"].pop("pad") is False
    tensors = safetensors.torch.load_file(tmp_path / TENSORS_FILE)
    safetensors.torch.save_file(tensors, tmp_path / TENSORS_FILE, {"vblora": json.dumps(description)})
    with pytest.warns(UserWarning, match="is not what"):
        loaded = vblora.load(copy.deepcopy(base), tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"pad": False}, "`vector_length` is 24, but must divide"),
        ({"pad": 1}, "`pad` is 1"),
        ({"vector_length": 16}, r"`bank\.vectors` is \(16, 24\)"),
        ({"targets": [["bert.encoder.layer.0.attention.self.query", 32, 50]]}, "integers of|must be"),
        ({"targets": [["x", 24 << 40, 8]]}, "integers of|must be"),
    ],
)
@pytest.mark.parametrize("form", ["resume", "deploy"])
def test_a_bad_folder_is_refused(form, damage, message, tmp_path):
    base, model = ours(bert, **PAD)
    vblora.save(model, tmp_path, form=form)
    change_description(tmp_path, **damage)
    with pytest.raises(ValueError, match=message):
        vblora.load(base, tmp_path)
    assert not hasattr(base, "vblora")
    with pytest.raises(ValueError, match=message):
        folder.read(tmp_path)  # what the commands do, without a model


def test_what_is_cut_off_may_overflow(tmp_path):
    choice = {"pad": True, "vector_length": 40, "target_modules": ["query"], "scaling": 4.0}
    base, model = ours(bert, **choice)
    with torch.no_grad():
        model.vblora.default.bank.vectors[:, 32:] = 3e38  # twice that, the root of 4, is infinite
    vblora.save(model, tmp_path / "lora", form="lora")
    assert relative_error(outputs(from_peft(base, tmp_path / "lora")), outputs(model)) < ROUNDING
    with torch.no_grad():
        model.vblora.default.bank.vectors[:, 31] = 3e38
    with pytest.raises(ValueError, match=r"the update of layer `.*query` is not finite"):
        vblora.save(model, tmp_path / "other", form="lora")
    assert not (tmp_path / "other").exists()
