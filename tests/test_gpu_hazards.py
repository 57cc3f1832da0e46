"""What a GPU can get wrong beyond a kernel's results: graphs and streams, on a GPU alone; checkpointing, memory at odd addresses
and no rows, on a CPU too. `make gpu-check` runs this file on a GPU."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vblora
from tests.small_models import Net, relative_error
from vblora.adapters import VBLoRAAdapter

HAS_GPU = vblora.build_info()["cuda"] != "none" and torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")
ON_BOTH = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])

CONFIG = vblora.VBLoRAConfig(
    r=4,
    num_vectors=64,
    vector_length=16,
    num_candidates=32,
    target_modules=["up", "down"],
    init_vector_bank_bound=0.5,
    init_logits_std=1.0,
)
WIDTH = 64
LONG = 50_000_000  # cycles that a stream sleeps: some 25 ms, in which the host can issue everything that comes after


def make(device: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return vblora.inject(Net(WIDTH, blocks=4, **options).to(device), CONFIG)


def adapter_of(model: nn.Module) -> VBLoRAAdapter:
    return next(module for module in model.modules() if isinstance(module, VBLoRAAdapter))


def some_input(device: str, seed: int = 1) -> Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(seed)).to(device)


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    """What a copy of the model makes of x: it has nothing that was kept."""
    with torch.no_grad():
        return copy.deepcopy(model)(x)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    groups = vblora.parameter_groups(model, lr_bank=1e-3, lr_logits=1e-3)
    return torch.optim.AdamW(groups, capturable=next(model.parameters()).is_cuda)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # last: what a capture frees is then its own
    return loss.detach()


WARM_UP = 3


def capture(work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of `work`, yet to be replayed, and its result. `work` has run WARM_UP times before, as PyTorch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"relative error {error:.1e}"


# Streams


@needs_gpu
def test_operators_run_on_the_current_stream():
    bank = torch.randn(64, 16, device="cuda")
    first, second = torch.randn(2, 300, 64, device="cuda").unbind()
    logits = first.clone()
    expected = torch.ops.vblora.admixture(second, bank, None, 2)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(LONG)
        logits.copy_(second)
        results = torch.ops.vblora.admixture(logits, bank, None, 2)
    torch.cuda.synchronize()
    for result, want in zip(results, expected, strict=True):
        assert torch.equal(result, want)


@needs_gpu
def test_factors_that_another_stream_composes_are_waited_for():
    model, x = make("cuda").eval(), some_input("cuda")
    expected = evaluated(model, x)
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.no_grad():
        with torch.cuda.stream(one):
            torch.cuda._sleep(LONG)
            composing = model(x)
        with torch.cuda.stream(other):
            using = model(x)
    torch.cuda.synchronize()
    assert_near(composing, expected)
    assert_near(using, expected)


@needs_gpu
def test_factors_that_another_stream_uses_keep_their_memory():
    model, x = make("cuda").eval(), some_input("cuda")
    expected = evaluated(model, x)
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.no_grad():
        with torch.cuda.stream(one):
            model(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(other):
            torch.cuda._sleep(LONG)
            using = model(x)
        model.train().eval()  # the factors are let go, while `other` has yet to read them
        with torch.cuda.stream(one):
            size = adapter_of(model).num_subvectors, CONFIG.vector_length
            overwriting = [torch.full(size, float("nan"), device="cuda") for _ in range(100)]
    torch.cuda.synchronize()
    assert_near(using, expected)
    del overwriting


# Graphs. After streams: once an optimizer step was captured, this process may keep no factors anymore.


@needs_gpu
def test_an_evaluation_between_capture_and_first_replay():
    model, x = make("cuda").eval(), some_input("cuda")
    expected = evaluated(model, x)

    def work() -> Tensor:
        model.train().eval()  # so that factors are composed within the capture
        return model(x)

    with torch.no_grad():
        graph, captured = capture(work)
        assert_near(model(x), expected)
        graph.replay()
        assert_near(captured, expected)
        assert_near(model(x), expected)


@needs_gpu
def test_an_evaluation_after_a_replayed_optimizer_step():
    model, x = make("cuda"), some_input("cuda")
    optimizer = optimizer_of(model)
    graph, _ = capture(lambda: step(model, optimizer, x))
    with torch.no_grad():
        before = model(x)  # in training mode all the while: a switch would have it forget
        for _ in range(3):
            graph.replay()
            after = model(x)
            assert_near(after, evaluated(model, x))
            assert relative_error(after, before) > 1e-3
            before = after


@needs_gpu
def test_a_captured_training_step_is_an_eager_one():
    model = make("cuda")
    eager = copy.deepcopy(model)
    optimizer, eager_optimizer = optimizer_of(model), optimizer_of(eager)
    x = some_input("cuda")
    graph, loss = capture(lambda: step(model, optimizer, x))
    for _ in range(WARM_UP):
        step(eager, eager_optimizer, x)
    for seed in range(5):
        x.copy_(some_input("cuda", seed))
        graph.replay()
        assert_near(loss, step(eager, eager_optimizer, x), 1e-3)
    for parameter, expected in zip(adapter_of(model).parameters(), adapter_of(eager).parameters(), strict=True):
        assert_near(parameter, expected, 1e-3)


# Checkpointing, memory, sizes


@ON_BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients(device, reentrant):
    x = some_input(device).requires_grad_()
    found = []
    for kind in (None, reentrant):
        model = make(device, reentrant=kind)
        model(x).square().mean().backward()
        found.append([parameter.grad for parameter in adapter_of(model).parameters()])
    for grad, expected in zip(*reversed(found), strict=True):
        assert expected.norm() > 0
        assert_near(grad, expected)


@ON_BOTH
def test_parameters_at_odd_addresses(device):
    x = some_input(device)
    found = []
    for odd in (False, True):
        model = make(device)
        adapter = adapter_of(model)
        if odd:
            for parameter in adapter.parameters():
                parameter.data = one_element_off(parameter.data)
            adapter.candidates = one_element_off(adapter.candidates)
        y = model(x)
        y.square().mean().backward()
        found.append([y, *(parameter.grad for parameter in adapter.parameters())])
    for result, expected in zip(*reversed(found), strict=True):
        assert_near(result, expected)


def one_element_off(tensor: Tensor) -> Tensor:
    """The same values, where no read of more than one element is aligned."""
    memory = tensor.new_empty(tensor.numel() + 1)
    memory[1:] = tensor.flatten()
    return memory[1:].view(tensor.shape)


@ON_BOTH
@pytest.mark.parametrize("dense", [False, True])
def test_no_rows(device, dense):
    logits = torch.empty(0, 9, device=device, requires_grad=True)
    bank = torch.randn(9, 8, device=device, requires_grad=True)
    candidates = None if dense else torch.empty(0, 9, dtype=torch.int16, device=device)
    subvectors, indices, weights = torch.ops.vblora.admixture(logits, bank, candidates, 2)
    assert (subvectors.shape, indices.shape, weights.shape) == ((0, 8), (0, 2), (0, 2))
    subvectors.sum().backward()
    assert logits.grad.shape == (0, 9)
    assert torch.equal(bank.grad, torch.zeros_like(bank))
    assert torch.ops.vblora.compose(bank.detach(), indices, weights.detach()).shape == (0, 8)
    torch.ops.vblora.draw_logits_(logits.detach(), candidates, 9, 1, 0.1)
    # Nothing was launched that failed, which the next call would report.
    assert torch.ops.vblora.admixture(bank.detach(), bank.detach()[:8], None, 2)[0].shape == (9, 8)
