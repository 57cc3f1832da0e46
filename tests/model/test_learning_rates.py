"""The recipes of learning rates, and the warning of an optimizer whose rates are far below them."""

import copy
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import vblora
from tests.small_models import Net, bert, llama
from vblora.adapters import LoRAAdapter, TiedLoRAAdapter, VBLoRAAdapter, VeRAAdapter
from vblora.model.learning_rates import RECIPES, rates_of

CONFIG = vblora.VBLoRAConfig(r=2, num_vectors=16, vector_length=8, target_modules=["0"])


def injected(config=CONFIG, **choice):
    return vblora.inject(nn.Sequential(nn.Linear(8, 8)), config, **choice)


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def messages_of_steps(model, optimizer, count=3, scheduler=None):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            model(torch.ones(2, 8)).sum().backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    return [str(warning.message) for warning in caught if "far below" in str(warning.message)]


@pytest.mark.parametrize("made", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_an_optimizer_of_its_own_rates_is_warned_of_once(made):
    model = made(injected())
    (message,) = messages_of_steps(model, torch.optim.AdamW(trainable(model), lr=5e-5))
    assert "AdamW trains" in message and "the logits at 5e-05" in message and "the bank at 5e-05" in message
    assert (
        "the logits at 0.4 to 0.5" in message
        and "the bank at 0.003 to" in message
        and "parameter_groups(model)" in message
    )


def test_only_what_is_too_low_is_named():
    model = injected()
    (message,) = messages_of_steps(model, torch.optim.AdamW(trainable(model)))  # at torch's 1e-3
    assert "the logits at 0.001" in message and "the bank" not in message
    frozen = injected(bank=vblora.VectorBank(16, 8), freeze_bank=True)
    (message,) = messages_of_steps(frozen, torch.optim.SGD(frozen.parameters(), lr=1e-5))
    assert "the bank" not in message


def test_a_layer_made_by_hand_is_watched_too():
    layer = vblora.VBLinear(8, 8, r=2, bank=vblora.VectorBank(16, 8), topk=2)
    assert len(messages_of_steps(layer, torch.optim.AdamW(trainable(layer), lr=1e-5))) == 1


@pytest.mark.parametrize("recipe", ["auto", *RECIPES])
def test_the_recipes_are_not_warned_of(recipe):
    large = replace(CONFIG, train_scales=True, init_vector_bank_bound=5.0)  # scales want a small rate with it
    for model in (injected(), injected(large)):
        assert not messages_of_steps(model, torch.optim.AdamW(vblora.parameter_groups(model, recipe=recipe)))


@pytest.mark.parametrize(
    ("make", "recipe"),
    [(llama, "language"), (lambda: nn.Sequential(llama()), "language"), (bert, "default"), (Net, "default")],
    ids=["language model", "within another", "encoder", "own model"],
)
def test_the_recipe_is_that_of_what_the_model_is(make, recipe):
    config = replace(CONFIG, target_modules=r".*(q_proj|query|up)")
    rates = rates_by_name(vblora.parameter_groups(vblora.inject(make(), config)))
    assert all(rates[name] == VBLoRAAdapter.RATES[recipe][name] for name in ("bank", "logits"))


def rates_by_name(groups):
    return {group["name"]: group["lr"] for group in groups}


METHODS = [
    (
        replace(CONFIG, train_scales=True, init_vector_bank_bound=0.05, num_vectors=512),
        VBLoRAAdapter,
        {"bank": 1.2e-2 * 576 / 4096, "logits": 0.4, "scales": 0.2 * 576 / 4096},
    ),
    (vblora.LoraConfig(r=2), LoRAAdapter, {"factors": 4e-3 * (576 / 4096) ** 1.5}),
    (vblora.VeraConfig(r=2), VeRAAdapter, {"vectors": 4e-2 * 576 / 4096}),
    (vblora.TiedLoraConfig(r=2), TiedLoRAAdapter, {"factors": 3e-3 * 576 / 4096, "vectors": 3e-2 * 576 / 4096}),
]


@pytest.mark.parametrize(("config", "method", "wide"), METHODS, ids=lambda value: getattr(value, "__name__", ""))
def test_each_method_has_rates_for_what_the_model_is(config, method, wide):
    models = {"default": bert(), "language": llama()}
    for kind, model in models.items():
        assert rates_of("auto", model, [method], [576, 576, 1536]) == method.RATES[kind]
        assert rates_of("paper", model, [method], [576]) == method.RATES[kind] | method.RATES.get("paper", {})
    assert rates_of("auto", models["language"], [method], [4096, 4096, 11008]) == pytest.approx(wide)
    assert rates_of("auto", models["default"], [method], [4096]) == method.RATES["default"]
    model = vblora.inject(models["language"], replace(config, target_modules=["q_proj"]))
    assert rates_by_name(vblora.parameter_groups(model)) == pytest.approx(method.RATES["language"], rel=0.05)
    given = {f"lr_{name}": 0.25 for name in wide}
    assert rates_by_name(vblora.parameter_groups(model, **given)) == dict.fromkeys(wide, 0.25)


def test_methods_that_share_a_group_get_the_lower_rate():
    both = rates_of("default", Net(), [LoRAAdapter, TiedLoRAAdapter], [8])
    assert both == {"factors": 7e-4, "vectors": 3e-2}


def test_a_schedule_counts_by_its_peak():
    for make in (
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: step / 1000),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [3e-3, 0.5], 1000, div_factor=1000),
    ):
        model = injected()
        optimizer = torch.optim.AdamW(vblora.parameter_groups(model))
        assert not messages_of_steps(model, optimizer, scheduler=make(optimizer))
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-4)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step))  # begins at 0
        assert len(messages_of_steps(model, optimizer, scheduler=scheduler)) == 1


def test_other_models_and_methods_are_left_alone():
    for model in (nn.Linear(8, 8), injected(vblora.LoraConfig(r=2, target_modules=["0"]))):
        assert not messages_of_steps(model, torch.optim.AdamW(trainable(model), lr=1e-6))


def test_an_optimizer_of_frozen_parameters_alone_is_warned_of():
    model = nn.Sequential(nn.Linear(8, 8))
    early = torch.optim.AdamW(model.parameters())
    vblora.inject(model, CONFIG)
    first = torch.optim.AdamW(vblora.parameter_groups(model))
    model(torch.ones(2, 8)).sum().backward()
    with pytest.warns(
        vblora.VBLoRAWarning, match=r"AdamW trains nothing: all its parameters are frozen.*before vblora.inject"
    ):
        early.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first.step()
        early.step()
    vblora.inject(model, CONFIG, adapter_name="second")
    late = torch.optim.SGD(vblora.parameter_groups(model))
    vblora.set_adapter(model, "second")
    model(torch.ones(2, 8)).sum().backward()
    with pytest.warns(vblora.VBLoRAWarning, match="SGD trains nothing"):
        late.step()
    with pytest.warns(vblora.VBLoRAWarning, match="AdamW trains nothing"):  # it has trained before
        first.step()


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_step_that_changes_an_inactive_adapter_is_warned_of_once(set_to_none):
    model = injected()
    vblora.inject(model, CONFIG, adapter_name="second")
    vblora.set_adapter(model, ["default", "second"])
    optimizer = torch.optim.AdamW(vblora.parameter_groups(model))
    found = []
    for active in (["default", "second"], ["default"], ["default"]):
        optimizer.zero_grad(set_to_none=set_to_none)
        vblora.set_adapter(model, active)
        before = model.vblora.second.logits.clone()
        model(torch.ones(2, 8)).sum().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        if active == ["default"]:
            assert torch.equal(model.vblora.second.logits, before) == set_to_none  # this is why
            found.append(len(caught))
    assert found == [0, 0] if set_to_none else [1, 0]
