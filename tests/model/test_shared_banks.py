"""Which of the adapters that share a bank train it: whichever is active, in whichever model, whatever the others do."""

import copy

import pytest
import torch
from torch import nn

import vblora
from tests.small_models import Net

CONFIG = vblora.VBLoRAConfig(r=2, num_vectors=16, vector_length=8, target_modules=["up"])


@pytest.fixture
def model() -> nn.Module:
    return vblora.inject(Net(blocks=1), CONFIG)


def trains_bank(model: nn.Module) -> bool:
    groups = {group["name"]: group["params"] for group in vblora.parameter_groups(model)}
    return "bank" in groups and all(parameter.requires_grad for parameter in groups["bank"])


def add(model: nn.Module, name: str, **options) -> None:
    vblora.inject(model, CONFIG, adapter_name=name, bank=model.vblora.default.bank, **options)


def test_an_adapter_trains_a_bank_whose_other_adapters_are_inactive(model):
    for active in ("default", []):
        copied = copy.deepcopy(model)
        vblora.set_adapter(copied, active)
        add(copied, "second")
        vblora.set_adapter(copied, "second")
        assert trains_bank(copied)
    vblora.set_adapter(model, [])
    other = vblora.inject(Net(blocks=1), CONFIG, bank=model.vblora.default.bank)
    assert trains_bank(other)


def test_an_adapter_that_does_not_train_the_bank_leaves_it_to_others(model):
    add(model, "second", freeze_bank=True)
    assert trains_bank(model)
    for active, trained in (("second", False), ("default", True), (["default", "second"], True), ("second", False)):
        vblora.set_adapter(model, active)
        assert trains_bank(model) == trained, active
    vblora.delete_adapter(model, "default")
    assert not trains_bank(model)


@pytest.mark.parametrize(
    "change", [vblora.eject, lambda model: vblora.set_adapter(model, [])], ids=["eject", "set_adapter"]
)
@pytest.mark.parametrize("layer", [False, True])
def test_what_one_model_does_leaves_the_bank_to_another(model, change, layer):
    bank = model.vblora.default.bank
    other = vblora.VBLinear(16, 16, bank=bank) if layer else vblora.inject(Net(blocks=1), CONFIG, bank=bank)
    vblora.inject(model, vblora.LoraConfig(r=2, target_modules=["up"]), adapter_name="lora")
    vblora.set_adapter(model, "lora")
    assert trains_bank(other) and [group["name"] for group in vblora.parameter_groups(model)] == ["factors"]
    vblora.set_adapter(model, "default")
    change(model)
    assert trains_bank(other)
    other(torch.randn(3, 16)).sum().backward()
    assert bank.vectors.grad.any()


def test_a_bank_that_is_frozen_by_hand_stays_frozen(model):
    model.vblora.default.bank.requires_grad_(False)
    vblora.set_adapter(model, [])
    add(model, "second")
    for active in ("second", "default"):
        vblora.set_adapter(model, active)
        assert not trains_bank(model)
