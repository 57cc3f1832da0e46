import dataclasses
import json

import numpy as np
import peft
import pytest

import vblora
from vblora.config import BEYOND_PEFT, PEFT_METADATA


def test_names_and_defaults_are_pefts():
    ours = {field.name: field.default for field in dataclasses.fields(vblora.VBLoRAConfig)}
    theirs = peft.VBLoRAConfig()
    beyond = {name: ours.pop(name) for name in BEYOND_PEFT}
    assert beyond == {
        "num_candidates": 128, "seed": None, "init": "paper", "pad": False, "scaling": 1.0, "train_scales": False,
    }  # fmt: skip
    for name, default in ours.items():
        assert getattr(theirs, name) == default, name
    left_out = set(vars(theirs)) - set(ours) - PEFT_METADATA
    assert left_out == set()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"r": 0}, ValueError, "`r` is 0"),
        ({"r": 2.0}, TypeError, "`r` is 2.0"),
        ({"topk": True}, TypeError, "`topk` is True"),
        ({"topk": 9, "num_vectors": 8}, ValueError, "`topk` is 9.*8"),
        ({"init": "zero"}, ValueError, "`init` is 'zero'"),
        ({"train_scales": 1}, TypeError, "`train_scales` is 1"),
        ({"pad": "no"}, TypeError, "`pad` is 'no'"),
        ({"scaling": 0}, ValueError, "`scaling` is 0.0"),
        ({"scaling": float("inf")}, ValueError, "`scaling` is inf"),
        ({"num_candidates": 0}, ValueError, "`num_candidates` is 0"),
        ({"num_candidates": 1.5}, TypeError, "`num_candidates` is 1.5"),
        ({"num_candidates": 2, "topk": 3}, ValueError, "`num_candidates` is 2.*`topk`, 3"),
        ({"seed": 2**63}, ValueError, "`seed` is 9223372036854775808"),
        ({"seed": "0"}, TypeError, "`seed` is '0'"),
        ({"vblora_dropout": 1.0}, ValueError, "vblora_dropout"),
        ({"vblora_dropout": -0.1}, ValueError, "vblora_dropout"),
        ({"init_vector_bank_bound": 0.0}, ValueError, "init_vector_bank_bound"),
        ({"init_logits_std": float("nan")}, ValueError, "init_logits_std"),
        ({"vblora_dropout": "0.1"}, TypeError, "vblora_dropout"),
        ({"layers_to_transform": "1"}, TypeError, "layers_to_transform"),
        ({"layers_to_transform": [1.0]}, TypeError, "layers_to_transform"),
        ({"bias": "some"}, ValueError, "vblora_only"),
        ({"target_modules": 3}, TypeError, "target_modules"),
        ({"target_modules": [3]}, TypeError, "target_modules"),
        ({"target_modules": "(q"}, ValueError, "not a valid regular expression"),
        ({"modules_to_save": "classifier"}, TypeError, "modules_to_save"),
        ({"layers_pattern": "h"}, ValueError, "layers_to_transform"),
        ({"layers_to_transform": 1, "target_modules": ".*q"}, ValueError, "layers_to_transform"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        vblora.VBLoRAConfig(**arguments)


def test_names_and_defaults_of_other_methods_are_pefts():
    for ours, theirs in ((vblora.LoraConfig(), peft.LoraConfig()), (vblora.VeraConfig(), peft.VeraConfig())):
        for field in dataclasses.fields(ours):
            if field.name != "exclude_modules" or hasattr(theirs, field.name):  # PEFT's VeRA has none
                assert getattr(theirs, field.name) == field.default, field.name
    left_out = set(vars(peft.VeraConfig())) - {field.name for field in dataclasses.fields(vblora.VeraConfig)}
    assert left_out <= PEFT_METADATA


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        ("LoraConfig", {"r": 0}, ValueError, "`r` is 0"),
        ("LoraConfig", {"lora_alpha": 0}, ValueError, "`lora_alpha` is 0"),
        ("LoraConfig", {"lora_alpha": float("inf")}, ValueError, "`lora_alpha` is inf"),
        ("LoraConfig", {"lora_alpha": "8"}, TypeError, "`lora_alpha` is '8'"),
        ("LoraConfig", {"use_rslora": 1}, TypeError, "`use_rslora` is 1"),
        ("LoraConfig", {"init_lora_weights": "pissa"}, ValueError, "`init_lora_weights` is 'pissa'"),
        ("LoraConfig", {"lora_dropout": 1.0}, ValueError, "`lora_dropout` is 1.0"),
        ("LoraConfig", {"bias": "vblora_only"}, ValueError, '`bias` is .*"lora_only"'),
        ("LoraConfig", {"use_dora": True}, ValueError, "use_dora"),
        ("LoraConfig", {"rank_pattern": {"q": 2}}, ValueError, "rank_pattern"),
        ("LoraConfig", {"target_modules": "(q"}, ValueError, "not a valid regular expression"),
        ("VeraConfig", {"r": True}, TypeError, "`r` is True"),
        ("VeraConfig", {"projection_prng_key": 2**63}, ValueError, "`projection_prng_key` is 9223372036854775808"),
        ("VeraConfig", {"projection_prng_key": None}, TypeError, "`projection_prng_key` is None"),
        ("VeraConfig", {"d_initial": "1"}, TypeError, "`d_initial` is '1'"),
        ("VeraConfig", {"save_projection": 1}, TypeError, "`save_projection` is 1"),
        ("VeraConfig", {"init_weights": None}, TypeError, "`init_weights` is None"),
        ("VeraConfig", {"vera_dropout": -1}, ValueError, "`vera_dropout` is -1"),
        ("TiedLoraConfig", {"r": 1.5}, TypeError, "`r` is 1.5"),
        ("TiedLoraConfig", {"lora_alpha": -1}, ValueError, "`lora_alpha` is -1"),
        ("TiedLoraConfig", {"bias": "lora_only"}, ValueError, '`bias` is .*"tied_lora_only"'),
    ],
)
def test_other_methods_refuse(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(vblora, kind)(**arguments)


def test_scalings():
    assert vblora.LoraConfig(r=4, lora_alpha=6).scaling == 1.5
    assert vblora.LoraConfig(r=4, lora_alpha=6, use_rslora=True).scaling == 3.0
    assert vblora.TiedLoraConfig(r=4, lora_alpha=6).scaling == 1.5


def test_round_trip():
    config = vblora.VBLoRAConfig(r=3, target_modules={"b", "a"}, bias="all")
    assert config.target_modules == ["a", "b"]
    assert vblora.VBLoRAConfig.from_dict(config.to_dict()) == config
    config = vblora.VBLoRAConfig(layers_to_transform=range(2), init_logits_std=np.float32(0.5), target_modules=("a",))
    assert vblora.VBLoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert vblora.VBLoRAConfig.from_dict({"peft_type": "VBLORA", "task_type": "SEQ_CLS", "r": 3}).r == 3
    with pytest.raises(ValueError, match="`rank`"):
        vblora.VBLoRAConfig.from_dict({"rank": 3})
    for config in (
        vblora.VeraConfig(r=3, d_initial=np.float32(0.5)),
        vblora.TiedLoraConfig(),
        vblora.LoraConfig(bias="all"),
    ):
        assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
