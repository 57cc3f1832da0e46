"""Merging says which layers compute something else once merged, or lose a tie; layers without weights are left out."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_linear_bn_eval

import vblora
from tests.small_models import Net, llama, relative_error

SIZES = {"num_vectors": 16, "vector_length": 8, "init_vector_bank_bound": 0.5}
X = torch.randn(2, 16)


def config(*targets: str) -> vblora.VBLoRAConfig:
    return vblora.VBLoRAConfig(**SIZES, target_modules=list(targets))


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_the_base_layer_are_warned_of(kind):
    net = Net(blocks=2)
    value = (lambda _, __, y: 2 * y) if kind == "register_forward_hook" else (lambda _, args: (2 * args[0],))
    getattr(net.blocks[1].up, kind)(value)
    vblora.inject(net, config("up"))
    adapted = net(X)
    with pytest.warns(vblora.VBLoRAWarning, match=r"`blocks.1.up` had forward hooks before vblora.inject"):
        vblora.merge(net)
    assert relative_error(net(X), adapted) > 1e-3  # this is why


def test_hooks_of_the_adapted_layer_are_right():
    net = vblora.inject(Net(blocks=2), config("up"))
    net.blocks[1].up.register_forward_hook(lambda _, __, y: 2 * y)
    adapted = net(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vblora.merge(net)
    assert relative_error(net(X), adapted) < 1e-5


def test_a_base_layer_that_was_replaced_is_refused():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = vblora.inject(Net(blocks=1), config("up"))
    net.blocks[0].up.base_layer = Doubled(16, 32)
    with pytest.raises(TypeError, match=r"base layer of `blocks.0.up` is a Doubled now, which is no plain nn.Linear"):
        vblora.merge(net)
    net.blocks[0].up.base_layer = nn.Linear(16, 32)
    expected = net(X)
    assert relative_error(vblora.merge(net)(X), expected) < 1e-5


def test_folding_a_normalization_into_an_adapted_layer_is_warned_of():
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)).eval()
    nn.init.uniform_(model[1].weight, 1, 2)
    vblora.inject(model, config("0"))
    expected = model(X)
    with pytest.warns(vblora.VBLoRAWarning, match="the weight of an adapted layer was replaced"):
        assert relative_error(fuse_linear_bn_eval(*model[:2])(X), expected) > 1e-3  # this is why
    vblora.merge(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative_error(fuse_linear_bn_eval(*model[:2])(X), expected) < 1e-5


def test_layers_that_share_a_weight_are_named():
    net = Net(blocks=2)
    net.blocks[1].up.weight = net.blocks[0].up.weight
    vblora.inject(net, config("up"))
    adapted = net(X)
    with pytest.warns(vblora.VBLoRAWarning, match="`blocks.0.up` and `blocks.1.up` share one weight"):
        vblora.merge(net, release=True)
    assert relative_error(vblora.eject(net)(X), adapted) < 1e-5
    again = Net(blocks=2)
    again.load_state_dict(net.state_dict())  # both are there, as they are
    assert relative_error(again(X), adapted) < 1e-5
    model = vblora.inject(
        llama(tie_word_embeddings=True), vblora.VBLoRAConfig(**SIZES, pad=True, target_modules=["lm_head"])
    )
    with pytest.warns(vblora.VBLoRAWarning, match="`model.embed_tokens` and `lm_head` share one weight"):
        vblora.merge(model)
    merged = model.lm_head.weight
    with pytest.raises(ValueError, match="its original weight would take the place of the merged one"):
        model.tie_weights()
    assert model.lm_head.weight is merged
    vblora.unmerge(model).tie_weights()


def test_a_layer_of_two_models_is_refused():
    """Both would put a merged weight, or a trained bias, into it."""
    one, two = Net(blocks=1), Net(blocks=1)
    two.blocks[0].up, two.head = one.blocks[0].up, one.head
    vblora.inject(one, vblora.VBLoRAConfig(**SIZES, target_modules=["up"], modules_to_save=["head"]))
    head, expected = one.head.weight, two(X)
    for targets, saved, name in ((["up"], None, "blocks.0.up"), (["embed"], ["head"], "head")):
        with pytest.raises(ValueError, match=f"`{name}` is also part of another injected model"):
            vblora.inject(two, vblora.VBLoRAConfig(**SIZES, target_modules=targets, modules_to_save=saved))
    assert one.head.weight is head and torch.equal(two(X), expected)
    vblora.inject(two, config("embed"))  # what they share is not changed by both
    vblora.merge(one)
    vblora.eject(one)
    vblora.inject(two, config("up"), adapter_name="second")


@pytest.mark.parametrize("share", ["copy", "VBLinear"])
def test_merging_into_a_layer_of_two_models_is_refused(share):
    model = vblora.inject(nn.Sequential(nn.Linear(16, 16)), config("0"))
    base = model[0].base_layer
    if share == "copy":
        other = copy.deepcopy(model, {id(base): base})
    else:
        other = vblora.VBLinear(base_layer=base, num_vectors=16, vector_length=8)
    expected = other(X)
    with pytest.raises(
        ValueError, match=r"base layer of `0` is also that of another adapted layer.*Nothing was merged"
    ):
        vblora.merge(model)
    assert torch.equal(other(X), expected)
    del other
    vblora.merge(model)


def test_a_layer_without_weights_is_left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of nothing to initialize
        net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 0))
    with pytest.warns(vblora.VBLoRAWarning, match='"all-linear" leaves out `1`, a Linear, which has an empty weight'):
        vblora.inject(net, vblora.VBLoRAConfig(**SIZES, target_modules="all-linear"))
    assert [target.name for target in net.vblora.default.targets] == ["0"]
    with pytest.raises(TypeError, match="`target_modules` matches `0`, a Linear, which has an empty weight"):
        vblora.inject(nn.Sequential(net[1]), config("0"))


def test_the_text_part_of_a_model_has_its_defaults():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 64, "intermediate_size_mlp": 64, "num_local_experts": 2}
    model = vblora.inject(Llama4ForCausalLM(Llama4TextConfig(**sizes)), vblora.VBLoRAConfig(**SIZES))
    assert [target.name.rpartition(".")[2] for target in model.vblora.default.targets] == ["q_proj", "v_proj"]
