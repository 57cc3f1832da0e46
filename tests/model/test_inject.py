"""Injects and ejects adapters, merges and disables them, and checks what trains."""

import copy
import functools

import pytest
import torch
from torch import nn

import vblora
from tests.small_models import Block, ComposedRows, Net, bert, gpt2, llama, relative_error
from vblora.layers.adapted import AdaptedLayer

SIZES = {"r": 2, "num_vectors": 16, "vector_length": 8, "init_vector_bank_bound": 1.0}
pytestmark = pytest.mark.usefixtures("device")
NET_CONFIG = vblora.VBLoRAConfig(target_modules=["up", "down"], **SIZES)


def snapshot(model: nn.Module) -> dict:
    """Everything that `inject` can change, to check that it did not."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {
        "state": state,
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "hooks": (len(model._forward_pre_hooks), len(model._forward_hooks)),
        "attributes": sorted(vars(model)),
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = snapshot(model)
    assert before.pop("state").keys() == after["state"].keys()
    state = after.pop("state")
    assert after == before
    return state


def same_state(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train_a_little(model: nn.Module, **inputs) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()


def bert_inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": 3 + torch.arange(27).view(3, 9), "labels": torch.tensor([0, 1, 0])}


def trained_bert() -> tuple[nn.Module, nn.Module]:
    """A base model, and the model of an adapter that was trained on it with biases and a head."""
    torch.manual_seed(0)
    base = bert().eval()
    model = vblora.inject(copy.deepcopy(base), vblora.VBLoRAConfig(modules_to_save=["classifier"], bias="all", **SIZES))
    train_a_little(model, **bert_inputs())
    return base, model


def test_wraps_targets_and_freezes_the_rest():
    net = Net(blocks=2)
    assert vblora.inject(net, NET_CONFIG) is net
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {
        "vblora.default.logits",
        "vblora.default.bank.vectors",
    }
    assert [t.name for t in net.vblora.default.targets] == [
        "blocks.0.up",
        "blocks.0.down",
        "blocks.1.up",
        "blocks.1.down",
    ]
    assert net.vblora.default.num_subvectors == 2 * 2 * 2 * (16 + 32) // 8
    assert not isinstance(net.embed, AdaptedLayer)
    assert "AdaptedLayer" in repr(net)


def test_eject_restores_everything():
    torch.manual_seed(0)
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    config = vblora.VBLoRAConfig(modules_to_save=["classifier"], bias="all", **SIZES)
    vblora.inject(model, config)
    train_a_little(model, **bert_inputs())
    assert not torch.equal(model.classifier.weight, state["classifier.weight"])
    assert vblora.eject(model) is model
    assert same_state(assert_unchanged(model, before), state)
    vblora.inject(model, config)  # again


def test_eject_after_moving_and_casting():
    model = Net(blocks=1)
    weight = model.blocks[0].up.weight.detach().clone()
    vblora.inject(model, vblora.VBLoRAConfig(target_modules=["up", "down"], modules_to_save=["head"], **SIZES))
    vblora.eject(model.double())
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert torch.equal(model.blocks[0].up.weight, weight.double())


@pytest.mark.parametrize(
    ("model", "config", "error", "message"),
    [
        (lambda: Net(blocks=1), {"target_modules": ["nope"]}, ValueError, "matches no layer"),
        (lambda: Net(blocks=1), {"target_modules": ["upp"]}, ValueError, "Nearest names: up"),
        (lambda: Net(blocks=1), {"target_modules": None}, ValueError, "no default"),
        (
            lambda: Net(blocks=1),
            {"target_modules": ["up", "head"]},
            ValueError,
            r"`vector_length` is 8.*`head` \(16 -> 3\).*Allowed lengths: 1; with pad=True, any length",
        ),
        (lambda: Net(blocks=1), {"target_modules": ["blocks"]}, TypeError, "`blocks`, a ModuleList"),
        (bert, {"target_modules": ["LayerNorm"]}, TypeError, "a LayerNorm; allowed are nn.Linear, nn.Embedding"),
        (bert, {"modules_to_save": ["clasifier"]}, ValueError, "`clasifier`"),
        (
            lambda: nn.TransformerEncoderLayer(16, 2, 32),
            {"target_modules": ["out_proj"]},
            TypeError,
            "MultiheadAttention",
        ),
    ],
)
def test_a_refusal_changes_nothing(model, config, error, message):
    model = model()
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        vblora.inject(model, vblora.VBLoRAConfig(**SIZES | config))
    assert same_state(assert_unchanged(model, before), state)


def test_refuses_a_second_adapter_and_a_taken_name():
    net = vblora.inject(Net(blocks=1), NET_CONFIG)
    with pytest.raises(ValueError, match="already"):
        vblora.inject(net, NET_CONFIG)
    taken = Net(blocks=1)
    taken.vblora = 3
    with pytest.raises(ValueError, match="`vblora`"):
        vblora.inject(taken, NET_CONFIG)
    with pytest.raises(TypeError, match="config"):
        vblora.inject(Net(blocks=1), {"r": 4})


@pytest.mark.parametrize("function", [vblora.eject, vblora.merge, vblora.unmerge, vblora.parameter_groups])
def test_without_an_adapter(function):
    with pytest.raises(ValueError, match="inject"):
        function(Net(blocks=1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 16)

    def forward(self, x):
        return self.head(self.encoder(self.attention(x, x, x)[0]))


def test_layers_that_are_read_but_not_called_are_left_out():
    """MultiheadAttention never calls its projection."""
    model = vblora.inject(Attention(), vblora.VBLoRAConfig(target_modules="all-linear", **SIZES))
    assert [t.name for t in model.vblora.default.targets] == ["encoder.linear1", "encoder.linear2", "head"]
    for name in ("encoder.self_attn.out_proj", "attention.out_proj"):
        with pytest.raises(TypeError, match=name):
            vblora.inject(Attention(), vblora.VBLoRAConfig(target_modules=[name], **SIZES))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x, src_key_padding_mask=None):
        return self.encoder(x, src_key_padding_mask=src_key_padding_mask)


@torch.no_grad()
@pytest.mark.parametrize("targets", ["all-linear", r"encoder\.layers\.1\.linear1"])
def test_torchs_encoder_calls_its_layers_in_inference(targets):
    """Its fast path does not."""
    model = Encoder().eval()
    config = vblora.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    merged = vblora.merge(copy.deepcopy(vblora.inject(model, config)))
    x, mask = torch.randn(3, 5, 16), torch.tensor([[False] * (5 - rest) + [True] * rest for rest in (0, 1, 2)])
    for own, theirs in ((model, merged), (model.encoder, merged.encoder)):
        torch.testing.assert_close(own(x), theirs(x))
        torch.testing.assert_close(
            own(x, src_key_padding_mask=mask)[~mask], theirs(x, src_key_padding_mask=mask)[~mask]
        )
    torch.testing.assert_close(model.encoder.layers[1](x), merged.encoder.layers[1](x))


def test_all_linear_leaves_out_the_output_layer():
    for make, head in ((bert, "classifier"), (llama, "lm_head"), (gpt2, "lm_head")):
        model = vblora.inject(make(), vblora.VBLoRAConfig(target_modules="all-linear", **SIZES))
        names = {t.name for t in model.vblora.default.targets}
        assert head not in names and len(names) >= 8


def test_a_bank_can_be_shared_between_models():
    bank = vblora.VectorBank(16, 8)
    one, other = (vblora.inject(Net(blocks=1), NET_CONFIG, bank=bank) for _ in range(2))
    assert one.vblora.default.bank is other.vblora.default.bank is bank
    with pytest.raises(ValueError, match="`bank` has 15"):
        vblora.inject(Net(blocks=1), NET_CONFIG, bank=vblora.VectorBank(15, 8))


@pytest.mark.parametrize("bias", ["none", "all", "vblora_only"])
def test_bias(bias):
    model = vblora.inject(bert(), vblora.VBLoRAConfig(bias=bias, **SIZES))
    biases = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    everywhere = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    of_targets = {f"{t.name}.base_layer.bias" for t in model.vblora.default.targets}
    assert biases == {"none": set(), "all": everywhere, "vblora_only": of_targets}[bias]
    x = bert_inputs()["input_ids"]
    with vblora.disabled(model), torch.no_grad():
        base = model(x).logits
    train_a_little(model, **bert_inputs())
    with vblora.disabled(model), torch.no_grad():
        assert torch.equal(model(x).logits, base)


def test_what_is_tied_stays_tied():
    model = llama(tie_word_embeddings=True)
    config = vblora.VBLoRAConfig(modules_to_save=["embed_tokens", "lm_head"], **SIZES)
    vblora.inject(model, config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.requires_grad
    vblora.eject(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_merging_leaves_a_tied_weight_alone():
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=True, vocab_size=64).eval()
    ids = torch.randint(3, 50, (2, 7))
    vblora.inject(model, vblora.VBLoRAConfig(target_modules=["lm_head"], **SIZES))
    expected = model(ids).logits
    embedding = model.model.embed_tokens.weight.detach().clone()
    vblora.merge(model)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert relative_error(model(ids).logits, expected) < 1e-5
    vblora.unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("make", [bert, llama, gpt2])
def test_merge_and_unmerge(make):
    torch.manual_seed(0)
    model = vblora.inject(make().eval(), vblora.VBLoRAConfig(**SIZES))
    ids = torch.randint(3, 50, (2, 7))
    before, state = model(ids).logits, copy.deepcopy(model.state_dict())
    vblora.merge(model)
    assert not same_state(dict(model.state_dict()), state)
    assert relative_error(model(ids).logits, before) < 1e-5
    with pytest.raises(ValueError, match="already merged"):
        vblora.merge(model)
    vblora.unmerge(model)
    assert same_state(dict(model.state_dict()), state)
    assert torch.equal(model(ids).logits, before)
    vblora.unmerge(model)  # nothing to do


def test_merge_rounds_once():
    torch.manual_seed(0)
    net = vblora.inject(Net(blocks=1).bfloat16(), NET_CONFIG)
    layer = net.blocks[0].up
    A, B, *_ = layer.updates["default"].slot.factors(torch.float32)
    expected = (layer.weight.double() + (B.T @ A).double()).bfloat16()
    vblora.merge(net)
    assert (layer.weight != expected).float().mean() < 0.01  # float32 sums sometimes round to the other side of a tie


def test_a_released_merge_is_final():
    torch.manual_seed(0)
    model = vblora.inject(bert().eval(), vblora.VBLoRAConfig(modules_to_save=["classifier"], **SIZES))
    train_a_little(model, **bert_inputs())
    x = bert_inputs()["input_ids"]
    before = model(x).logits
    vblora.merge(model, release=True)
    assert relative_error(model(x).logits, before) < 1e-5
    with pytest.raises(ValueError, match="release"):
        vblora.unmerge(model)
    with pytest.raises(ValueError, match="release"), vblora.disabled(model):
        pass
    vblora.eject(model)
    assert not any("vblora" in name for name, _ in model.named_modules())
    assert relative_error(model(x).logits, before) < 1e-5


def test_a_broken_adapter_is_not_merged():
    net = vblora.inject(Net(blocks=2), NET_CONFIG)
    state = copy.deepcopy(net.blocks.state_dict())
    with torch.no_grad():
        net.vblora.default.logits[-1] = float("nan")
    with pytest.raises(ValueError, match="would not be finite"):
        vblora.merge(net)
    assert same_state(dict(net.blocks.state_dict()), state)
    assert not any(layer.merged for layer in net.modules() if isinstance(layer, AdaptedLayer))


def test_an_integer_weight_is_not_merged():
    net = vblora.inject(Net(blocks=1), NET_CONFIG)
    net.blocks[0].down.base_layer.weight = nn.Parameter(torch.ones(16, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"blocks\.0\.down.*int8"):
        vblora.merge(net)
    assert not net.blocks[0].up.merged


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_is_the_base_model(merged):
    base, model = trained_bert()
    x = bert_inputs()["input_ids"]
    expected = base(x).logits
    if merged:
        vblora.merge(model)
    before = model(x).logits
    with vblora.disabled(model) as same:
        assert same is model
        assert torch.equal(model(x).logits, expected)
        with vblora.disabled(model):
            assert torch.equal(model(x).logits, expected)
        assert torch.equal(model(x).logits, expected)
    assert torch.equal(model(x).logits, before)
    with pytest.raises(KeyError), vblora.disabled(model):
        raise KeyError
    assert torch.equal(model(x).logits, before)


def test_a_disabled_adapter_gets_no_gradient():
    net = vblora.inject(Net(blocks=1), NET_CONFIG)
    x = torch.randn(2, 16, requires_grad=True)
    with vblora.disabled(net):
        net(x).sum().backward()
    assert net.vblora.default.logits.grad is None and x.grad is not None


def test_parameter_groups():
    model = vblora.inject(bert(), vblora.VBLoRAConfig(modules_to_save=["classifier"], **SIZES))
    groups = {group["name"]: group for group in vblora.parameter_groups(model)}
    assert groups["bank"]["params"] == [model.vblora.default.bank.vectors] and groups["bank"]["lr"] == 3e-3
    assert groups["logits"]["params"] == [model.vblora.default.logits] and groups["logits"]["lr"] == 0.5
    assert groups["logits"]["weight_decay"] == 0
    assert set(groups["other"]["params"]) == set(model.classifier.parameters())
    torch.optim.AdamW(vblora.parameter_groups(model, lr_bank=1.0, lr_logits=2.0, lr_other=3.0))

    def rates(**arguments):
        return {group["name"]: group["lr"] for group in vblora.parameter_groups(model, **arguments)}

    assert rates(recipe="paper") == {"bank": 1e-3, "logits": 1e-2, "other": 2e-3}
    assert rates(recipe="paper", lr_logits=0.0, lr_other=3.0) == {"bank": 1e-3, "logits": 0.0, "other": 3.0}
    with pytest.raises(ValueError, match="`recipe` is 'best'; allowed are 'auto', 'default', 'language', 'paper'"):
        rates(recipe="best")
    model.vblora.default.bank.requires_grad_(False)
    assert [group["name"] for group in vblora.parameter_groups(model)] == ["logits", "other"]


def test_count_parameters():
    model = vblora.inject(bert(), vblora.VBLoRAConfig(modules_to_save=["classifier"], **SIZES))
    head = sum(p.numel() for p in model.classifier.parameters())
    rows = 4 * 2 * (32 + 32) // 8  # two layers' query and value, r = 2
    assert vblora.count_parameters(model) == (16 * 8 + rows * 16 + head, 16 * 8 + rows * 2 * 5 // 4 + head)


def test_a_sequential_can_be_injected():
    net, x = nn.Sequential(Block(16), nn.Tanh(), Block(16)), torch.randn(3, 16)
    expected = net(x)
    vblora.inject(net, NET_CONFIG)
    assert not torch.equal(net(x), expected)
    with vblora.disabled(net):
        assert torch.equal(net(x), expected)


def test_a_layer_in_two_places_is_adapted_once():
    net = Net(blocks=2)
    net.blocks[1].up = net.blocks[0].up
    vblora.inject(net, NET_CONFIG)
    assert net.blocks[1].up is net.blocks[0].up
    assert isinstance(net.blocks[0].up, AdaptedLayer)
    assert len(net.vblora.default.targets) == 3
    vblora.eject(net)
    assert net.blocks[1].up is net.blocks[0].up and type(net.blocks[0].up) is nn.Linear


class Wrapper(nn.Module):
    """Wraps a model like DDP."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_everything_works_through_a_wrapper(tmp_path):
    base, model = trained_bert()
    x = bert_inputs()["input_ids"]
    expected = base(x).logits
    wrapper = Wrapper(model)
    before = wrapper(x).logits
    with vblora.disabled(wrapper):
        assert torch.equal(wrapper(x).logits, expected)
    vblora.save(wrapper, tmp_path)
    assert torch.equal(vblora.load(copy.deepcopy(base), tmp_path)(x).logits, before)
    assert vblora.count_parameters(wrapper) == vblora.count_parameters(model)
    vblora.eject(wrapper)
    assert torch.equal(wrapper(x).logits, expected)


def test_what_is_refused_while_disabled(tmp_path):
    model = vblora.inject(bert().eval(), vblora.VBLoRAConfig(modules_to_save=["classifier"], **SIZES))
    train_a_little(model, **bert_inputs())
    before, count = model(bert_inputs()["input_ids"]).logits, vblora.count_parameters(model)
    with vblora.disabled(model):
        for refused in (vblora.merge, vblora.unmerge, vblora.eject, vblora.parameter_groups):
            with pytest.raises(ValueError, match="disabled"):
                refused(model)
        vblora.save(model, tmp_path)  # saves the trained tensors, not those in the model now
        with pytest.raises(ValueError, match="disabled"):
            vblora.load(model, tmp_path)
        assert vblora.count_parameters(model).stored == count.stored
    assert torch.equal(model(bert_inputs()["input_ids"]).logits, before)
    vblora.eject(model)
    assert torch.equal(vblora.load(model, tmp_path)(bert_inputs()["input_ids"]).logits, before)


def test_a_failure_while_copying_changes_nothing(monkeypatch):
    model = bert()
    before, state = snapshot(model), copy.deepcopy(model.state_dict())

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(torch.Tensor, "clone", fails)
    with pytest.raises(MemoryError):
        vblora.inject(model, vblora.VBLoRAConfig(modules_to_save=["classifier"], **SIZES))
    monkeypatch.undo()
    assert same_state(assert_unchanged(model, before), state)


def test_an_integer_parameter_can_be_saved_beside():
    model = bert()
    model.classifier.table = nn.Parameter(torch.arange(3), requires_grad=False)
    vblora.inject(model, vblora.VBLoRAConfig(modules_to_save=["classifier"], **SIZES))
    assert not model.classifier.table.requires_grad


def test_a_module_under_two_names_is_copied_once():
    model = Net(blocks=1)
    model.alias = model.head
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    config = vblora.VBLoRAConfig(target_modules=["up", "down"], modules_to_save=["head", "alias"], **SIZES)
    vblora.inject(model, config)
    with torch.no_grad():
        model.head.weight.add_(1)
    vblora.eject(model)
    assert same_state(assert_unchanged(model, before), state)


def test_the_config_is_the_models_own():
    config = vblora.VBLoRAConfig(target_modules=["up", "down"], **SIZES)
    net = vblora.inject(Net(blocks=1), config)
    config.r = 7
    assert vblora.model.lookup.attached_adapter(net).config.r == 2
    config.r = 0
    with pytest.raises(ValueError, match="`r` is 0"):
        vblora.inject(Net(blocks=1), config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.ModuleList([Block(16)]), "ModuleList, which is never called"),
        (lambda: torch.compile(Net(blocks=1)), "compiled"),
    ],
)
def test_refuses_what_it_cannot_serve(make, message):
    with pytest.raises(TypeError, match=message):
        vblora.inject(make(), NET_CONFIG)


def test_refuses_a_model_that_holds_an_adapter():
    outer = Wrapper(vblora.inject(Net(blocks=1), NET_CONFIG))
    with pytest.raises(ValueError, match="already"):
        vblora.inject(outer, vblora.VBLoRAConfig(target_modules="all-linear", **SIZES))


@pytest.mark.parametrize("release", [False, True])
def test_a_merge_that_overflows_is_refused(release):
    net = vblora.inject(Net(blocks=2).half(), NET_CONFIG)
    with torch.no_grad():
        net.vblora.default.bank.vectors.mul_(1e4)
    state = copy.deepcopy(net.blocks.state_dict())
    with pytest.raises(ValueError, match="float16"):
        vblora.merge(net, release=release)
    assert same_state(dict(net.blocks.state_dict()), state)


def test_a_parametrized_weight_is_not_merged():
    net = Net(blocks=1)
    nn.utils.parametrizations.weight_norm(net.blocks[0].down)
    vblora.inject(net, NET_CONFIG)
    with pytest.raises(TypeError, match=r"blocks\.0\.down.*computed"):
        vblora.merge(net, release=True)
    assert not net.blocks[0].up.merged


def test_merging_in_inference_mode_leaves_a_model_that_trains():
    net = vblora.inject(Net(blocks=1), NET_CONFIG)
    with torch.inference_mode():
        vblora.merge(net)
    x = torch.randn(2, 16, requires_grad=True)
    net(x).sum().backward()
    assert x.grad is not None


def test_merged_and_disabled_models_compose_nothing():
    net, x = vblora.inject(Net(blocks=1), NET_CONFIG), torch.randn(2, 16)
    with ComposedRows() as composed, vblora.disabled(net):
        net(x)
    assert composed.calls == 0
    vblora.merge(net)
    with ComposedRows() as composed:
        net(x)
    assert composed.calls == 0


def test_weights_can_be_tied_through_an_adapted_layer():
    model = llama(tie_word_embeddings=True)
    vblora.inject(model, vblora.VBLoRAConfig(target_modules=["lm_head"], **SIZES | {"vector_length": 2}))
    model.tie_weights()
    assert model.lm_head.base_layer.weight is model.model.embed_tokens.weight


def test_factors_are_composed_in_the_widest_dtype():
    net = Net(blocks=1)
    net.blocks[0].up.bfloat16()
    vblora.inject(net, NET_CONFIG)
    seen = []
    net.embed.register_forward_hook(lambda *_: seen.append(net.vblora.default.slots[0].forward_factors.factors.A.dtype))
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 16))  # such models cast between layers; this one does not
    assert seen == [torch.float32]


def test_injects_on_the_meta_device():
    with torch.device("meta"):
        net = Net(blocks=2)
    vblora.inject(net, NET_CONFIG)
    assert net.vblora.default.logits.is_meta and net.vblora.default.bank.vectors.is_meta
    assert net(torch.randn(2, 16, device="meta")).is_meta
    with pytest.raises(ValueError, match=r"the weight of layer `blocks.0.up` is on the meta device"):
        vblora.merge(net)


def test_a_layer_on_another_device_gets_its_factors_moved():
    net = vblora.inject(Net(blocks=1), NET_CONFIG)
    net.blocks[0].up.base_layer.to("meta")
    moved = net.blocks[0].up(torch.randn(2, 16, device="meta"))
    assert moved.is_meta and moved.shape == (2, 32)


def test_one_vector_a_sub_vector_is_warned_of():
    with pytest.warns(UserWarning, match="`topk` is 1.*never train.*keeps its initial bank vector.*Set `topk` to 2"):
        vblora.inject(bert(), vblora.VBLoRAConfig(r=2, num_vectors=16, vector_length=8, topk=1))
    with pytest.warns(UserWarning, match="`topk` is 1.*never train") as caught:
        vblora.VBLinear(16, 8, num_vectors=16, vector_length=8, topk=1)
    assert caught[0].filename == __file__


def test_every_name_that_a_module_cannot_have_is_refused():
    net = Net(blocks=1)
    before, taken = snapshot(net), set(dir(nn.ModuleDict()))
    assert {"_modules", "_forward_hooks", "training", "keys", "__class__"} <= taken
    for name in {*taken, "", "a.b"}:
        with pytest.raises(ValueError, match="cannot name a module"):
            vblora.inject(net, NET_CONFIG, adapter_name=name)
    assert_unchanged(net, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_base_layer_that_torch_quantises_afterwards_is_refused_by_name():
    quantise = functools.partial(torch.ao.quantization.quantize_dynamic, qconfig_spec={nn.Linear}, dtype=torch.qint8)
    net, x = vblora.inject(Net(blocks=1), NET_CONFIG).cpu().eval(), torch.randn(3, 16, device="cpu")
    quantised = quantise(net)
    for use in (lambda: quantised(x), lambda: vblora.merge(quantised)):
        with pytest.raises(
            TypeError, match=r"put a torch\.ao\.\S*quantized\.dynamic\.\S*Linear in the place .*vblora\.merge"
        ):
            use()
    expected = net(x)
    plain = quantise(vblora.eject(vblora.merge(net, release=True)))
    assert relative_error(plain(x), expected) < 0.1  # what the message says
