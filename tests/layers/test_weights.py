"""Quantised linear layers as targets, with the real packages: training, inference, merging, and the Trainer."""

import copy
import importlib
import warnings

import pytest
import torch
from torch import nn

import vblora
from tests.small_models import Block, relative_error
from vblora.layers.adapted import AdaptedLayer
from vblora.layers.weights import disable_packing, format_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:.*is an Enum subclass"),
]
SIZES = {"r": 2, "num_vectors": 16, "vector_length": 8, "init_vector_bank_bound": 0.5, "num_candidates": 8}
CONFIG = {"target_modules": ["up", "down"]} | SIZES


def package(name):
    try:
        return importlib.import_module(name)
    except Exception as error:  # the reason to skip
        pytest.skip(f"{name} does not import here: {type(error).__name__}: {error}")


class Net(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


def replaced(net, make):
    for block in net.blocks:
        for name, linear in list(block.named_children()):
            layer = make(linear.in_features, linear.out_features)
            layer.load_state_dict(linear.state_dict())
            setattr(block, name, layer.to("cpu"))  # `to` quantises it
    return net


def eight_bits(net, **choice):
    layers = package("bitsandbytes").nn
    return replaced(net, lambda *widths: layers.Linear8bitLt(*widths, has_fp16_weights=False, **choice))


def four_bits(net, **choice):
    layers = package("bitsandbytes").nn
    return replaced(net, lambda *widths: layers.Linear4bit(*widths, **choice))


def torchao_int8(net, config="Int8WeightOnlyConfig", group=None):
    quantization = package("torchao.quantization")
    choice = {"granularity": group(quantization)} if group else {}
    quantization.quantize_(net.blocks, getattr(quantization, config)(**choice))
    return net


QUANTISED = {
    "8 bits": eight_bits,
    "8 bits, outliers": lambda net: eight_bits(net, threshold=2.0),
    "nf4": lambda net: four_bits(net, quant_type="nf4"),
    "fp4": lambda net: four_bits(net, quant_type="fp4", compress_statistics=False),
    "nf4 stored in bfloat16": lambda net: four_bits(net, quant_type="nf4", quant_storage=torch.bfloat16),
    "nf4 of bfloat16": lambda net: four_bits(net.bfloat16(), quant_type="nf4").float(),
    "torchao": torchao_int8,
    "torchao, by tensor": lambda net: torchao_int8(net, group=lambda q: q.PerTensor()),
    "torchao, by groups": lambda net: torchao_int8(net, group=lambda q: q.PerGroup(32)),
}
# The error of a merged weight is that of its format.
ERROR = {"8 bits": 0.01, "nf4": 0.12, "fp4": 0.15, "torchao": 0.02}


@pytest.fixture(params=QUANTISED)
def base(request):
    torch.manual_seed(0)
    net = QUANTISED[request.param](Net())
    net.kind = request.param
    return net


def shaken(model):
    with torch.no_grad():
        adapter = model.vblora.default
        adapter.logits.add_(torch.randn_like(adapter.logits))
    return model


def injected(base, **choice):
    torch.manual_seed(1)
    return shaken(vblora.inject(copy.deepcopy(base), vblora.VBLoRAConfig(**CONFIG | choice)))


def dense(layer):
    return format_of(layer.weight).read(layer).clone()


def test_outputs_and_gradients_are_those_of_base_and_update(base):
    model, x = injected(base), torch.randn(3, 64)

    class Explicit(nn.Module):
        """The same quantised layer plus the update, by its formula."""

        def __init__(self, layer):
            super().__init__()
            self.layer, self.slot = layer.base_layer, layer.updates["default"].slot

        def forward(self, x):
            A, B, *_ = self.slot.adapter.compose(torch.float32)[self.slot.index]
            return self.layer(x) + x @ A.T @ B

    explicit = copy.deepcopy(model)
    adapter = explicit.vblora.default
    blocks = nn.ModuleList(explicit.blocks)
    for block in blocks:
        block.up, block.down = Explicit(block.up), Explicit(block.down)

    def plain(x):
        x = explicit.embed(x)
        for block in blocks:
            x = block(x)
        return x

    one, other = model(x), plain(x)
    assert relative_error(one, other) < 1e-5
    one.square().sum().backward(), other.square().sum().backward()
    ours = model.vblora.default
    for mine, theirs in ((ours.logits, adapter.logits), (ours.bank.vectors, adapter.bank.vectors)):
        assert relative_error(mine.grad, theirs.grad) < 1e-4
        assert mine.grad.any()
    assert ours.logits.dtype == torch.float32
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("vblora."))


def test_trains_also_after_an_evaluation(base):
    """bitsandbytes repacks 4-bit weights for evaluation on some CPUs, and then passes no gradient through them."""
    with torch.no_grad():
        base.eval()(torch.randn(3, 64))
    model, x = injected(base).train(), torch.randn(8, 64)
    optimizer = torch.optim.SGD(vblora.parameter_groups(model), lr=0.01)
    losses = []
    for step in range(6):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        first = model.blocks[0].up.updates["default"].slot  # far from the loss: its gradient passes every later layer
        rows = slice(0, first.adapter._rows[0] + first.adapter._rows[1])
        gradient = first.adapter.logits.grad[rows].clone()
        if step == 0:
            reached = gradient
        optimizer.step()
        losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            model(x)
        model.train()
    assert losses[-1] < losses[0]
    assert gradient.norm() > 0.1 * reached.norm() > 0


def test_inference_composes_for_the_dtype_of_the_activations(base):
    model = injected(base).eval()
    with torch.no_grad():
        model(torch.randn(3, 64))
    assert model.vblora.default.compute_dtype == torch.float32


def test_merge_reports_its_error_and_unmerge_gives_every_bit_back(base):
    model, x = injected(base).eval(), torch.randn(5, 64)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLayer)}
    with torch.no_grad():
        before = model(x)
    weights = {name: layer.weight for name, layer in layers.items()}
    stored = {name: _bits(layer.weight) for name, layer in layers.items()}
    was = {name: dense(layer.base_layer) for name, layer in layers.items()}
    sums = {name: was[name] + layer.delta_weight(["default"]) for name, layer in layers.items()}
    with pytest.warns(UserWarning, match=r"4 merged weights were quantised again.*`blocks\.\d\.(up|down)`"):
        vblora.merge(model)
    allowed = next(limit for kind, limit in ERROR.items() if base.kind.startswith(kind))
    for name, layer in layers.items():
        now = dense(layer.base_layer)
        assert type(layer.weight) is type(weights[name]) and layer.weight.dtype == weights[name].dtype
        assert not layer.weight.requires_grad
        assert [len(part) for part in _bits(layer.weight)] == [len(part) for part in stored[name]]
        error = (now - sums[name]).norm()
        assert layer.rounding.of_weight == pytest.approx((error / sums[name].norm()).item(), rel=0.05)
        assert layer.rounding.of_update == pytest.approx((error / (sums[name] - was[name]).norm()).item(), rel=0.05)
        assert 0 < layer.rounding.of_weight < allowed
    with torch.no_grad():
        merged = model(x)
        model(x)  # again: bitsandbytes' 8-bit layers move a weight's state in their first forward
    with vblora.disabled(model), torch.no_grad():
        plain = model(x)
        disable_packing(base)
        assert torch.equal(plain, base.eval()(x))
    assert relative_error(merged, before) < 0.5 * relative_error(before, plain)
    vblora.unmerge(model)
    assert {name: _bits(layer.weight) for name, layer in layers.items()} == stored
    for name, layer in layers.items():
        assert layer.weight is weights[name] and layer.rounding is None
        if hasattr(layer.weight, "quant_state"):  # where bitsandbytes looks for it if FSDP loses the weight's own
            assert layer.base_layer.quant_state is layer.weight.quant_state
    with torch.no_grad():
        assert torch.equal(model(x), before)


def _bits(weight):
    """All parts of a quantised weight."""
    if hasattr(weight, "quant_state"):
        state = weight.quant_state
        parts = [weight.data, state.absmax, *([state.offset, state.state2.absmax] if state.nested else [])]
    elif hasattr(weight, "qdata"):
        parts = [weight.qdata, weight.scale]
    else:
        parts = [weight.data]
    return [part.flatten().view(torch.uint8).tolist() for part in parts]


def test_a_released_merge_leaves_a_plain_quantised_model(base):
    model, x = injected(base).eval(), torch.randn(5, 64)
    with torch.no_grad():
        before = model(x)
    with pytest.warns(UserWarning, match="quantised again"):
        vblora.merge(model, release=True)
    vblora.eject(model)
    assert type(model.blocks[0].up) is type(base.blocks[0].up)
    disable_packing(base)
    with torch.no_grad():
        after = model(x)
        assert relative_error(after, before) < 0.5 * relative_error(before, base.eval()(x))
    model.state_dict()


def test_adapters_are_merged_one_after_the_other(base):
    model = injected(base)
    vblora.inject(model, vblora.VBLoRAConfig(**CONFIG), adapter_name="other")
    vblora.set_adapter(model, ["default", "other"])
    layer = model.blocks[0].up
    expected = dense(layer.base_layer) + layer.delta_weight(["default", "other"])
    bits = _bits(layer.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        vblora.merge(model, "other")
        vblora.merge(model, "default")
        twice = dense(layer.base_layer)
        vblora.unmerge(model)
        assert _bits(layer.weight) == bits
        vblora.merge(model)
    # The original weight was quantised once, not twice.
    assert torch.equal(dense(layer.base_layer), twice)
    assert relative_error(twice, expected) < 0.2
    vblora.unmerge(model)
    vblora.eject(model)
    assert _bits(model.blocks[0].up.weight) == bits


def test_eject_and_copies_keep_the_base_as_it_was(base):
    x = torch.randn(5, 64)
    model = injected(base)
    again = copy.deepcopy(model)
    assert torch.equal(again(x), model(x))
    bits = _bits(base.blocks[0].up.weight)
    vblora.eject(model)
    assert _bits(model.blocks[0].up.weight) == bits
    flags = [vars(m).get("support_avx512bf16_for_cpu") for net in (model, base) for m in net.modules()]
    assert flags[: len(flags) // 2] == flags[len(flags) // 2 :]


def test_unmerging_after_a_cast(base):
    """A cast of the model leaves the storage of a quantised weight alone."""
    model = injected(base)
    layer = model.blocks[0].up
    bits = _bits(layer.weight)
    with pytest.warns(UserWarning, match="quantised again"):
        vblora.merge(model)
    model.double()
    vblora.unmerge(model)
    assert _bits(layer.weight) == bits and not layer.weight.requires_grad


def test_an_adapter_goes_from_a_quantised_base_to_a_plain_one(base, tmp_path):
    model = injected(base).eval()
    vblora.save(model, tmp_path)
    torch.manual_seed(0)
    plain, x = vblora.load(Net().eval(), tmp_path), torch.randn(4, 64)
    with torch.no_grad():
        assert relative_error(model(x), plain(x)) < 0.5
        again = vblora.load(copy.deepcopy(base).eval(), tmp_path)
        assert relative_error(again(x), model(x)) < 1e-6


def test_an_update_that_overflows_is_not_merged(base):
    model = injected(base)
    with torch.no_grad():
        model.vblora.default.bank.vectors.fill_(1e20)
    bits = _bits(model.blocks[0].up.weight)
    with pytest.raises(ValueError, match=r"would not be finite in torch\.(float|bfloat)"):
        vblora.merge(model)
    assert _bits(model.blocks[0].up.weight) == bits and not model.blocks[0].up.merged


def test_a_quantised_weight_does_not_train_beside(base):
    with pytest.raises(TypeError, match=r"`blocks\.0\.up\.weight` would train, but is quantised \((bits|torchao)"):
        vblora.inject(base, vblora.VBLoRAConfig(**CONFIG | {"target_modules": ["down"], "modules_to_save": ["up"]}))
    assert not hasattr(base, "vblora")


def test_one_layer_by_hand(base):
    layer = vblora.VBLinear(base_layer=base.blocks[0].up, num_vectors=16, vector_length=8)
    assert (layer.in_features, layer.out_features) == (64, 128)
    x = torch.randn(3, 64)
    with torch.no_grad():
        layer.eval()(x)
    x.requires_grad_(True)
    layer.train()(x).sum().backward()
    assert x.grad.any() and layer.adapter.logits.grad.any()


def test_what_quantises_activations_is_loaded_but_not_trained(tmp_path):
    vblora.save(injected(Net()), tmp_path)
    net = torchao_int8(Net(), "Int8DynamicActivationInt8WeightConfig")
    with pytest.raises(TypeError, match=r"`blocks\.0\.up`, which also quantises its input \(torchao's Int8Tensor"):
        vblora.inject(net, vblora.VBLoRAConfig(**CONFIG))
    with pytest.raises(TypeError, match="passes no gradient"):
        vblora.load(net, tmp_path, is_trainable=True)
    assert not hasattr(net, "vblora")
    late = torchao_int8(injected(Net()), "Int8DynamicActivationInt8WeightConfig")
    for use in (vblora.parameter_groups, lambda net: net(torch.randn(3, 64))):
        with pytest.raises(TypeError, match="passes no gradient"):
            use(late)
    x = torch.randn(3, 64)
    before = net(x)
    vblora.load(net, tmp_path)
    after = net(x)
    assert not torch.equal(before, after)
    how = net.blocks[0].up.weight.act_quant_kwargs
    with pytest.warns(UserWarning, match="quantised again"):
        vblora.merge(net)
    assert net.blocks[0].up.weight.act_quant_kwargs == how is not None
    assert relative_error(net(x), after) < relative_error(before, after)


def test_what_cannot_be_merged_into_is_refused_by_name():
    net = torchao_int8(Net(), "Float8WeightOnlyConfig")
    model = vblora.inject(net, vblora.VBLoRAConfig(**CONFIG))
    with pytest.raises(
        TypeError, match=r"`blocks\.0\.up` has a weight of torchao's Float8Tensor torch\.float32, which"
    ):
        vblora.merge(model)


@pytest.mark.parametrize("quantise", [torchao_int8], ids=["torchao"])
def test_compiles_in_one_graph(quantise):
    torch.manual_seed(0)
    model, x = injected(quantise(Net())), torch.randn(3, 64)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(x)
    ours = compiled(x)
    assert relative_error(ours, expected) < 1e-5
    logits = model.vblora.default.logits
    one, other = (torch.autograd.grad(y.square().sum(), logits)[0] for y in (ours, expected))
    assert relative_error(one, other) < 1e-4


@pytest.mark.parametrize("kind", [vblora.LoraConfig, vblora.VeraConfig, vblora.TiedLoraConfig])
def test_other_methods(base, kind):
    """The update equals that on the dequantised weights, and unmerging restores the base."""
    torch.manual_seed(1)
    model = vblora.inject(copy.deepcopy(base), kind(r=4, target_modules=["up", "down"]))
    with torch.no_grad():
        for parameter in model.vblora.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    x = torch.randn(3, 64)
    layer = model.blocks[0].up
    update = layer(x) - layer.base_layer(x)
    assert relative_error(update, x @ layer.delta_weight(["default"]).T) < 1e-2  # a difference of rounded values
    y = model(x)
    y.square().mean().backward()
    assert all(parameter.grad.any() for parameter in model.vblora.parameters())
    vblora.merge(model)
    assert relative_error(model(x), y) < 0.2
    vblora.unmerge(model)
    with torch.no_grad():
        assert torch.equal(model(x), y)
