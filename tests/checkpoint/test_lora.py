"""The export to LoRA, read by peft."""

import copy
import json

import peft
import pytest
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vblora
from tests.small_models import gpt2, llama, relative_error
from vblora.adapters import LoRAAdapter
from vblora.checkpoint import folder
from vblora.checkpoint.contents import is_finite
from vblora.checkpoint.peft import lora

from .test_peft import CASES, ROUNDING, SIZES, from_peft, ours, outputs, shaken


@pytest.mark.parametrize("num_candidates", [None, 6])
@pytest.mark.parametrize(("make", "choice"), CASES)
def test_peft_computes_the_same(make, choice, num_candidates, tmp_path):
    base, model = ours(make, num_candidates=num_candidates, **choice)
    vblora.save(model, tmp_path, form="lora")
    loaded = from_peft(base, tmp_path)
    assert relative_error(outputs(loaded), outputs(model)) < ROUNDING
    assert relative_error(outputs(base), outputs(model)) > 1e-3
    known = set(peft.LoraConfig().to_dict())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(config) <= known
    assert config["fan_in_fan_out"] == (make is gpt2)


def test_a_deployed_adapter_too(tmp_path):
    base, model = ours(gpt2)
    vblora.save(model, tmp_path / "deploy", form="deploy", bank_dtype=torch.bfloat16)
    deployed = vblora.load(copy.deepcopy(base), tmp_path / "deploy")
    vblora.save(deployed, tmp_path / "lora", form="lora")
    assert relative_error(outputs(from_peft(base, tmp_path / "lora")), outputs(deployed)) < ROUNDING
    tensors = safetensors.torch.load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert tensors["base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"].shape == (2, 32)
    assert tensors["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"].shape == (96, 2)


def test_an_update_that_is_not_finite_is_refused(tmp_path):
    _, model = ours(gpt2, num_candidates=None)
    with torch.no_grad():
        model.vblora.default.logits[5] = -torch.inf
    with pytest.raises(ValueError, match=r"row 5 of `logits` has nothing finite"):
        vblora.save(model, tmp_path / "lora", form="lora")
    assert not (tmp_path / "lora").exists()


def test_is_read_back_as_a_lora(tmp_path):
    base, model = ours(gpt2)
    vblora.save(model, tmp_path, form="lora")
    loaded = vblora.load(copy.deepcopy(base), tmp_path)
    assert isinstance(loaded.vblora.default, LoRAAdapter)
    assert relative_error(outputs(loaded), outputs(model)) < ROUNDING
    with pytest.raises(ValueError, match="another config"):
        vblora.load(model, tmp_path)


def test_pefts_auto_classes_find_the_model(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    model = shaken(vblora.inject(base, vblora.VBLoRAConfig(**SIZES)))
    for form, auto in (("lora", peft.AutoPeftModelForCausalLM), ("peft", peft.AutoPeftModel)):
        vblora.save(model, tmp_path / form, form=form)
        loaded = auto.from_pretrained(tmp_path / form)
        assert relative_error(outputs(loaded), outputs(model)) < ROUNDING


def test_all_layers_are_composed_in_one_call(tmp_path):
    _, model = ours(gpt2)
    vblora.save(model, tmp_path / "deploy", form="deploy")
    contents, _ = folder.read(tmp_path / "deploy")
    calls = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    with Counting():
        lora.encode(contents)
    assert calls.count(torch.ops.vblora.compose.default) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_element_tells_whether_a_tensor_is_finite(dtype):
    tensor = torch.randn(5, 7).to(dtype)
    assert is_finite(tensor) and is_finite(tensor.T) and is_finite(tensor[:0])
    for value in (torch.nan, torch.inf, -torch.inf):
        other = tensor.clone()
        other[3, 4] = value
        assert not is_finite(other)
