"""Transforms of ``torch.func``, and ``torch.jit.trace``, which plain PyTorch modules allow."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

import vblora
from vblora import ops

WIDTHS = [(16, 24), (24, 16)]
VBLORA = vblora.VBLoRAConfig(
    r=2, num_vectors=12, vector_length=8, target_modules="all-linear", init_vector_bank_bound=0.5, seed=3
)
METHODS = [
    VBLORA,
    vblora.VBLoRAConfig(**VBLORA.to_dict() | {"num_candidates": 6}),
    vblora.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    vblora.VeraConfig(r=4, target_modules="all-linear", init_weights=False),
    vblora.TiedLoraConfig(r=2, target_modules="all-linear"),
]
every_method = pytest.mark.parametrize("config", METHODS, ids=["vblora", "candidates", "lora", "vera", "tied"])


def injected(config=VBLORA, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = vblora.inject(nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)).double(), config).double()
    for parameter in trained(net).values():
        nn.init.normal_(parameter, std=0.5)
    return net


def trained(net: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}


def values(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in trained(net).items()}


def loss_of(net: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda parameters, x: functional_call(net, parameters, (x,)).square().sum()


def oracle(net: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """The same loss of a VB-LoRA model in plain PyTorch."""
    layers = [net[0].base_layer, net[2].base_layer]

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        logits, bank = (next(p for n, p in parameters.items() if n.endswith(end)) for end in ("logits", "vectors"))
        best = logits.topk(VBLORA.topk)
        rows = (torch.softmax(best.values, 1)[..., None] * bank[best.indices]).sum(1)
        factors = [part.reshape(VBLORA.r, -1) for part in rows.split([2 * n // 8 for pair in WIDTHS for n in pair])]
        for layer, A, B in zip(layers, factors[::2], factors[1::2], strict=True):
            x = layer(x) + x @ A.T @ B
            x = torch.tanh(x) if layer is layers[0] else x
        return x.square().sum()

    return loss


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, msg=lambda text, name=name: f"{name}: {text}")
        assert tensor.norm() > 0


def test_gradients_per_sample_are_those_of_plain_pytorch():
    net, x = injected(), torch.randn(3, 1, 16, dtype=torch.float64)
    parameters = values(net)
    per_sample = vmap(grad(loss_of(net)), in_dims=(None, 0))
    found = per_sample(parameters, x)
    assert_same(found, vmap(grad(oracle(net)), in_dims=(None, 0))(parameters, x))


def test_exhausted_rows_are_not_counted():
    net, x = injected(METHODS[1]), torch.randn(5, 16, dtype=torch.float64)
    exhausted = net.vblora.default.exhausted
    grad(loss_of(net))(values(net), x)
    assert not exhausted.any()
    net(x)
    assert exhausted.any()  # there are some


@every_method
def test_grad_is_backward(config):
    net, x = injected(config), torch.randn(5, 16, dtype=torch.float64)
    found = grad(loss_of(net))(values(net), x)
    net(x).square().sum().backward()
    assert_same(found, {name: parameter.grad for name, parameter in trained(net).items()})


@every_method
def test_forward_mode_and_an_ensemble(config):
    nets = [injected(config, seed) for seed in (0, 1)]
    x = torch.randn(5, 16, dtype=torch.float64)
    parameters = values(nets[0])
    tangents = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    _, slope = jvp(lambda given: loss_of(nets[0])(given, x), (parameters,), (tangents,))
    nets[0](x).square().sum().backward()
    torch.testing.assert_close(slope, sum((p.grad * tangents[n]).sum() for n, p in trained(nets[0]).items()))

    stacked, buffers = stack_module_state([copy.deepcopy(net) for net in nets])
    outputs = vmap(lambda *state: functional_call(nets[0], state, (x,)))(stacked, buffers)
    torch.testing.assert_close(outputs, torch.stack([net(x) for net in nets]))


@every_method
def test_a_transform_of_the_input_leaves_nothing_behind(config):
    net, x = injected(config).requires_grad_(False), torch.randn(16, dtype=torch.float64)
    found = jacrev(net)(x)
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(copy.deepcopy(net), x))
    torch.testing.assert_close(net(x), vblora.eject(vblora.merge(copy.deepcopy(net), release=True))(x))


@pytest.mark.parametrize("gradients", [True, False])
@every_method
def test_forward_mode_of_torch_autograd(config, gradients):
    net, x = injected(config).eval(), torch.randn(5, 16, dtype=torch.float64)
    given = {"x": x} | values(net)
    tangents = {name: torch.randn_like(value) for name, value in given.items()}

    def output(given: dict[str, Tensor]) -> Tensor:
        return functional_call(net, {name: value for name, value in given.items() if name != "x"}, (given["x"],))

    moved = [output({name: value + step * tangents[name] for name, value in given.items()}) for step in (1e-6, -1e-6)]
    with torch.set_grad_enabled(gradients), forward_ad.dual_level():
        dual = output({name: forward_ad.make_dual(value, tangents[name]) for name, value in given.items()})
        slope = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(slope, ((moved[0] - moved[1]) / 2e-6).detach(), rtol=1e-5, atol=1e-6)


@every_method
def test_torch_refuses_transforms_that_it_does_not_tell_of(config, monkeypatch):
    """As a newer torch may no longer do, because the function that tells is private."""
    net, x = injected(config), torch.randn(5, 16, dtype=torch.float64)
    expected = net(x)
    monkeypatch.setattr(ops, "_functorch_is_active", lambda: False)
    assert torch.equal(net(x), expected)
    with pytest.raises(RuntimeError, match=r"torch.func|dynamicLayerStack"):
        grad(loss_of(net))(values(net), x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("shape", [(3, 16), (1, 4, 16)])
@every_method
def test_traces(config, shape, gradients):
    net, x = injected(config).eval(), torch.randn(shape, dtype=torch.float64)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(net, x)  # which checks the graph
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    other = torch.randn_like(x)
    torch.testing.assert_close(torch.jit.load(file)(other), net(other))
