"""Injecting a container leaves what it contains: its length, its children and what runs over them."""

import copy
import io

import pytest
import torch
from torch import nn

import vblora
from tests.small_models import relative_error
from vblora.finetune import demo

CONFIG = vblora.VBLoRAConfig(target_modules="all-linear", num_vectors=16, vector_length=4, init_vector_bank_bound=0.5)
X = torch.randn(3, 8)


class Pipeline(nn.Sequential):
    """Runs and saves its children by name, as sentence-transformers does."""

    def forward(self, x):
        for _, module in self.named_children():
            x = module(x)
        return x


def make(kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    torch.manual_seed(0)
    return kind(nn.Sequential(nn.Linear(8, 16), nn.Tanh()), nn.Linear(16, 8))


@pytest.mark.parametrize("kind", [nn.Sequential, Pipeline])
def test_a_container_keeps_its_children(kind):
    model = vblora.inject(make(kind), CONFIG)
    assert len(model) == 2 and list(model._modules) == ["0", "1"] and len([*model]) == 2 and len(model[0]) == 2
    by_hand = X
    for module in model:
        by_hand = module(by_hand)
    assert relative_error(by_hand, model(X)) < 1e-6
    assert isinstance(model[-1], vblora.layers.adapted.AdaptedLayer)
    model.append(nn.Identity())
    assert len(model) == 3


def test_the_adapters_of_a_container_are_its_parameters():
    model = vblora.inject(make(), CONFIG)
    adapter = model.vblora.default
    parameters = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in adapter.parameters()} <= parameters
    assert {id(p) for group in vblora.parameter_groups(model) for p in group["params"]} <= parameters
    with torch.no_grad():
        adapter.logits.normal_()
    other = vblora.inject(make(), CONFIG)
    assert not torch.equal(other(X), model(X))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))
    double = copy.deepcopy(model).double()
    assert double.vblora.default.logits.dtype == torch.float64 and adapter.logits.dtype == torch.float32
    assert relative_error(double(X.double()), model(X).double()) < 1e-5
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(X), model(X)) and again.vblora.default.logits is not adapter.logits


def test_a_container_is_saved_merged_and_ejected(tmp_path):
    plain = set(make().state_dict())
    model = vblora.inject(make(), CONFIG)
    vblora.save(model, tmp_path)
    loaded = vblora.load(make(), tmp_path)
    assert torch.equal(loaded(X), model(X))
    adapted = model(X)
    vblora.eject(vblora.merge(model, release=True))
    assert relative_error(model(X), adapted) < 1e-5 and set(model.state_dict()) == plain
    assert not hasattr(model, "vblora") and not any(hasattr(module, "vblora") for module in model.modules())


def test_the_adapter_of_a_container_outlives_another_ones_layers():
    model = vblora.inject(make(), vblora.VBLoRAConfig(target_modules=["0.0"], num_vectors=16, vector_length=4))
    vblora.inject(model, vblora.VBLoRAConfig(target_modules="1", num_vectors=16, vector_length=4), adapter_name="b")
    vblora.delete_adapter(model, "default")
    vblora.set_adapter(model, "b")
    assert list(model.vblora) == ["b"] and model(X).requires_grad and len(model) == 2


def test_a_sentence_transformer_is_saved(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")

    model = sentence_transformers.SentenceTransformer(str(demo.find_model()), device="cpu", local_files_only=True)
    size = len(model)
    vblora.inject(model, vblora.VBLoRAConfig(target_modules=["query", "value"], num_vectors=64, vector_length=32))
    with torch.no_grad():
        model.vblora.default.bank.vectors.normal_(std=0.1)  # larger updates blow rounding up
    assert len(model) == size
    expected = model.encode(["good bad"], convert_to_tensor=True)
    with pytest.raises(ValueError, match=r"vblora\.save"):
        model.save(str(tmp_path / "model"))
    vblora.merge(model)
    model.save(str(tmp_path / "model"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert relative_error(again.encode(["good bad"], convert_to_tensor=True), expected) < 1e-5
