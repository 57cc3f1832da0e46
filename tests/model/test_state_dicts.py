"""State dicts that do not fit the model as it is now: loaded correctly, or refused, or warned of."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import vblora
from tests.small_models import Net

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = vblora.VBLoRAConfig(
    r=2, num_vectors=32, vector_length=8, num_candidates=8, init_vector_bank_bound=1.0, target_modules=["up"]
)
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))


def injected(seed: int, **fields) -> nn.Module:
    torch.manual_seed(seed)
    return vblora.inject(Net(blocks=2), replace(CONFIG, **fields))


def layer(seed: int) -> vblora.VBLinear:
    torch.manual_seed(seed)
    return vblora.VBLinear(16, 8, num_vectors=32, vector_length=8, num_candidates=8)


@pytest.mark.parametrize("make", [injected, layer])
def test_of_a_merged_model(make):
    model, other, merged_other = (make(seed).eval() for seed in (1, 2, 3))
    plain, expected = copy.deepcopy(model.state_dict()), model(X)
    vblora.merge(model)
    vblora.merge(merged_other)
    merged_other.load_state_dict(model.state_dict())
    torch.testing.assert_close(merged_other(X), expected)
    for target, state in ((other, model.state_dict()), (model, plain)):
        with pytest.raises(RuntimeError, match=r"(not )?merged .*in the state dict and (not )?merged .*in the model"):
            target.load_state_dict(state, strict=False)
    with vblora.disabled(model):
        within = copy.deepcopy(model.state_dict())  # the base weights: that of a model that is not merged
        with pytest.raises(RuntimeError, match="Load the state dict outside the block"):
            model.load_state_dict(within)
    for state in (plain, within):
        other = make(4).eval()
        other.load_state_dict(state)
        torch.testing.assert_close(other(X), expected)


def test_of_a_merged_models_adapter():
    model, other = injected(1).eval(), injected(2).eval()
    vblora.merge(model)
    assert any("merged" in name for name in get_model_state_dict(model))
    other.load_state_dict(vblora.adapter_state_dict(model), strict=False)
    assert torch.equal(other.vblora.default.logits, model.vblora.default.logits)
    with pytest.raises(RuntimeError, match="merged into 2 layers in the model"):
        model.load_state_dict(vblora.adapter_state_dict(other), strict=False)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding, nn.Conv1d])
def test_of_the_base_model(kind):
    def make(seed):
        torch.manual_seed(seed)
        return nn.ModuleDict(
            {"layer": nn.Conv1d(8, 8, 3) if kind is nn.Conv1d else kind(8, 8), "norm": nn.LayerNorm(8)}
        )

    class Model(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.parts = make(seed)

    base, model = Model(1), Model(2)
    vblora.inject(model, vblora.VBLoRAConfig(target_modules=["layer"], num_vectors=16, vector_length=8))
    report = model.load_state_dict(base.state_dict(), strict=False)
    assert not report.unexpected_keys and all(name.startswith("vblora.") for name in report.missing_keys)
    with pytest.raises(RuntimeError, match=r"`parts.layer.weight` is the base model's, but an adapter is merged"):
        vblora.merge(copy.deepcopy(model)).load_state_dict(base.state_dict(), strict=False)
    vblora.eject(model)
    for name, tensor in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_of_a_plain_layer():
    plain, wrapped = nn.Linear(16, 8), layer(1)
    assert not wrapped.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    assert torch.equal(wrapped.base_layer.weight, plain.weight) and torch.equal(wrapped.base_layer.bias, plain.bias)


def test_of_trained_parameters_alone():
    def state(model):
        return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}

    model, other, same = injected(1), injected(2), injected(1)
    with torch.no_grad():
        model.vblora.default.logits[:, :4] += 1
    with pytest.warns(
        vblora.VBLoRAWarning, match=r"has `vblora.default.logits`, but lacks `vblora.default.candidates`"
    ):
        other.load_state_dict(state(model), strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for target in (same, model):  # of the same draw
            target.load_state_dict(state(model), strict=False)
        injected(3, num_candidates=None).load_state_dict(state(injected(4, num_candidates=None)), strict=False)
    torch.testing.assert_close(model(X), same(X))


def test_of_a_draw_without_its_seed(tmp_path):
    model, other = injected(1), injected(2)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for target, known in ((other, False), (model, True)):
        target.load_state_dict(state, strict=False)
        assert (target.vblora.default.seed is not None) == known
        vblora.save(target, tmp_path)
        assert torch.equal(vblora.load(vblora.eject(copy.deepcopy(target)), tmp_path)(X), model(X))


@pytest.mark.parametrize(
    "cast", [lambda mean, like: mean, lambda mean, like: mean.to(like.dtype)], ids=["floats", "rounded"]
)
def test_of_averages(cast, tmp_path):
    def average(one, other):
        pairs = {name: (value, other.state_dict()[name]) for name, value in one.state_dict().items()}
        return {name: cast((a.float() + b.float()) / 2, a) for name, (a, b) in pairs.items()}

    model, other = injected(1), injected(2)
    with pytest.raises(
        RuntimeError, match=r"`vblora.default.candidates` (or their seed are floating|hold a bank vector twice)"
    ):
        model.load_state_dict(average(model, other))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.vblora.default.logits[:, :4] += 1
    seed = model.vblora.default.seed
    model.load_state_dict(average(model, twin))
    assert model.vblora.default.seed == seed
    vblora.save(model, tmp_path)
    torch.testing.assert_close(vblora.load(vblora.eject(copy.deepcopy(model)), tmp_path)(X), model(X), rtol=0, atol=0)
    model.vblora.default.candidates += 1
    with pytest.raises(ValueError, match="not those that its seed"):
        vblora.save(model, tmp_path)


@pytest.mark.parametrize(
    "arguments", [{}, {"use_buffers": True}, {"use_buffers": True, "multi_avg_fn": get_ema_multi_avg_fn(0.7)}]
)
def test_of_averaged_models(arguments):
    model = injected(1)
    average = AveragedModel(model, **arguments)
    average.update_parameters(model)
    with torch.no_grad():
        model.vblora.default.logits[:, :4] += 1
        model.vblora.default.exhausted[:3] = True
    average.update_parameters(model)
    own, other = average.module.vblora.default, model.vblora.default
    assert torch.equal(own.candidates, other.candidates) and torch.equal(own.exhausted, other.exhausted)
    assert not torch.equal(own.logits, other.logits)
    with pytest.raises(ValueError, match="the adapters' `candidates` differ"):
        average.update_parameters(injected(2))


def test_an_average_that_rounds_candidates_is_noticed():
    """As timm's ModelEmaV2 does, which writes the average of each tensor of a state dict into it."""
    model = injected(1)
    average = copy.deepcopy(model)
    for own, other in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        own.copy_(0.9999 * own + (1.0 - 0.9999) * other)
    assert not torch.equal(average.vblora.default.candidates, model.vblora.default.candidates)
    with pytest.warns(vblora.VBLoRAWarning, match="has written other values into the adapter's `candidates`"):
        average(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        average(X)  # once is enough
        average.load_state_dict(model.state_dict())
        assert torch.equal(average(X), model(X))
        copy.deepcopy(average)(X)


def test_an_average_that_rounds_a_deployed_adapters_indices_is_noticed(tmp_path):
    vblora.save(injected(1), tmp_path, form="deploy")
    model = vblora.load(Net(blocks=2), tmp_path)
    average = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        average.double().float()(X)
        for own, other in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            own.copy_(other)  # the same values
        average(X)
    for own, other in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        own.copy_(0.9999 * own + (1.0 - 0.9999) * other)
    assert not torch.equal(average.vblora.default.indices, model.vblora.default.indices)
    with pytest.warns(vblora.VBLoRAWarning, match="has written other values into the adapter's `indices`"):
        copy.deepcopy(average)(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        average.load_state_dict(model.state_dict())
        assert torch.equal(average(X), model(X))
        vblora.save(injected(2), tmp_path, form="deploy")
        vblora.load(average, tmp_path)(X)  # another adapter over this one
    assert not torch.equal(average.vblora.default.indices, model.vblora.default.indices)
    averaged = {name: tensor.float() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="indices` are floating-point numbers"):
        model.load_state_dict(averaged)


VERA = vblora.VeraConfig(r=3, save_projection=False, target_modules=["up"])


@pytest.mark.parametrize(
    ("config", "fields", "symmetric"),
    [
        (CONFIG, {"topk": 3, "scaling": 2.5}, True),
        (vblora.LoraConfig(r=3, target_modules=["up"]), {"lora_alpha": 5}, True),
        (vblora.TiedLoraConfig(r=3, target_modules=["up"]), {"lora_alpha": 5}, False),
        (VERA, {"projection_prng_key": 7}, False),
        (replace(VERA, save_projection=True), {"projection_prng_key": 7}, False),
    ],
)
def test_of_another_config(config, fields, symmetric):
    model = vblora.inject(Net(blocks=2), replace(config, **fields)).eval()
    with torch.no_grad():
        for parameter in model.vblora.parameters():
            parameter.add_(torch.randn_like(parameter))
    other = vblora.inject(Net(blocks=2), config).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))
    if symmetric:  # the tensors of other layers have the same sizes
        like = vblora.inject(Net(blocks=2), replace(config, target_modules=["down"]))
        with pytest.warns(vblora.VBLoRAWarning, match="of other layers or another rank"):
            like.load_state_dict(vblora.adapter_state_dict(model), strict=False)


def test_of_an_adapter_around_or_within_the_model():
    around = vblora.inject(Net(blocks=2), CONFIG)
    within = vblora.inject(nn.Sequential(Net(blocks=2)), CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        within[0].vblora.default.load_state_dict(around.vblora.default.state_dict())


@pytest.mark.parametrize("save_projection", [False, True])
def test_of_vera_into_a_model_that_was_made_on_the_meta_device(save_projection):
    config = vblora.VeraConfig(r=4, target_modules=["up"], init_weights=False, save_projection=save_projection)
    model = vblora.inject(Net(blocks=1), config)
    with torch.device("meta"):
        other = vblora.inject(Net(blocks=1), config)
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(other(x), model(x))
