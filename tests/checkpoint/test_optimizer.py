"""A packed optimizer state goes to the parameters that it came from, or is refused."""

import copy

import pytest
import torch
from torch import nn

import vblora
from tests.small_models import Net

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
CONFIG = {"r": 2, "num_vectors": 16, "vector_length": 8, "target_modules": ["up"], "init_vector_bank_bound": 1.0}
FIELDS = {"default": {"seed": 1}, "b": {"seed": 2, "num_candidates": 6}}


@pytest.fixture
def packed(tmp_path):
    """A trained model with two adapters, each in a folder of its own, and its optimizer's packed state."""
    model = base()
    for name, fields in FIELDS.items():
        vblora.inject(model, vblora.VBLoRAConfig(**CONFIG | fields), adapter_name=name)
    vblora.set_adapter(model, ["default", "b"])
    optimizer = optimizer_of(model)
    train(model, optimizer)
    for name in FIELDS:
        vblora.save(model, tmp_path / name, adapter_name=name)
    return model, optimizer, copy.deepcopy(vblora.pack_optimizer(model, optimizer))


def base() -> nn.Module:
    torch.manual_seed(0)
    return Net(blocks=2)


def loaded(folder, *names: str) -> nn.Module:
    model = base()
    for name in names:
        vblora.load(model, folder / name, adapter_name=name, is_trainable=True)
    vblora.set_adapter(model, ["default", "b"])
    return model


def optimizer_of(model):
    return torch.optim.AdamW(vblora.parameter_groups(model))


def train(model, optimizer):
    for _ in range(3):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_adapters_that_were_loaded_in_another_order(packed, tmp_path):
    model, optimizer, state = packed
    other = loaded(tmp_path, "b", "default")
    theirs = optimizer_of(other)
    vblora.unpack_optimizer(other, theirs, state)
    for name, parameter in model.vblora.named_parameters():
        moments = theirs.state[other.vblora.get_parameter(name)]
        assert all(torch.equal(value, moments[key]) for key, value in optimizer.state[parameter].items())
    for pair in ((model, optimizer), (other, theirs)):
        train(*pair)
    torch.testing.assert_close(other(X), model(X))


def test_a_single_adapter_with_another_name_in_a_wrapped_model(packed, tmp_path):
    model = vblora.load(base(), tmp_path / "b", is_trainable=True)
    other = vblora.load(base(), tmp_path / "b", adapter_name="c", is_trainable=True)
    for each in (model, other):
        each.head.requires_grad_(True)  # beside the adapter
    optimizer, theirs = optimizer_of(model), optimizer_of(other)
    train(model, optimizer)
    wrapped = nn.ModuleDict({"module": other})  # as DistributedDataParallel names it
    vblora.unpack_optimizer(wrapped, theirs, vblora.pack_optimizer(model, optimizer))
    for ours, parameter in (
        (model.vblora.default.logits, other.vblora.c.logits),
        (model.head.weight, other.head.weight),
    ):
        assert torch.equal(optimizer.state[ours]["exp_avg"], theirs.state[parameter]["exp_avg"])


@pytest.mark.parametrize("name", FIELDS)
def test_state_of_another_seeds_logits_is_refused(name, packed, tmp_path):
    """Its columns would be those of other bank vectors."""
    saved = vblora.load(base(), tmp_path / name, is_trainable=True)
    optimizer = optimizer_of(saved)
    train(saved, optimizer)
    vblora.save(saved, tmp_path / "again")
    state = vblora.pack_optimizer(saved, optimizer)
    fresh = vblora.inject(base(), vblora.VBLoRAConfig(**CONFIG | FIELDS[name] | {"seed": 7}))
    theirs = optimizer_of(fresh)
    with pytest.raises(ValueError, match=r"of the seed \d, but the adapter's are of the seed 7. Load the adapter"):
        vblora.unpack_optimizer(fresh, theirs, state)
    assert not theirs.state
    vblora.load(fresh, tmp_path / "again")
    vblora.unpack_optimizer(fresh, theirs, state)
    moments = optimizer.state[saved.vblora.default.logits]["exp_avg"]
    assert torch.equal(theirs.state[fresh.vblora.default.logits]["exp_avg"], moments) and moments.any()


def test_other_parameters_are_refused(packed, tmp_path):
    _, _, state = packed
    other = loaded(tmp_path, "default", "b")
    for name in FIELDS:
        vblora.set_adapter(other, name)
        with pytest.raises(
            ValueError, match=r"other parameters than the optimizer's: it also has `(b|default)\.bank\.vectors`"
        ):
            vblora.unpack_optimizer(other, theirs := optimizer_of(other), state)
        assert not theirs.state
    vblora.set_adapter(other, "b")
    only_b = vblora.pack_optimizer(other, optimizer_of(other))
    vblora.set_adapter(other, "default")
    with pytest.raises(ValueError, match=r"it also has `b\.bank\.vectors` \(16, 8\), and lacks `default\.bank"):
        vblora.unpack_optimizer(other, optimizer_of(other), only_b)
    vblora.set_adapter(other, "b")
    vblora.grow(other, 9)
    with pytest.raises(ValueError, match=r"it also has `b\.logits` \(\d+, 6\), and lacks `b\.logits` \(\d+, 9\)"):
        vblora.unpack_optimizer(other, optimizer_of(other), only_b)
    with pytest.raises(ValueError, match="has 2 groups of parameters, but the optimizer 1"):
        vblora.unpack_optimizer(other, torch.optim.AdamW([other.vblora.b.bank.vectors]), only_b)
