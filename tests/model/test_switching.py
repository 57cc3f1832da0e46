"""Several adapters on one model: adding, activating, merging and deleting them, without effects on the others."""

import copy
import gc
import pickle
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

import vblora
from tests.small_models import ComposedRows, Net, bert, relative_error
from vblora.layers.adapted import AdaptedLayer
from vblora.model.lookup import attached_adapter

FIRST = vblora.VBLoRAConfig(
    target_modules=["up", "down"], r=2, num_vectors=16, vector_length=8, init_vector_bank_bound=1.0, bias="vblora_only"
)
SECOND = vblora.VBLoRAConfig(
    target_modules=["down", "embed"],
    r=3,
    num_vectors=12,
    vector_length=16,
    topk=3,
    init_vector_bank_bound=1.0,
    modules_to_save=["head"],
)


def base(dtype: torch.dtype = torch.float64) -> Net:
    return Net(blocks=2).to(dtype)


def alone(net: nn.Module, config: vblora.VBLoRAConfig, trained: nn.Module, name: str) -> nn.Module:
    """A copy of the base model with only the adapter ``name`` of ``trained``, active."""
    model = vblora.inject(copy.deepcopy(net), config).double()
    model.vblora.default.load_state_dict(trained.vblora[name].state_dict())
    for place, extra in attached_adapter(trained, name).extra.items():
        attached_adapter(model).extra[place].replacement.data.copy_(extra.replacement)
    return model


def randomise(net: nn.Module, name: str) -> None:
    with torch.no_grad():
        for extra in attached_adapter(net, name).extra.values():
            extra.replacement.add_(torch.randn_like(extra.replacement))


@pytest.fixture
def nets() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A base model, a copy with two adapters whose biases and heads differ from the base's, and an input."""
    net = base()
    model = vblora.inject(copy.deepcopy(net), FIRST)
    vblora.inject(model, SECOND, adapter_name="second")
    randomise(model, "default")
    randomise(model, "second")
    return net, model.double(), torch.randn(5, 16, dtype=torch.float64)


def test_the_first_is_active_and_another_waits(nets):
    net, model, x = nets
    assert list(model.vblora) == ["default", "second"]
    assert vblora.active_adapters(model) == ["default"]
    assert relative_error(model(x), alone(net, FIRST, model, "default")(x)) < 1e-12
    with ComposedRows() as composed:
        model(x)
    assert composed.rows == model.vblora.default.num_subvectors


def test_each_runs_as_if_it_were_alone(nets):
    net, model, x = nets
    for name, config in (("second", SECOND), ("default", FIRST), ("second", SECOND)):
        vblora.set_adapter(model, name)
        assert vblora.active_adapters(model) == [name]
        assert relative_error(model(x), alone(net, config, model, name)(x)) < 1e-12
    vblora.set_adapter(model, [])
    assert torch.equal(model(x), net(x))


def test_updates_of_several_add_up(nets):
    net, model, x = nets
    vblora.set_adapter(model, ["second", "default"])
    expected = copy.deepcopy(net)
    with torch.no_grad():
        for name, config in (("default", FIRST), ("second", SECOND)):
            own = vblora.merge(alone(net, config, model, name))
            for (place, tensor), merged in zip(net.named_parameters(), _base_parameters(own), strict=True):
                expected.get_parameter(place).add_(merged - tensor)
    assert relative_error(model(x), expected(x)) < 1e-12
    with ComposedRows() as composed:
        model(x)
    assert composed.calls == 2


def calls_of(function) -> int:
    """How many calls, of Python's and of C's functions, ``function`` makes."""
    count = 0

    def profiler(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profiler)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_switching_takes_as_many_steps_however_many_adapters_there_are():
    config = replace(FIRST, bias="none")
    model = vblora.inject(base(), config)
    calls = []
    for number in (2, 20):
        while len(model.vblora) < number:
            vblora.inject(model, config, adapter_name=f"number {len(model.vblora)}")
        vblora.set_adapter(model, "default")
        calls.append(calls_of(lambda: vblora.set_adapter(model, "number 1")))
    assert calls[0] == calls[1]


def _base_parameters(model: nn.Module) -> list[torch.Tensor]:
    return [parameter for name, parameter in model.named_parameters() if not name.startswith("vblora.")]


def test_only_active_ones_train(nets):
    _, model, x = nets
    trained = {
        "default": ["blocks.0.up.base_layer.bias", "vblora.default.logits", "vblora.default.bank.vectors"],
        "second": ["head.weight", "head.bias", "vblora.second.logits", "vblora.second.bank.vectors"],
    }
    trained["default"] += [f"blocks.{i}.{layer}.base_layer.bias" for i, layer in ((0, "down"), (1, "up"), (1, "down"))]
    for active in (["default"], ["second"], ["default", "second"]):
        vblora.set_adapter(model, active)
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert names == {name for adapter in active for name in trained[adapter]}
        in_groups = {p for group in vblora.parameter_groups(model) for p in group["params"]}
        assert in_groups == {model.get_parameter(name) for name in names}
        model.zero_grad()
        extra = [swap for name in model.vblora for swap in attached_adapter(model, name).extra.values()]
        assert all(swap.replacement.grad is None for swap in extra)  # also of those that are inactive
        model(x).square().sum().backward()
        with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert with_gradient == names


def test_what_was_frozen_stays_frozen():
    model = vblora.inject(base(), FIRST, freeze_bank=True)
    vblora.inject(model, SECOND, adapter_name="second")
    for name in ("second", "default", "second", "default"):
        vblora.set_adapter(model, name)
    assert model.vblora.default.logits.requires_grad and not model.vblora.default.bank.vectors.requires_grad
    model.vblora.default.logits.requires_grad_(False)  # the user's own choice is restored, too
    vblora.set_adapter(model, "second")
    vblora.set_adapter(model, "default")
    assert not model.vblora.default.logits.requires_grad
    assert not model.vblora.second.logits.requires_grad
    for trains in (False, True):
        model.vblora.second.requires_grad_(trains)  # while it is inactive
        vblora.set_adapter(model, ["default", "second"])
        assert all(p.requires_grad == trains for p in model.vblora.second.parameters())
        vblora.set_adapter(model, "default")


def test_a_bank_of_two_adapters():
    config = replace(FIRST, bias="none")
    model = vblora.inject(base(torch.float32), config)
    bank = model.vblora.default.bank
    vblora.inject(model, config, adapter_name="second", bank=bank)
    assert model.vblora.second.bank is bank
    vblora.set_adapter(model, "second")
    assert bank.vectors.requires_grad
    vblora.set_adapter(model, ["default", "second"])
    assert vblora.parameter_groups(model)[0]["params"] == [bank.vectors]
    model(torch.randn(3, 16)).sum().backward()
    assert bank.vectors.grad.any()
    logits = [adapter.logits for adapter in model.vblora.values()]
    assert vblora.count_parameters(model).trainable == sum(tensor.numel() for tensor in (bank.vectors, *logits))
    vblora.delete_adapter(model, "default")
    assert model.vblora.second.bank is bank


def test_deleting_frees_it_and_unwraps_its_layers(nets):
    net, model, x = nets
    vblora.set_adapter(model, ["default", "second"])
    second = attached_adapter(model, "second")
    held = [second.adapter, second.adapter.logits, second.adapter.bank.vectors]
    held += [second.extra["head.weight"].replacement, second.layers[0], second.adapter.slots[0]]
    held = [weakref.ref(thing) for thing in held]
    vblora.delete_adapter(model, "second")
    del second
    gc.collect()
    assert [thing() for thing in held] == [None] * len(held)
    assert vblora.active_adapters(model) == ["default"] == list(model.vblora)
    assert type(model.embed) is nn.Linear
    assert torch.equal(model.head.weight, net.head.weight)
    assert relative_error(model(x), alone(net, FIRST, model, "default")(x)) < 1e-12
    vblora.delete_adapter(model, "default")
    assert not any(isinstance(module, AdaptedLayer) for module in model.modules())
    assert torch.equal(model(x), net(x))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in net.named_parameters()
    }


def test_a_deleted_name_can_be_used_again(nets):
    net, model, x = nets
    with pytest.warns(
        vblora.VBLoRAWarning, match="'default' was the only active one, so the model is its base model now"
    ):
        vblora.delete_adapter(model, "default")
    assert vblora.active_adapters(model) == []
    assert torch.equal(model(x), net(x))
    vblora.inject(model, FIRST)
    vblora.set_adapter(model, "default")
    assert not torch.equal(model(x), net(x))


def test_merging_some(nets):
    net, model, x = nets
    vblora.set_adapter(model, ["default", "second"])
    expected, weights = model(x), {name: p.clone() for name, p in model.named_parameters()}
    vblora.merge(model, "second")
    with ComposedRows() as composed:
        assert relative_error(model(x), expected) < 1e-12
    assert composed.rows == model.vblora.default.num_subvectors
    with vblora.disabled(model):
        assert torch.equal(model(x), net(x))
    assert relative_error(model(x), expected) < 1e-12
    with pytest.raises(ValueError, match="'second' is already merged"):
        vblora.merge(model)
    vblora.merge(model, ["default"])
    with ComposedRows() as composed:
        assert relative_error(model(x), expected) < 1e-12
    assert composed.calls == 0
    in_turn = {name: p.clone() for name, p in model.named_parameters()}
    vblora.unmerge(model)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert relative_error(model(x), expected) < 1e-12
    vblora.merge(model)
    assert all(relative_error(p, in_turn[name]) < 1e-15 for name, p in model.named_parameters())


def test_merging_in_turn_rounds_once(nets):
    _, model, _ = nets
    vblora.set_adapter(model, ["default", "second"])
    model.bfloat16()
    together = vblora.merge(copy.deepcopy(model))
    vblora.merge(vblora.merge(model, "default"), "second")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), together.parameters(), strict=True))


def test_releasing_some(nets):
    _, model, x = nets
    vblora.set_adapter(model, ["default", "second"])
    expected = model(x)
    vblora.merge(model, "default", release=True)
    assert relative_error(model(x), expected) < 1e-12
    with pytest.raises(ValueError, match=r"only some active adapters.*release=True"):
        vblora.eject(model)
    vblora.merge(model, "second", release=True)
    vblora.eject(model)
    assert relative_error(model(x), expected) < 1e-12


def test_two_that_train_the_same_are_not_active_together(nets):
    _, model, x = nets
    vblora.inject(model, SECOND, adapter_name="third")
    before = model(x)
    with pytest.raises(ValueError, match=r"'second' and 'third' both replace `head\.weight`"):
        vblora.set_adapter(model, ["default", "second", "third"])
    assert vblora.active_adapters(model) == ["default"] and torch.equal(model(x), before)


def test_an_added_adapter_starts_from_the_base_model():
    net = bert().eval()
    config = vblora.VBLoRAConfig(r=2, num_vectors=16, vector_length=8, modules_to_save=["classifier"])
    model = vblora.inject(copy.deepcopy(net), config)
    with torch.no_grad():
        model.classifier.weight.zero_()
    vblora.inject(model, config, adapter_name="second")
    assert not model.classifier.weight.any()
    vblora.set_adapter(model, "second")
    assert torch.equal(model.classifier.weight, net.classifier.weight)
    vblora.eject(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), net.parameters(), strict=True))


def test_saved_and_loaded_by_name(nets, tmp_path):
    net, model, x = nets
    expected = {}
    for name in model.vblora:
        vblora.save(model, tmp_path / name, adapter_name=name)
        vblora.set_adapter(model, name)
        expected[name] = model(x)
    again = copy.deepcopy(net)
    for name in expected:
        vblora.load(again, tmp_path / name, adapter_name=name)
    assert vblora.active_adapters(again) == ["default"]
    for name in expected:
        vblora.set_adapter(again, name)
        assert torch.equal(again(x), expected[name])
        assert not any(p.requires_grad for p in again.parameters())
    vblora.load(again, tmp_path / "default", adapter_name="default", is_trainable=True)  # replaces an inactive adapter
    assert not any(p.requires_grad for p in again.parameters())
    vblora.set_adapter(again, "default")
    assert again.vblora.default.logits.requires_grad and not again.vblora.second.logits.requires_grad
    assert torch.equal(again(x), expected["default"])
    with pytest.raises(ValueError, match="another config"):
        vblora.load(again, tmp_path / "second")
    vblora.set_adapter(again, ["default", "second"])
    with pytest.raises(ValueError, match=r"active ones are default, second\. Name one of default, second"):
        vblora.save(again, tmp_path / "which")


def test_counted_and_grown_by_name():
    model = vblora.inject(base(), replace(FIRST, num_candidates=4))
    vblora.inject(model, replace(FIRST, num_candidates=8), adapter_name="second")
    assert vblora.stats(model).num_candidates == 4
    assert vblora.stats(model, "second").num_candidates == 8
    vblora.grow(model, 10, adapter_name="second")
    assert (vblora.stats(model).num_candidates, vblora.stats(model, "second").num_candidates) == (4, 10)
    of_one, stored = vblora.count_parameters(model)
    assert (of_one, stored) == vblora.count_parameters(vblora.inject(base(), replace(FIRST, num_candidates=4)))
    vblora.set_adapter(model, ["second"])
    assert vblora.count_parameters(model).trainable - of_one == 6 * model.vblora.second.num_subvectors


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", "forward"])
def test_names_that_cannot_be(name):
    net = base()
    with pytest.raises(
        ValueError, match=r"`adapter_name` .* not empty, has no '\.', and is not an attribute of nn\.ModuleDict"
    ):
        vblora.inject(net, FIRST, adapter_name=name)
    assert not hasattr(net, "vblora")


def test_what_is_refused_changes_nothing(nets, tmp_path):
    _, model, x = nets
    vblora.save(model, tmp_path)

    def every():
        third = vblora.VBLoRAConfig(target_modules=["up"], r=1, num_vectors=8, vector_length=4)
        yield lambda: vblora.inject(model, third, adapter_name="third")
        yield lambda: vblora.load(model, tmp_path, adapter_name="third")
        yield lambda: vblora.delete_adapter(model, "second")
        yield lambda: vblora.set_adapter(model, "second")

    def unchanged():
        assert list(model.vblora) == ["default", "second"] and vblora.active_adapters(model) == ["default"]

    for refused in every():
        with vblora.disabled(model), pytest.raises(ValueError, match="disabled"):
            refused()
        unchanged()
    vblora.merge(model)
    for refused in every():
        with pytest.raises(ValueError, match="merged"):
            refused()
        unchanged()
    vblora.unmerge(model)
    before = model(x)
    for unknown in (vblora.set_adapter, vblora.delete_adapter):
        with pytest.raises(ValueError, match="'third'; the model's adapters are default, second"):
            unknown(model, "third")
    with pytest.raises(ValueError, match="'second', but the active adapters are default"):
        vblora.merge(model, "second")
    with pytest.raises(ValueError, match="already has an adapter 'second'"):
        vblora.inject(model, SECOND, adapter_name="second")
    assert torch.equal(model(x), before)
    vblora.set_adapter(model, [])
    with pytest.raises(ValueError, match="no active adapter"):
        vblora.merge(model)
    with pytest.raises(ValueError, match="none is active"):
        vblora.save(model, tmp_path)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_switch_for_themselves(nets, copied):
    _, model, x = nets
    expected = model(x)
    other = copied(model)
    vblora.set_adapter(other, ["default", "second"])
    assert vblora.active_adapters(model) == ["default"] and torch.equal(model(x), expected)
    assert not torch.equal(other(x), expected)
    vblora.delete_adapter(other, "default")
    assert torch.equal(model(x), expected)


def test_moved_while_it_waits(nets):
    _, model, x = nets
    vblora.set_adapter(model, "second")
    expected = model(x)
    vblora.set_adapter(model, "default")
    model.float()
    vblora.set_adapter(model, "second")
    assert model.head.weight.dtype == torch.float32
    assert relative_error(model(x.float()), expected.float()) < 1e-4


def test_compiled_in_one_graph(nets):
    _, model, x = nets
    vblora.set_adapter(model, ["default", "second"])
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), expected) < 1e-12
    vblora.set_adapter(model, "second")
    assert relative_error(compiled(x), model(x)) < 1e-12
