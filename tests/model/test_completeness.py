"""An adapter's file holds what was trained, or saving says what it lacks."""

import copy
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

import vblora
from tests.small_models import Net, llama

SIZES = {"num_vectors": 16, "vector_length": 8}


def test_a_module_that_was_replaced_after_injection_is_refused(tmp_path):
    model = vblora.inject(llama(), vblora.VBLoRAConfig(**SIZES, modules_to_save=["lm_head"]))
    model.resize_token_embeddings(60)
    with pytest.raises(ValueError, match=r"no longer contains `lm_head` that adapter 'default' trains.*then inject"):
        vblora.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_embeddings_that_were_resized_in_place_are_followed(tmp_path):
    model = vblora.inject(llama(), vblora.VBLoRAConfig(**SIZES, modules_to_save=["embed_tokens"]))
    model.resize_token_embeddings(60)
    vblora.save(model, tmp_path)
    again = llama()
    again.resize_token_embeddings(60)
    vblora.load(again, tmp_path)
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_a_layer_that_was_replaced_after_injection_is_refused(tmp_path):
    net = vblora.inject(Net(blocks=2), vblora.VBLoRAConfig(**SIZES, target_modules=["up"]))
    net.blocks[1] = nn.Identity()
    with pytest.raises(ValueError, match=r"no longer contains `blocks.1.up` that"):
        vblora.save(net, tmp_path)


class Averaging(nn.Module):
    """Keeps a moving average of what passes, as codebooks and observers do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(16))

    def forward(self, x):
        if self.training:
            self.average.lerp_(x.detach().mean(0), 0.1)
        return x - self.average


def averaging(**fields):
    net = nn.Sequential(OrderedDict(up=nn.Linear(8, 16), mean=Averaging()))
    return vblora.inject(net, vblora.VBLoRAConfig(**SIZES, target_modules=["up"], **fields))


@pytest.mark.parametrize("cast", [False, True])
def test_buffers_that_training_changed_are_named(tmp_path, cast):
    net = averaging()
    net(torch.randn(4, 8))
    if cast:
        net.mean.half().float()
    with pytest.warns(vblora.VBLoRAWarning, match=r"`mean\.average`.* no adapter file holds"):
        vblora.save(net, tmp_path)
    with pytest.warns(vblora.VBLoRAWarning, match=r"`mean\.average`"):
        vblora.save(copy.deepcopy(net), tmp_path)


def test_buffers_that_are_saved_or_did_not_change_are_not_named(tmp_path):
    net = averaging(modules_to_save=["mean"])
    net(torch.randn(4, 8))
    still = averaging().eval()
    still(torch.randn(4, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vblora.save(net, tmp_path)
        vblora.save(still.double().float(), tmp_path)


def test_what_trains_beside_the_adapter_and_is_not_saved_is_named(tmp_path):
    net = vblora.inject(Net(blocks=2), vblora.VBLoRAConfig(**SIZES, target_modules=["up"]))
    net.head.requires_grad_(True)
    with pytest.warns(vblora.VBLoRAWarning, match="`head.weight`, `head.bias` .* no adapter file holds"):
        vblora.save(net, tmp_path)
    net.eval()(torch.randn(2, 16))
    with pytest.warns(vblora.VBLoRAWarning, match="`head.weight`, `head.bias` of the base model require gradients"):
        net.train()(torch.randn(2, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(torch.randn(2, 16))  # once is enough


def test_what_is_thawed_in_the_middle_of_training_is_named():
    net = vblora.inject(Net(blocks=2), vblora.VBLoRAConfig(**SIZES, target_modules=["up"])).train()

    def forwards(count: int) -> None:
        for _ in range(count):
            net(torch.randn(2, 16))

    forwards(5)
    net.head.requires_grad_(True)
    with pytest.warns(vblora.VBLoRAWarning, match="`head.weight`, `head.bias` of the base model require gradients"):
        forwards(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forwards(24)  # once is enough


def test_what_was_tied_to_trained_tensors_after_injection_is_refused(tmp_path):
    for name in ("lm_head", "embed_tokens"):
        config = vblora.VBLoRAConfig(**SIZES, modules_to_save=[name])
        model = vblora.inject(llama(tie_word_embeddings=True), config)
        model.resize_token_embeddings(60)  # ties them again
        with pytest.raises(
            ValueError, match=r"no longer contains `lm_head`|have become one tensor: something tied them"
        ):
            vblora.save(model, tmp_path / name)
        assert not (tmp_path / name).exists()


def test_ejecting_leaves_what_was_replaced_and_follows_what_was_moved():
    net = Net(blocks=3)
    ups = [block.up for block in net.blocks]
    vblora.inject(net, vblora.VBLoRAConfig(**SIZES, target_modules=["up"]))
    net.blocks[0].up = own = nn.Linear(16, 32)
    net.blocks[1] = nn.Sequential(net.blocks[1])
    net.blocks = net.blocks[:2]
    vblora.eject(net)
    assert net.blocks[0].up is own and net.blocks[1][0].up is ups[1] and not hasattr(net, "vblora")


def test_blocks_that_were_reordered_are_warned_of(tmp_path):
    net = vblora.inject(Net(blocks=3), vblora.VBLoRAConfig(**SIZES, target_modules=["up"]))
    net.blocks[2] = nn.Sequential(net.blocks[2])  # only its name is longer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vblora.save(net, tmp_path)
    net.blocks[0], net.blocks[1] = net.blocks[1], net.blocks[0]
    with pytest.warns(vblora.VBLoRAWarning, match=r"`blocks.0.up`, `blocks.1.up` are names of other modules now"):
        vblora.save(net, tmp_path)


def pruned(blocks: slice):
    net = vblora.inject(Net(blocks=2).eval(), vblora.VBLoRAConfig(**SIZES, target_modules=["up", "down"]))
    net.blocks = net.blocks[blocks]
    return net


@pytest.mark.parametrize("blocks", [slice(1), slice(1, None)])
def test_blocks_that_were_taken_out_do_not_matter_to_what_is_left(blocks):
    net, x = pruned(blocks), torch.randn(3, 16)
    out = net(x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), out)
        vblora.set_adapter(other, [])
        vblora.eject(other)
    vblora.merge(net, release=True)
    assert vblora.model.whole.is_plain(vblora.model.lookup.adapted_model(net))
    vblora.eject(net)
    assert not hasattr(net, "vblora") and type(net.blocks[0].up) is nn.Linear
    torch.testing.assert_close(net(x), out)


def test_blocks_that_were_taken_out_of_a_merged_model():
    net = vblora.merge(vblora.inject(Net(blocks=2).eval(), vblora.VBLoRAConfig(**SIZES, target_modules=["up"])))
    net.blocks = net.blocks[:1]
    vblora.unmerge(net)
    vblora.set_adapter(net, [])  # refuses a merged model


IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("ran_before", [False, True])
def test_training_refuses_a_head_that_was_replaced(ran_before):
    model = vblora.inject(llama().train(), vblora.VBLoRAConfig(**SIZES, modules_to_save=["embed_tokens", "lm_head"]))
    if ran_before:
        vblora.parameter_groups(model)
        model(IDS)
    model.resize_token_embeddings(60)
    for call in (lambda: model(IDS), lambda: vblora.parameter_groups(model)):
        with pytest.raises(
            ValueError, match=r"no longer contains `lm_head` that adapter 'default' trains.*then inject"
        ):
            call()
    model.eval()(IDS)  # inference may go on


def test_training_refuses_tensors_that_were_tied_since():
    model = vblora.inject(
        llama(tie_word_embeddings=True).train(), vblora.VBLoRAConfig(**SIZES, modules_to_save=["embed_tokens"])
    )
    model(IDS)
    model.tie_weights()
    with pytest.raises(ValueError, match="have become one tensor: something tied them"):
        model(IDS)


def test_training_goes_on_with_modules_that_were_moved_wrapped_or_taken_out():
    net = vblora.inject(Net(blocks=2), vblora.VBLoRAConfig(**SIZES, target_modules=["up"], modules_to_save=["head"]))
    x = torch.randn(3, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(x)
        net.blocks[0] = nn.Sequential(net.blocks[0])
        vblora.inject(net, vblora.VBLoRAConfig(**SIZES, target_modules=["head"], pad=True), adapter_name="second")
        net(x)
        net.head.bias = nn.Parameter(torch.ones(3))
        copy.deepcopy(net)(x)
    net.blocks = net.blocks[:1]
    with pytest.warns(vblora.VBLoRAWarning, match=r"`blocks.1.up` that adapter 'default' trains were taken out"):
        net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(x)


def test_a_copy_of_an_adapted_layer_is_warned_of(tmp_path):
    net = vblora.inject(Net(blocks=2), vblora.VBLoRAConfig(**SIZES, target_modules=["up"]))
    net.blocks.append(copy.deepcopy(net.blocks[0]))
    copied = r"`blocks.2.up` became part of the model after vblora.inject, as a copy"
    for use in (lambda: vblora.parameter_groups(net), lambda: vblora.save(net, tmp_path)):
        with pytest.warns(vblora.VBLoRAWarning, match=copied):
            use()


def test_what_trains_around_the_injected_model_is_warned_of(tmp_path):
    net = vblora.inject(Net(blocks=1), vblora.VBLoRAConfig(**SIZES, target_modules=["up"]))
    whole = nn.Sequential(OrderedDict(backbone=net, top=nn.Linear(3, 2)))
    with pytest.warns(vblora.VBLoRAWarning, match=r"`top.weight`, `top.bias` changed in training or can.*yourself"):
        vblora.save(whole, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vblora.save(net, tmp_path)
