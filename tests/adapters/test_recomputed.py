"""Recomputed layers get the factors that the forward composed, and add their gradients to those that are there."""

import copy

import pytest
import torch

import vblora
from tests.small_models import ComposedRows, Made, Net, relative_error

SIZES = {
    "r": 2,
    "vector_length": 8,
    "num_vectors": 300,
    "target_modules": ["up", "down"],
    "init_vector_bank_bound": 1.0,
}
CONFIGS = {
    "candidates": {"num_candidates": 100},
    "dense": {"num_candidates": None},
    "scaled": {"scaling": 3.0},
    "padded": {"vector_length": 12, "pad": True},
    "top 3": {"topk": 3},
}
X = torch.linspace(-1, 1, 5 * 16).view(5, 16)
pytestmark = pytest.mark.usefixtures("one_thread")


def injected(reentrant: bool | None, **options) -> Net:
    torch.manual_seed(0)
    return vblora.inject(Net(blocks=6, reentrant=reentrant), vblora.VBLoRAConfig(**SIZES | options))


def step(net: Net) -> None:
    net(X.to(net.head.weight.dtype, copy=True).requires_grad_()).square().sum().backward()


def gradients(net: Net) -> list[torch.Tensor]:
    return [parameter.grad for parameter in net.vblora.parameters()]


def agree(net: Net, expected: Net, tolerance: float = 1e-6) -> None:
    for ours, theirs in zip(gradients(net), gradients(expected), strict=True):
        assert relative_error(ours.double(), theirs.double()) < tolerance


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_composes_once_and_has_the_same_gradients(name, reentrant):
    nets = [injected(kind, **CONFIGS[name]).double() for kind in (reentrant, None)]
    optimizers = [torch.optim.SGD(net.vblora.parameters(), lr=1e-5) for net in nets]
    for i in range(3):
        with ComposedRows() as composed:
            step(nets[0])
        step(nets[1])
        agree(*nets, tolerance=1e-12)
        subvectors = nets[0].vblora.default.num_subvectors
        # Before the second step, it is not known that layers are recomputed.
        assert composed.rows == (subvectors if i else 2 * subvectors)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_no_recomputed_layer_makes_a_gradient_of_the_bank():
    net = injected(True)
    step(net)
    for _ in range(2):
        with Made() as made:
            step(net)
        assert made.shapes.count((300, 8)) <= 1
        assert made.shapes.count(tuple(net.vblora.default.logits.shape)) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    nets = [injected(reentrant).to(dtype) for reentrant in (True, None)]
    for net in nets:
        net.vblora.float()
        for _ in range(2):
            net.zero_grad()
            net(X.to(dtype).requires_grad_()).square().sum().backward()
    agree(*nets, tolerance=1e-1 if dtype == torch.bfloat16 else 1e-5)


def test_two_forwards_before_their_backwards():
    nets = [injected(reentrant) for reentrant in (True, None)]
    step(nets[0])
    for net in nets:
        net.zero_grad()
        losses = [net((scale * X).requires_grad_()).square().sum() for scale in (1, 2)]
        for loss in losses:
            loss.backward()
    agree(*nets, tolerance=1e-5)


@pytest.mark.parametrize("change", ["in place", "through .data and a step"])
def test_changed_parameters_are_composed_again(change):
    """With the values that they have when the layer is recomputed, as any recomputation does."""
    net = injected(True)
    step(net)
    net.zero_grad()
    loss = net(X.clone().requires_grad_()).square().sum()
    adapter = net.vblora.default
    if change == "in place":
        with torch.no_grad():
            adapter.bank.vectors.mul_(2)
    else:
        adapter.bank.vectors.data.mul_(2)
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]).step()
    with ComposedRows() as composed:
        loss.backward()
    assert composed.rows == adapter.num_subvectors


def test_a_step_within_a_backward_that_recomputes_is_refused():
    net, expected = injected(True), injected(None)
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in net.vblora.parameters()}
    for parameter, optimizer in optimizers.items():
        parameter.register_post_accumulate_grad_hook(lambda _, step=optimizer.step: step())
    with pytest.raises(RuntimeError, match="in the middle of a backward"):
        step(net)
    net = injected(False)  # each parameter's gradient is complete before its hook runs
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in net.vblora.parameters()}
    for parameter, optimizer in optimizers.items():
        parameter.register_post_accumulate_grad_hook(lambda _, step=optimizer.step: step())
    step(net)
    step(expected)
    torch.optim.SGD(expected.vblora.parameters(), lr=0.1).step()
    for ours, theirs in zip(net.vblora.parameters(), expected.vblora.parameters(), strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("which", ["logits", "bank"])
@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_still_run(register, which):
    net, expected = injected(True), injected(None)
    step(net), step(expected)
    net.zero_grad()
    adapter, seen = net.vblora.default, []
    parameter = adapter.logits if which == "logits" else adapter.bank.vectors

    def look(tensor):
        seen.append((tensor if register == "register_hook" else tensor.grad).clone())

    getattr(parameter, register)(look)
    step(net)
    assert len(seen) == len(net.blocks) or (which == "bank" and register == "register_hook")
    agree(net, expected)
    total = sum(seen) if register == "register_hook" else seen[-1]
    assert relative_error(total, parameter.grad) < 1e-6


@pytest.mark.parametrize("frozen", ["logits", "bank"])
def test_a_parameter_that_does_not_train(frozen):
    nets = [injected(reentrant) for reentrant in (True, None)]
    for net in nets:
        adapter = net.vblora.default
        (adapter.logits if frozen == "logits" else adapter.bank.vectors).requires_grad_(False)
        for _ in range(2):
            net.zero_grad()
            step(net)
    trained = [next(p for p in net.vblora.parameters() if p.requires_grad).grad for net in nets]
    assert relative_error(*trained) < 1e-6
    assert sum(grad is not None for grad in gradients(nets[0])) == 1


def test_a_copy_does_not_share_what_a_forward_composed():
    net = injected(True)
    step(net), step(net)
    twin = copy.deepcopy(net)
    twin.zero_grad()
    with torch.no_grad():
        twin.vblora.default.bank.vectors.mul_(2)
    step(twin)
    expected = injected(None)
    with torch.no_grad():
        expected.vblora.default.bank.vectors.mul_(2)
    step(expected)
    agree(twin, expected, tolerance=1e-5)


def test_parameters_that_change_within_a_recomputation_are_noticed():
    net = injected(True)
    step(net)
    adapter = net.vblora.default

    def write(*_):
        if torch.is_grad_enabled():
            with torch.no_grad():
                adapter.bank.vectors.add_(0)

    net.blocks[2].register_forward_hook(write)
    with pytest.raises(RuntimeError, match="modified between a layer's recomputation and its backward"):
        step(net)
