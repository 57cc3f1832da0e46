"""VeRA, Tied-LoRA and LoRA: their updates equal the papers' formulas, copy no factors, and work in every way a model runs."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vblora
from tests.small_models import Made, Net, bert, relative_error
from vblora import reference
from vblora.adapters.base import Factors
from vblora.layers.kinds import add_product

TARGETS = ["embed", "up", "down"]
CONFIGS = {
    "lora": vblora.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS),
    "rslora": vblora.LoraConfig(r=4, use_rslora=True, init_lora_weights="gaussian", target_modules=TARGETS),
    "vera": vblora.VeraConfig(r=20, projection_prng_key=7, target_modules=TARGETS),
    "tied_lora": vblora.TiedLoraConfig(r=5, lora_alpha=3, target_modules=TARGETS),
}
methods = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
pytestmark = pytest.mark.usefixtures("device")


def injected(config, dtype: torch.dtype = torch.float64, **sizes) -> nn.Module:
    """A model whose adapter has random parameters, so that no part of the update is 0."""
    model = vblora.inject(Net(**{"blocks": 2} | sizes), config).to(dtype)
    randomise(model.vblora.default)
    return model


def randomise(adapter: nn.Module) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)


def written_out(model: nn.Module, config) -> dict[str, Tensor]:
    """Each layer's update ``(out, in)``, computed from the parameters by the papers' formulas."""
    adapter = model.vblora.default
    start, updates = 0, {}
    for number, target in enumerate(adapter.targets):
        i, o, r = target.in_features, target.out_features, config.r
        if isinstance(config, vblora.LoraConfig):
            A = adapter.factors[start : start + r * i].view(r, i)
            B = adapter.factors[start + r * i : start + r * (i + o)].view(r, o).T
            start += r * (i + o)
            updates[target.name] = B @ A * config.lora_alpha / (math.sqrt(r) if config.use_rslora else r)
            continue
        inner, outer = (adapter.d, adapter.e) if isinstance(config, vblora.VeraConfig) else (adapter.u, adapter.v)
        A, B = adapter.A[:, :i], adapter.B[:, :o].T
        update = torch.diag(outer[start : start + o]) @ B @ torch.diag(inner[number]) @ A
        updates[target.name] = update * (config.lora_alpha / r if isinstance(config, vblora.TiedLoraConfig) else 1.0)
        start += o
    return updates


def in_the_weights(net: nn.Module, updates: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base model's parameters plus the updates, for functional_call."""
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}
    return parameters | {f"{name}.weight": parameters[f"{name}.weight"] + update for name, update in updates.items()}


@methods
def test_outputs_and_gradients_are_the_formulas(config):
    torch.manual_seed(0)
    model = injected(config)
    x = torch.randn(5, 3, 16, dtype=torch.float64, requires_grad=True)
    y = model(x)
    weights = torch.randn_like(y)
    trained = list(model.vblora.default.parameters())
    grads = torch.autograd.grad((y * weights).sum(), [x, *trained])
    net = copy.deepcopy(model)
    vblora.eject(net)
    expected = torch.func.functional_call(net, in_the_weights(net, written_out(model, config)), (x,))
    assert relative_error(y, expected) < 1e-13
    assert relative_error(expected, net(x)) > 1e-2  # the adapter matters
    for grad, want in zip(grads, torch.autograd.grad((expected * weights).sum(), [x, *trained]), strict=True):
        assert relative_error(grad, want) < 1e-12


@methods
def test_the_first_update_is_zero_and_all_but_one_part_trains(config):
    net = Net(blocks=2)
    x = torch.randn(4, 16)
    model = vblora.inject(copy.deepcopy(net), config)
    assert torch.equal(model(x), net(x))
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(vblora.parameter_groups(model), lr=1.0)
    for _ in range(2):  # parameters that are multiplied by zeros train from the second step on
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("vblora."), name


def test_how_they_start():
    torch.manual_seed(0)
    sizes = {"width": 64, "blocks": 1}
    adapter = vblora.inject(Net(**sizes), vblora.VeraConfig(r=32, target_modules=TARGETS)).vblora.default
    assert (adapter.d == 0.1).all() and (adapter.e == 0).all()
    A, B = torch.empty(32, 128), torch.empty(32, 128)
    reference.draw_uniform_(A, 0, 1, math.sqrt(6 / 128))  # Kaiming's bound for PEFT's (r, in) and (out, r)
    reference.draw_uniform_(B, 0, 2, math.sqrt(6 / 32))
    assert torch.equal(adapter.A, A) and torch.equal(adapter.B, B)

    adapter = vblora.inject(Net(**sizes), vblora.TiedLoraConfig(r=8, target_modules=TARGETS)).vblora.default
    assert (adapter.u == 1).all() and (adapter.v == 1).all() and (adapter.B == 0).all()
    assert adapter.A.abs().max() <= math.sqrt(6 / 128) and adapter.A.std() > 0.9 * math.sqrt(2 / 128)

    for init in (True, False, "gaussian"):
        config = vblora.LoraConfig(r=8, init_lora_weights=init, target_modules=["up"])
        adapter = vblora.inject(Net(**sizes), config).vblora.default
        ((A, B, *_),) = adapter.compose(torch.float32)
        if init == "gaussian":
            assert abs(A.std() * 8 - 1) < 0.15 and A.abs().max() > 1 / 8
        else:  # nn.Linear's
            assert 0.95 / 8 < A.abs().max() <= 1 / 8
        assert B.abs().max() == 0 if init else 0.9 / math.sqrt(8) < B.abs().max() <= 1 / math.sqrt(8)


def test_how_lora_of_an_embedding_starts():
    net = nn.Sequential(nn.Embedding(200, 64))
    for init in (True, "gaussian", False):
        config = vblora.LoraConfig(r=8, init_lora_weights=init, target_modules=["0"])
        A, B, *_ = vblora.inject(copy.deepcopy(net), config).vblora.default.compose(torch.float32)[0]
        assert abs(B.std() - 1) < 0.15 and (abs(A.std() - 1) < 0.1 if init is False else not A.any())


def test_the_projection_depends_on_the_key_alone():
    def pair(key: int, **sizes) -> tuple[Tensor, Tensor]:
        torch.randn(3)  # torch's generator has no influence
        config = vblora.VeraConfig(r=8, projection_prng_key=key, target_modules=TARGETS)
        adapter = vblora.inject(Net(**sizes), config).vblora.default
        return adapter.A, adapter.B

    assert all(map(torch.equal, pair(3, blocks=1), pair(3, blocks=2)))
    assert not any(map(torch.equal, pair(3, blocks=1), pair(4, blocks=1)))
    narrow, wide = pair(3, width=16, blocks=1), pair(3, width=32, blocks=1)
    # Except for the bound, one is a slice of the other.
    torch.testing.assert_close(wide[0][:, :32] * math.sqrt(2), narrow[0])
    assert torch.equal(wide[1][:, :32], narrow[1])


@pytest.mark.parametrize("name", ["vera", "tied_lora"])
def test_no_slice_and_no_scaled_copy_is_made(name):
    """A forward only creates tensors as large as (tokens, r) or the output: A and B are sliced as views and never scaled."""
    model = injected(CONFIGS[name] if name == "vera" else replace(CONFIGS[name], lora_alpha=5), torch.float32)
    adapter, r, tokens = model.vblora.default, CONFIGS[name].r, 7
    x = torch.randn(tokens, 16)
    with Made() as made:
        y = model(x)
    assert made.shapes
    for shape in made.shapes:
        assert shape[0] == tokens or shape in (
            (2 * 2 + 1, r),
            tuple(adapter.e.shape if name == "vera" else adapter.v.shape),
        ), shape
    factors = adapter.compose(torch.float32)
    for pair, *_ in ((f.A, f.B) for f in factors):
        assert pair.data_ptr() == adapter.A.data_ptr()
    assert y.requires_grad
    # Of A and B, autograd saves the pair itself; otherwise it saves what PEFT's does: (tokens, r) and (tokens, out).
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        add_product(torch.randn(tokens, 32), torch.randn(tokens, r, requires_grad=True), factors[1])
    assert kept
    pointers = {adapter.A.data_ptr(), adapter.B.data_ptr()}
    assert not [t.shape for t in kept if t.dim() == 2 and t.shape[0] != tokens and t.data_ptr() not in pointers]


def test_lora_is_one_tensor_split_once():
    model = injected(CONFIGS["lora"], torch.float32, blocks=24)
    assert len(list(model.vblora.default.parameters())) == 1
    calls = []

    class Splits(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    with Splits():
        model.vblora.default.compose(torch.bfloat16)
    assert sum("split_with_sizes" in call for call in calls) == 1
    assert sum("_to_copy" in call for call in calls) == 1
    assert not any("slice" in call or "narrow" in call for call in calls)


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes(config, dtype):
    torch.manual_seed(0)
    model = injected(config)
    other = copy.deepcopy(model).to(dtype)
    exact = copy.deepcopy(other).double()
    x = torch.randn(6, 16, dtype=torch.float64).to(dtype)
    assert relative_error(other(x).double(), exact(x.double())) < {torch.float32: 1e-6, torch.bfloat16: 3e-2}[dtype]


@methods
def test_autocast_and_a_base_of_half_precision(config, device):
    torch.manual_seed(0)
    model = injected(config, torch.float32)
    x = torch.randn(6, 16)
    want = model(x)
    with torch.autocast(device.type, torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16 and relative_error(y.float(), want) < 5e-2
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.vblora.parameters())
    mixed = vblora.inject(Net(blocks=2).bfloat16(), config)
    assert all(p.dtype == torch.float32 for p in mixed.vblora.parameters())
    assert mixed(x.bfloat16()).dtype == torch.bfloat16


def test_another_projection_is_seen_in_every_dtype(device):
    """A frozen pair is cast only once."""
    model = injected(CONFIGS["vera"], torch.float32)
    x = torch.randn(6, 16)
    with torch.autocast(device.type, torch.bfloat16):
        y = model(x)
        state = copy.deepcopy(model.vblora.state_dict())
        state["default.A"] += 1
        model.vblora.load_state_dict(state)
        assert not torch.equal(model(x), y)
        state["default.A"] -= 1
        model.vblora.load_state_dict(state)
        torch.testing.assert_close(model(x), y)
        model.vblora.default.A.mul_(2)
        assert not torch.equal(model(x), y)
        model.vblora.default.A.div_(2)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):  # never cast from a rounded copy
        A, B, *_ = model.vblora.default.compose(dtype)[0]
        assert torch.equal(A, model.vblora.default.A[:, :16].to(dtype)) and A.dtype == dtype
        assert torch.equal(B, model.vblora.default.B[:, :16].to(dtype))
    model.to(torch.float64)(x.double()).sum().backward()


@methods
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_has_the_same_gradients(config, reentrant):
    torch.manual_seed(0)
    plain = injected(config)
    recomputed = copy.deepcopy(plain)
    recomputed.reentrant = reentrant
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    for model in (plain, recomputed):
        model(x).square().sum().backward()
    for (name, a), b in zip(plain.vblora.named_parameters(), recomputed.vblora.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14, msg=name)


@methods
def test_compiles_to_one_graph(config):
    torch._dynamo.reset()  # whose limit of recompilations is for all models of a process
    torch.manual_seed(0)
    model = injected(config, torch.float64)
    x = torch.randn(5, 16, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            torch.testing.assert_close(compiled(x), model(x))
    model.zero_grad()
    compiled(x).square().sum().backward()
    got = [p.grad.clone() for p in model.vblora.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for a, b in zip(got, model.vblora.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad)


@methods
def test_merge_disable_eject(config):
    torch.manual_seed(0)
    net = Net(blocks=2).double()
    model = vblora.inject(copy.deepcopy(net), config).double()
    randomise(model.vblora.default)
    x = torch.randn(5, 16, dtype=torch.float64)
    y = model(x)
    weight = model.embed.weight.clone()
    vblora.merge(model)
    assert relative_error(model(x), y) < 1e-13 and not torch.equal(model.embed.weight, weight)
    vblora.unmerge(model)
    assert torch.equal(model.embed.weight, weight) and torch.equal(model(x), y)
    with vblora.disabled(model):
        assert torch.equal(model(x), net(x))
    again = copy.deepcopy(model)
    assert torch.equal(again(x), y)
    vblora.eject(model)
    assert torch.equal(model(x), net(x)) and model.state_dict().keys() == net.state_dict().keys()
    vblora.eject(vblora.merge(again, release=True))
    assert relative_error(again(x), y) < 1e-13


@methods
def test_without_gradients_factors_are_kept_until_something_changes(config):
    model = injected(config)
    x = torch.randn(5, 16, dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
        assert torch.equal(model(x), y)
        for parameter in model.vblora.default.parameters():
            parameter.mul_(1.5)
            changed = model(x)
            assert not torch.equal(changed, y)
            y = changed
    with torch.inference_mode():
        assert torch.equal(model(x), y)
    model(x).sum().backward()


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]])
def test_adapters_of_different_methods_keys_and_sizes_in_any_order(order):
    """PEFT refuses a second VeRA adapter with another key, and some with another size."""
    net = Net(blocks=2).double()
    x = torch.randn(5, 16, dtype=torch.float64)
    configs = [
        vblora.VeraConfig(r=4, projection_prng_key=1, init_weights=False, target_modules=["embed"]),
        vblora.VeraConfig(r=16, projection_prng_key=2, init_weights=False, target_modules=["up", "down"]),
        vblora.LoraConfig(r=2, init_lora_weights=False, target_modules=["down"]),
        vblora.VBLoRAConfig(r=2, num_vectors=16, vector_length=8, target_modules=["up"], init_vector_bank_bound=1.0),
    ]
    model = copy.deepcopy(net)
    for number in order:
        torch.manual_seed(number)
        vblora.inject(model, configs[number], adapter_name=f"a{number}")
    model.double()
    alone = {}
    for number, config in enumerate(configs):
        torch.manual_seed(number)
        alone[number] = vblora.inject(copy.deepcopy(net), config).double()
        vblora.set_adapter(model, f"a{number}")
        assert torch.equal(model(x), alone[number](x))
    vblora.set_adapter(model, [f"a{number}" for number in order])
    y = model(x)
    assert {group["name"] for group in vblora.parameter_groups(model)} == {"bank", "logits", "factors", "vectors"}
    vblora.merge(model)
    assert relative_error(model(x), y) < 1e-12
    vblora.unmerge(model)
    vblora.delete_adapter(model, "a1")
    vblora.set_adapter(model, "a0")
    assert torch.equal(model(x), alone[0](x))
    assert torch.equal(vblora.eject(model)(x), net(x))


def test_counts_and_groups():
    model = vblora.inject(bert(), vblora.LoraConfig(r=3, modules_to_save=["classifier"]))
    pair = 3 * (32 + 32)
    assert vblora.count_parameters(model) == (4 * pair + 66, 4 * pair + 66)
    groups = {group["name"]: group for group in vblora.parameter_groups(model, lr_factors=0.25)}
    assert groups.keys() == {"factors", "other"} and groups["factors"]["lr"] == 0.25
    model = vblora.inject(bert(), vblora.VeraConfig(r=16))
    assert vblora.count_parameters(model) == (4 * (16 + 32),) * 2
    assert [group["name"] for group in vblora.parameter_groups(model)] == ["vectors"]
    model = vblora.inject(bert(), vblora.TiedLoraConfig(r=4))
    assert vblora.count_parameters(model) == (2 * 4 * 32 + 4 * (4 + 32),) * 2


def test_biases_and_dropout_by_their_own_names():
    config = vblora.LoraConfig(r=2, bias="lora_only", lora_dropout=0.5, init_lora_weights=False, target_modules=["up"])
    model = vblora.inject(Net(blocks=1), config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"vblora.default.factors", "blocks.0.up.base_layer.bias"}
    x = torch.randn(4, 16)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_what_is_not_for_a_method_is_refused():
    model = Net(blocks=1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for arguments, name in (({"bank": vblora.VectorBank(8, 8)}, "bank"), ({"freeze_bank": True}, "freeze_bank")):
        with pytest.raises(ValueError, match=f"`{name}` applies only to VBLoRAConfig"):
            vblora.inject(model, CONFIGS["lora"], **arguments)
    import peft

    with pytest.raises(TypeError, match=r"peft.*LoHaConfig; allowed are vblora\.VBLoRAConfig"):
        vblora.inject(model, peft.LoHaConfig(target_modules=["up"]))
    assert model.state_dict().keys() == state.keys() and not hasattr(model, "vblora")


def test_buffers_are_kept_from_ddp():
    model = vblora.inject(Net(blocks=1), CONFIGS["vera"])
    assert {"vblora.default.A", "vblora.default.B"} <= set(model._ddp_params_and_buffers_to_ignore)
    assert {"vblora.default.A", "vblora.default.B"} <= model.state_dict().keys()
    model = vblora.inject(Net(blocks=1), replace(CONFIGS["vera"], save_projection=False))
    assert not {"vblora.default.A", "vblora.default.B"} & model.state_dict().keys()


# The arithmetic


@pytest.mark.parametrize("scaled", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [(3,), (2, 5, 3), (0, 3)])
def test_product(scaled, shape):
    torch.manual_seed(0)
    hidden = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    wide = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    d = torch.randn(3, dtype=torch.float64, requires_grad=True) if scaled[0] else None
    e = torch.randn(7, dtype=torch.float64, requires_grad=True) if scaled[1] else None
    y = torch.randn(*shape[:-1], 7, dtype=torch.float64, requires_grad=True)

    def ours(y, hidden, wide, *scales):
        left = iter(scales)
        return add_product(y, hidden, Factors(None, wide[:, :7], *(next(left) if use else None for use in scaled)))

    inputs = [y, hidden, wide, *(s for s in (d, e) if s is not None)]
    want = y + (hidden * (1 if d is None else d)) @ wide[:, :7] * (1 if e is None else e)
    torch.testing.assert_close(ours(*inputs), want, rtol=1e-13, atol=1e-14)
    assert torch.autograd.gradcheck(ours, inputs)
    half = add_product(y.detach().float(), hidden, Factors(None, wide[:, :7], d, e))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), want, rtol=1e-5, atol=1e-6)


def test_a_module_of_another_kind():
    """An embedding and a convolution."""
    torch.manual_seed(0)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 6)
            self.filter = nn.Conv1d(6, 8, 3, padding=1)
            self.last = nn.Linear(8, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.last(F.relu(self.filter(self.table(ids).transpose(1, 2))).transpose(1, 2))

    ids = torch.randint(0, 11, (3, 5))
    for config in CONFIGS.values():
        model = vblora.inject(Mixed(), replace(config, target_modules=["table", "filter", "last"])).double()
        randomise(model.vblora.default)
        y = model(ids)
        vblora.merge(model)
        assert relative_error(model(ids), y) < 1e-12


@pytest.mark.parametrize(
    "config",
    [
        vblora.VeraConfig(r=4, projection_prng_key=5, target_modules=["up"]),
        vblora.VeraConfig(r=4, init_weights=False, target_modules=["up"]),
        vblora.TiedLoraConfig(r=4, target_modules=["up"]),
        vblora.LoraConfig(r=4, target_modules=["up"]),
        vblora.VBLoRAConfig(num_vectors=16, vector_length=8, seed=1, target_modules=["up"]),
    ],
    ids=lambda config: config.method,
)
def test_reset_parameters_fills_what_to_empty_left_open(config):
    with torch.device("meta"):
        model = Net(blocks=1)
    adapter = vblora.inject(model, config).to_empty(device="cpu").vblora.default
    for tensor in (*adapter.parameters(), *adapter.buffers()):
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 1)
    for seed in (0, 0):
        torch.manual_seed(seed)
        for module in adapter.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    expected = vblora.inject(Net(blocks=1), config).vblora.default.state_dict()
    for name, tensor in adapter.state_dict().items():
        assert tensor.isfinite().all(), name
        if name in ("A", "B", "e", "u", "v", "logits") and config.method != "tied_lora":
            assert torch.equal(tensor, expected[name]), name
