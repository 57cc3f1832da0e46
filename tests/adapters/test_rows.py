"""A step writes the gradient of all logits once, however many layers are recomputed, and every hook on it still runs."""

import pytest
import torch
from torch import nn

import vblora
from tests.small_models import Made, Net, relative_error
from vblora.adapters.rows import rows_of

SIZES = {"r": 2, "vector_length": 8, "target_modules": ["up", "down"], "init_vector_bank_bound": 1.0}
CONFIGS = {
    "candidates": vblora.VBLoRAConfig(num_vectors=300, num_candidates=100, **SIZES),
    "dense": vblora.VBLoRAConfig(num_vectors=300, num_candidates=None, **SIZES),
    "lora": vblora.LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["up", "down"]),
}
pytestmark = pytest.mark.usefixtures("device", "one_thread")


def injected(name: str = "candidates", reentrant: bool | None = True) -> Net:
    torch.manual_seed(0)
    return vblora.inject(Net(blocks=6, reentrant=reentrant), CONFIGS[name])


def trained(net: Net) -> nn.Parameter:
    """The parameter with rows, or a part, for each layer."""
    adapter = net.vblora.default
    return adapter.factors if isinstance(adapter, vblora.adapters.LoRAAdapter) else adapter.logits


def step(net: Net) -> None:
    x = torch.linspace(-1, 1, 5 * 16).view(5, 16)
    net(x.requires_grad_()).square().sum().backward()


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_makes_at_most_two_tensors_of_all_logits(name, reentrant):
    net = injected(name, reentrant)
    for _ in range(3):  # all but the first add to a gradient
        with Made() as made:
            step(net)
        assert made.shapes.count(tuple(trained(net).shape)) <= 2
    plain = injected(name, None)
    for _ in range(3):
        step(plain)
    for ours, expected in zip(net.vblora.parameters(), plain.vblora.parameters(), strict=True):
        assert relative_error(ours.grad, expected.grad) < 1e-6
    assert torch.equal(trained(net).grad, trained(plain).grad)  # only its own layer contributes to a row's gradient


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_are_called_with_each_layers_gradient(register):
    net, expected = injected(), injected(reentrant=None)
    step(expected)
    seen = []

    def look(tensor):
        seen.append((tensor if register == "register_hook" else tensor.grad).clone())

    getattr(trained(net), register)(look)
    step(net)
    assert len(seen) == len(net.blocks)
    last = sum(seen) if register == "register_hook" else seen[-1]
    torch.testing.assert_close(last, trained(expected).grad)


class Recomputed(torch.autograd.Function):
    """A checkpoint written by hand, which computes gradients with ``run``."""

    @staticmethod
    def forward(ctx, x, block, run):
        ctx.save_for_backward(x)
        ctx.block, ctx.run = block, run
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        return ctx.run(x, y, grad), None, None


def gradient_of_a_block(run) -> tuple[Net, torch.Tensor, torch.Tensor]:
    """The gradient of a model that starts with ones, after ``run`` recomputes one block; and the correct gradient."""
    net, returned = injected(reentrant=None), []
    trained(net).grad = torch.ones_like(trained(net))
    x = torch.linspace(-1, 1, 5 * 16).view(5, 16).requires_grad_()

    def run_for_x(recomputed, y, grad):
        of_x, of_rows = run(recomputed, y, grad, trained(net))
        returned.append(of_rows)
        return of_x

    Recomputed.apply(x, net.blocks[1], run_for_x).square().sum().backward()
    of_x, expected = torch.autograd.grad(net.blocks[1](x).square().sum(), [x, trained(net)])
    torch.testing.assert_close(x.grad, of_x)
    return trained(net).grad, returned[0], expected


def test_who_asks_for_the_gradient_is_returned_it():
    grad, returned, expected = gradient_of_a_block(lambda x, y, grad, rows: torch.autograd.grad(y, [x, rows], grad))
    torch.testing.assert_close(returned, expected)
    assert (grad == 1).all()


def test_a_backward_to_the_inputs_alone_leaves_the_gradient_as_it_is():
    def run(x, y, grad, _):
        torch.autograd.backward(y, grad, inputs=[x])
        return x.grad, None

    grad, *_ = gradient_of_a_block(run)
    assert (grad == 1).all()


@pytest.mark.parametrize("named", [True, False])
def test_a_gradient_is_added_to_what_is_there(named):
    def run(x, y, grad, rows):
        torch.autograd.backward(y, grad, inputs=[x, rows] if named else None)
        return x.grad, None

    grad, _, expected = gradient_of_a_block(run)
    torch.testing.assert_close(grad, 1 + expected)


def in_a_backward(tensor: torch.Tensor, **options) -> None:
    """Rows 2 to 4 of ``tensor`` get a gradient of ones from a backward inside another backward."""

    class Outer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                rows = rows_of(tensor, 2, 3)
            torch.autograd.backward(rows, torch.ones_like(rows), **options)
            return grad

    Outer.apply(torch.ones(1, requires_grad=True)).backward()


ROWS = [0.0, 0.0, 1.0, 1.0, 1.0, 0.0]


def test_the_gradient_has_the_dtype_that_it_was_told():
    parameter = nn.Parameter(torch.ones(6, dtype=torch.bfloat16))
    parameter.grad_dtype = torch.float32
    in_a_backward(parameter)
    assert parameter.grad.dtype == torch.float32 and parameter.grad.tolist() == ROWS


def test_a_tensor_that_was_computed():
    """Like the tensor that FSDP2 gathers shards into."""
    shard = nn.Parameter(torch.ones(6))
    whole = 2 * shard
    in_a_backward(whole)
    assert shard.grad.tolist() == [2 * one for one in ROWS] and whole.grad_fn is not None


def test_a_gradient_with_a_history_is_not_changed_in_place():
    parameter = nn.Parameter(torch.ones(6))
    before = parameter.grad = torch.zeros(6)
    with pytest.warns(UserWarning, match="create_graph"):
        in_a_backward(parameter, create_graph=True)
    assert parameter.grad.tolist() == ROWS and not before.any()


def test_a_sparse_gradient_is_added_to():
    parameter = nn.Parameter(torch.ones(6))
    parameter.grad = torch.ones(6).to_sparse()
    in_a_backward(parameter)
    assert parameter.grad.to_dense().tolist() == [1 + one for one in ROWS]


def test_outside_of_a_backward_it_is_a_view():
    net = injected()
    rows = rows_of(trained(net), 1, 2)
    assert rows._is_view() and rows.grad_fn.name() == "SliceBackward0"
