"""Models that PEFT has adapted, and PEFT on models that vblora has adapted: both are refused, and nothing changes."""

import sys

import peft
import pytest
import torch
from torch import nn

import vblora
from tests.small_models import llama
from vblora.serving import AdapterStore

CONFIG = vblora.VBLoRAConfig(num_vectors=16, vector_length=8, target_modules="all-linear")
REFUSED = "`model` holds PEFT's adapter: `.*(q_proj|lm_head)` is PEFT's .*merge_and_unload"


def lora(**fields):
    return peft.LoraConfig(**{"r": 8, "target_modules": ["q_proj"]} | fields)


def heads_only():  # no tuner layer, but a wrapper around a module
    return peft.get_peft_model(
        llama(), lora(target_modules=["v_proj"], modules_to_save=["lm_head"])
    ).base_model.model.lm_head


def in_place():
    model = llama()
    peft.inject_adapter_in_model(lora(), model)
    return model


def merged():
    model = peft.get_peft_model(llama(), lora())
    model.merge_adapter()
    return model


def as_it_is(model: nn.Module) -> list:
    return [(name, type(module)) for name, module in model.named_modules()] + [
        (name, parameter.requires_grad) for name, parameter in model.named_parameters()
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda: peft.get_peft_model(llama(), lora()),
        lambda: peft.get_peft_model(
            llama(), peft.VBLoRAConfig(num_vectors=16, vector_length=8, target_modules=["q_proj"])
        ),
        lambda: nn.Sequential(heads_only()),
        in_place,
        merged,
    ],
    ids=["lora", "vblora", "modules_to_save", "inject_adapter_in_model", "merged"],
)
def test_a_model_with_pefts_layers_is_refused(make, tmp_path):
    model = make()
    before = as_it_is(model)
    vblora.save(vblora.inject(llama(), CONFIG), tmp_path)
    for change in (
        lambda: vblora.inject(model, CONFIG),
        lambda: vblora.inject(model, vblora.LoraConfig(target_modules=["k_proj"])),
        lambda: vblora.load(model, tmp_path),
        lambda: AdapterStore(model, tmp_path.parent),
    ):
        with pytest.raises(ValueError, match="holds PEFT's adapter"):
            change()
        assert as_it_is(model) == before


def test_what_the_message_says_works(tmp_path):
    model = peft.get_peft_model(llama(), lora(init_lora_weights=False)).eval()
    with pytest.raises(ValueError, match=REFUSED):
        vblora.inject(model, CONFIG)
    ids = torch.arange(3, 9)[None]
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    base = model.unload()
    torch.testing.assert_close(vblora.load(base, tmp_path)(ids).logits, expected)
    vblora.eject(base)
    unloaded = peft.get_peft_model(base, lora(init_lora_weights=False)).merge_and_unload()
    vblora.inject(unloaded, CONFIG)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], ["lm_head"]])
@pytest.mark.parametrize(
    "add",
    [peft.get_peft_model, lambda model, config: peft.inject_adapter_in_model(config, model)],
    ids=["get_peft_model", "inject_adapter_in_model"],
)
def test_peft_refuses_an_injected_model(add, targets):
    model = vblora.inject(llama(), CONFIG)
    before = as_it_is(model)
    with pytest.raises(ValueError, match="holds adapters of vblora, which PEFT would freeze"):
        add(model, lora(target_modules=targets))
    assert as_it_is(model) == before
    add(vblora.eject(model), lora(target_modules=targets))


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_prompts_are_refused_unless_the_adapter_is_frozen(kind, tmp_path):
    model = vblora.inject(llama(), CONFIG)
    before = as_it_is(model)
    with pytest.raises(ValueError, match=f"PEFT's {kind.__name__} would freeze. Train one after the other"):
        peft.get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert as_it_is(model) == before
    vblora.save(model, tmp_path)
    peft.get_peft_model(vblora.load(llama(), tmp_path), kind(task_type="CAUSAL_LM", num_virtual_tokens=2))


def test_a_save_notices_peft_that_was_imported_later(tmp_path, monkeypatch):
    own = peft.tuners.tuners_utils.BaseTuner.inject_adapter
    monkeypatch.setattr(peft.tuners.tuners_utils.BaseTuner, "inject_adapter", getattr(own, "__wrapped__", own))
    monkeypatch.delitem(sys.modules, "peft.tuners.tuners_utils")
    model = vblora.inject(llama(), CONFIG)
    peft.get_peft_model(model, lora(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=REFUSED):
        vblora.save(model, tmp_path)
    assert not list(tmp_path.iterdir())
