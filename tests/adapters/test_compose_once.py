"""When factors are composed: each rule in the docstring of ``vblora.adapters.base.Adapter``. The tests count composed rows, and
compare gradients with those of layers that compose their own rows."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

import vblora
from tests.small_models import Block, ComposedRows, Net, llama, relative_error
from vblora.adapters.base import SAVED_TENSORS_HOOKS, keeping_factors

pytestmark = pytest.mark.usefixtures("device")
CONFIG = vblora.VBLoRAConfig(
    r=2, num_vectors=16, vector_length=8, target_modules=["up", "down"], init_vector_bank_bound=1.0
)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return vblora.inject(Net(), CONFIG)


@pytest.fixture
def x(device) -> torch.Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(1), device="cpu").to(device)


def gradients(net: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    grads = net.vblora.default.logits.grad, net.vblora.default.bank.vectors.grad
    net.zero_grad()
    return grads


def per_layer_gradients(net: Net, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same model without an outermost forward: every layer composes its own rows, as PEFT's layers do."""
    with ComposedRows() as composed:
        for x in inputs:
            Net.forward(net, x).square().sum().backward()
    assert composed.calls == len(inputs) * len(net.vblora.default.targets)
    return gradients(net)


def assert_same(actual, expected, tolerance=1e-6):
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) <= tolerance


def test_training_composes_once_a_forward(net, x):
    expected = per_layer_gradients(net, x)
    with ComposedRows() as composed:
        net(x).square().sum().backward()
    assert (composed.calls, composed.rows) == (1, net.vblora.default.num_subvectors)
    assert_same(gradients(net), expected)


def test_gradient_accumulation(net, x):
    inputs = [x, 2 * x, x - 1]
    expected = per_layer_gradients(net, *inputs)
    with ComposedRows() as composed:
        for part in inputs:
            net(part).square().sum().backward()
    assert composed.rows == 3 * net.vblora.default.num_subvectors
    assert_same(gradients(net), expected)


def test_two_forwards_then_two_backwards(net, x):
    inputs = [x, 2 * x]
    expected = per_layer_gradients(net, *inputs)
    losses = [net(part).square().sum() for part in inputs]
    for loss in losses:
        loss.backward()
    assert_same(gradients(net), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_composes_at_most_twice(net, x, reentrant):
    x.requires_grad_()  # re-entrant checkpointing needs it
    expected = per_layer_gradients(net, x)
    net.reentrant = reentrant
    with ComposedRows() as composed:
        net(x).square().sum().backward()
    assert net.vblora.default.num_subvectors < composed.rows <= 2 * net.vblora.default.num_subvectors
    assert_same(gradients(net), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_checkpointed_forwards_then_two_backwards(net, x, reentrant):
    inputs = [x.requires_grad_(), (2 * x).detach().requires_grad_()]
    expected = per_layer_gradients(net, *inputs)
    net.reentrant = reentrant
    losses = [net(part).square().sum() for part in inputs]
    for loss in reversed(losses):
        loss.backward()
    assert_same(gradients(net), expected)


def test_offloading_hooks_do_not_see_the_composition(net, x):
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x)
    assert packed  # tensors that the layers saved
    assert net.vblora.default.logits.shape not in packed
    assert net.vblora.default.bank.vectors.shape not in packed
    assert (net.vblora.default.num_subvectors, net.vblora.default.topk) not in packed


def test_an_optimizer_step_between_forward_and_backward_is_refused(net, x):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    early, late = net(x).square().sum(), net(x).square().sum()
    early.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_a_forward_without_backward_is_freed(net, x):
    adapter = net.vblora.default
    # As on other devices. Unlike the graph of the CPU's fused step, its graph holds its own outputs.
    operator = torch.ops.vblora.admixture
    with torch.autograd.graph.saved_tensors_hooks(*SAVED_TENSORS_HOOKS):
        *_, weights = operator(adapter.logits, adapter.bank.vectors, adapter.candidates, adapter.topk)
    freed = weakref.ref(weights)
    del weights, _
    assert freed() is None


def test_a_submodule_called_alone_composes_its_own_rows(net, x):
    own = 2 * CONFIG.r * (16 + 32) // CONFIG.vector_length
    with ComposedRows() as composed:
        net.blocks[3](x)
    assert (composed.calls, composed.rows) == (2, own)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_composes_once_a_forward(net, x, context):
    own = 2 * CONFIG.r * (16 + 32) // CONFIG.vector_length
    with context(), ComposedRows() as composed:
        first, second = net(x), net(x)
        assert composed.calls == 2
        net.blocks[3](x)
        assert (composed.calls, composed.rows) == (4, 2 * own * len(net.blocks) + own)
    assert torch.equal(first, second)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_call_that_keeps_factors_composes_once(net, x, context):
    with context(), keeping_factors(), ComposedRows() as composed:
        first, second = net(x), net(x)
        for block in net.blocks:
            block(x)
        assert composed.calls == 1
        with keeping_factors():
            net(x)
        assert composed.calls == 2
    assert torch.equal(first, second)


def test_factors_kept_in_inference_mode_serve_elsewhere(net, x):
    """A cached inference tensor could not be used where a gradient is recorded."""
    with keeping_factors():
        with torch.inference_mode():
            expected = net(x)
        net.vblora.default.requires_grad_(False)
        x.requires_grad_()
        with ComposedRows() as composed:
            y = net(x)
    assert composed.calls == 0
    y.sum().backward()
    assert torch.equal(y, expected)


def test_inference_parameters_are_never_kept(x):
    with torch.inference_mode(), keeping_factors():
        net = vblora.inject(Net(blocks=2), CONFIG)
        with ComposedRows() as composed:
            net(x), net(x)
    assert composed.calls == 2


def test_gradients_that_the_models_code_turns_on(net, x):
    expected = per_layer_gradients(net, x)
    net.forward = torch.enable_grad()(net.forward)
    with torch.no_grad():
        y = net(x)
    y.square().sum().backward()
    assert_same(gradients(net), expected)


def test_training_after_evaluation_and_back(net, x):
    with torch.no_grad():
        net(x)
    expected = per_layer_gradients(net, x)
    net(x).square().sum().backward()
    assert_same(gradients(net), expected)


def llama_with_adapter() -> nn.Module:
    torch.manual_seed(0)
    config = vblora.VBLoRAConfig(r=2, num_vectors=16, vector_length=8, init_vector_bank_bound=1.0)
    return vblora.inject(llama(), config).eval()


def test_generate_composes_once():
    model = llama_with_adapter()
    prompt = torch.tensor([[5, 6, 7]])
    with ComposedRows() as composed:
        tokens = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert tokens.shape[1] > prompt.shape[1] + 1
    assert composed.calls == 1


class WritesThroughData(torch.optim.Optimizer):
    """Older optimizers and FSDP2's all-gather write this way: the version counter does not move."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(1.0)


def change_in_place(net):
    with torch.no_grad():
        net.vblora.default.bank.vectors.mul_(2)


def change_by_optimizer(net):
    net.vblora.default.bank.vectors.grad = torch.ones_like(net.vblora.default.bank.vectors)
    torch.optim.SGD(net.vblora.default.parameters(), lr=1.0).step()


def change_through_data(net):
    version = net.vblora.default.bank.vectors._version
    WritesThroughData([net.vblora.default.bank.vectors]).step()
    assert net.vblora.default.bank.vectors._version == version


def change_data(net):
    net.vblora.default.bank.vectors.data = 2 * net.vblora.default.bank.vectors.data


def change_in_place_through_data(net):
    """So do torch_ema, and all collectives of torch.distributed: a broadcast of a parameter moves no version counter."""
    net.vblora.default.bank.vectors.data.mul_(2)


def change_by_state_dict(net):
    state = copy.deepcopy(net.state_dict())
    state["vblora.default.bank.vectors"] *= 2
    net.load_state_dict(state)


def change_parameter(net):
    net.vblora.default.bank.vectors = nn.Parameter(2 * net.vblora.default.bank.vectors.detach())


def change_data_twice(net):
    """The second one may get the memory that the first one freed."""
    for _ in range(2):
        net.vblora.default.bank.vectors.data = 2 * net.vblora.default.bank.vectors.data


def change_dtype_and_back(net):
    net.half().float()


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_by_optimizer,
        change_through_data,
        change_data,
        change_data_twice,
        change_in_place_through_data,
        change_by_state_dict,
        change_parameter,
        change_dtype_and_back,
    ],
)
def test_a_change_between_evaluations_is_seen(net, x, change):
    with torch.no_grad():
        before = net(x), net.blocks[0](x)
    change(net)
    fresh = copy.deepcopy(net)
    with torch.no_grad():
        after = net(x), net.blocks[0](x)
        for one, other, expected in zip(before, after, (fresh(x), fresh.blocks[0](x)), strict=True):
            assert not torch.equal(one, other)
            assert torch.equal(other, expected)
    vblora.merge(net)
    assert torch.equal(net.blocks[0].up.weight, vblora.merge(fresh).blocks[0].up.weight)


@pytest.mark.parametrize(
    "change", [change_in_place, change_by_optimizer, change_data, change_by_state_dict, change_parameter]
)
def test_a_change_within_a_call_that_keeps_factors_is_seen(net, x, change):
    with torch.no_grad(), keeping_factors():
        before = net(x)
        change(net)
        after = net(x)
    with torch.no_grad():
        assert not torch.equal(before, after)
        assert torch.equal(after, copy.deepcopy(net)(x))


def test_a_change_between_calls_of_generate_is_seen():
    model = llama_with_adapter()
    prompt, options = (
        torch.tensor([[5, 6, 7]]),
        {"do_sample": False, "output_logits": True, "return_dict_in_generate": True},
    )
    before = model.generate(prompt, max_new_tokens=2, **options).logits[0]
    model.vblora.default.bank.vectors.data.mul_(2)
    after = model.generate(prompt, max_new_tokens=2, **options).logits[0]
    assert relative_error(after, model(prompt).logits[:, -1]) < 1e-6 < relative_error(before, after)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_is_tied_to_its_own_adapter(net, x, clone):
    with torch.no_grad():
        before = net(x)
    twin = clone(net)
    assert twin.blocks[0].up.updates["default"].slot.adapter is twin.vblora.default is not net.vblora.default
    with torch.no_grad():
        twin.vblora.default.bank.vectors.mul_(2)
        assert torch.equal(net(x), before)
        assert not torch.equal(twin(x), before)
    with ComposedRows() as composed:
        twin(x).sum().backward()
    assert composed.calls == 1
    assert twin.vblora.default.logits.grad is not None and net.vblora.default.logits.grad is None


def test_moving_and_casting_keep_the_tie(net, x):
    x = x.bfloat16()
    y = net.bfloat16()(x)
    assert y.dtype == torch.bfloat16
    expected = copy.deepcopy(net).double()(x.double())
    assert expected.dtype == torch.float64
    assert relative_error(y.double(), expected) < 0.1
    y.sum().backward()
    assert net.vblora.default.logits.grad.dtype == torch.bfloat16
    meta = copy.deepcopy(net).to("meta")
    assert meta(x.to("meta")).device.type == "meta"


def test_factors_follow_autocast(x, device):
    net = vblora.inject(Net(blocks=2), CONFIG)
    seen = []
    hook = net.blocks[0].up.register_forward_hook(
        lambda module, *_: seen.append(module.updates["default"].slot.forward_factors.factors.A.dtype)
    )
    with torch.autocast(device.type, torch.bfloat16):
        net(x).float().square().sum().backward()
    assert seen == [torch.bfloat16]
    hook.remove()
    assert_same(gradients(net), per_layer_gradients(net, x), tolerance=0.05)


def test_a_forward_that_fails_hands_nothing_on(net, x):
    with pytest.raises(RuntimeError, match="mat1"):
        net(x[:, :3])
    assert all(slot.forward_factors is None for slot in net.vblora.default.slots)
    expected = per_layer_gradients(net, x)
    net(x).square().sum().backward()
    assert_same(gradients(net), expected)


def test_parameters_that_are_swapped_for_a_call(x):
    """Each time with new tensors, which may get the identity and memory of earlier ones."""
    net = vblora.inject(Net(blocks=1), CONFIG)
    with torch.no_grad():
        for _ in range(25):
            swapped = {"vblora.default.logits": net.vblora.default.logits + torch.randn_like(net.vblora.default.logits)}
            y = torch.func.functional_call(net, swapped, x)
            expected = copy.deepcopy(net)
            expected.vblora.default.logits.copy_(swapped["vblora.default.logits"])
            assert torch.equal(y, expected(x))


def interrupt(*_):
    raise KeyboardInterrupt


def test_an_interrupted_forward_leaves_nothing_that_is_used(net, x):
    hook = net.blocks[-1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        net(x)
    hook.remove()
    WritesThroughData([net.vblora.default.bank.vectors]).step()
    fresh = copy.deepcopy(net)
    assert torch.equal(net.blocks[0](x), fresh.blocks[0](x))
    assert torch.equal(net.blocks[0].up.delta_weight(["default"]), fresh.blocks[0].up.delta_weight(["default"]))
    assert torch.equal(net(x), fresh(x))


def test_threads_do_not_share_a_forward(net, x):
    """One thread evaluates the model during another's training forward, which must keep its graph."""
    expected = per_layer_gradients(net, x)

    def evaluate(*_):
        with torch.no_grad():
            net(x)

    def in_another_thread(*_):
        hook.remove()
        thread = threading.Thread(target=evaluate)
        thread.start()
        thread.join()

    hook = net.blocks[5].register_forward_pre_hook(in_another_thread)
    net(x).square().sum().backward()
    assert_same(gradients(net), expected)


def test_nothing_of_a_forward_outlives_it(net, x):
    seen = []
    net.blocks[0].up.register_forward_hook(
        lambda module, *_: seen.append(weakref.ref(module.updates["default"].slot.forward_factors.factors.A))
    )
    gc.disable()
    try:
        net(x)
        assert seen[0]() is None
        net(x).sum().backward()
        assert seen[1]() is None
    finally:
        gc.enable()


def forget_compiled() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("training", [True, False])
def test_compiling_the_whole_model(x, training):
    """In one graph, without recompiling between steps."""
    forget_compiled()
    net = vblora.inject(Net(blocks=3), CONFIG)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    expected = per_layer_gradients(net, x)
    graphs = []
    for _ in range(3):
        with torch.set_grad_enabled(training):
            y = compiled(x)
            assert relative_error(y, net(x)) < 1e-6
        if training:
            y.square().sum().backward()
            assert_same(gradients(net), expected)
        else:
            net.vblora.default.logits.data.add_(torch.randn_like(net.vblora.default.logits))
        graphs.append(compiled_graphs())
    assert graphs[0] == graphs[2]
    assert all(slot.forward_factors is None for slot in net.vblora.default.slots)


def test_compiling_with_inductor(x):
    forget_compiled()
    net = vblora.inject(Net(blocks=2), CONFIG)
    expected = per_layer_gradients(net, x)
    torch.compile(net, fullgraph=True)(x).square().sum().backward()
    assert_same(gradients(net), expected, tolerance=1e-5)


def test_compiling_block_by_block_shares_one_graph(x):
    forget_compiled()
    net = vblora.inject(Net(blocks=10), CONFIG)  # more than torch's limit of recompilations
    x.requires_grad_()  # like the other blocks' inputs
    expected = per_layer_gradients(net, x)
    for index, block in enumerate(net.blocks):
        net.blocks[index] = torch.compile(block, fullgraph=True, backend="aot_eager")
    compose, indices = net.vblora.default.compose, []
    net.vblora.default.compose = lambda dtype, index=None: indices.append(index) or compose(dtype, index)
    net(x).square().sum().backward()
    assert indices == [None]
    assert_same(gradients(net), expected, 3e-6)  # a graph uses torch's products, eager layers our operators
    assert compiled_graphs() == 1


def test_compiling_a_block_called_alone(net, x):
    forget_compiled()
    expected = net.blocks[0](x)
    assert relative_error(torch.compile(net.blocks[0], fullgraph=True, backend="aot_eager")(x), expected) < 1e-6


def test_exporting(net, x):
    exported = torch.export.export(net, (x,))
    calls = [node for node in exported.graph.nodes if node.target is torch.ops.vblora.admixture.default]
    assert len(calls) == 1
    assert relative_error(exported.module()(x), net(x)) < 1e-6
    assert all(slot.forward_factors is None for slot in net.vblora.default.slots)


def test_a_repeated_block_adds_up(x):
    """A module used twice in a model has its rows once, with gradients from both uses."""
    torch.manual_seed(0)
    block = Block(16)
    net = nn.Sequential(block, nn.Tanh(), block)
    net = vblora.inject(net, CONFIG)
    assert len(net.vblora.default.targets) == 2
    net(x).square().sum().backward()
    whole = gradients(net)
    nn.Sequential.forward(net, x).square().sum().backward()
    assert_same(whole, gradients(net))
