"""CUDA graphs and streams without a GPU: how adapters use the answers of a fake `vblora.streams`."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import vblora
from tests.small_models import ComposedRows, Net
from vblora import streams
from vblora.adapters import base

CONFIGS = {
    "vblora": vblora.VBLoRAConfig(
        r=2, num_vectors=16, vector_length=8, target_modules=["up", "down"], init_vector_bank_bound=1.0
    ),
    "lora": vblora.LoraConfig(r=2, init_lora_weights=False, target_modules=["up", "down"]),
    "vera": vblora.VeraConfig(r=4, init_weights=False, target_modules=["up", "down"]),
    "tied_lora": vblora.TiedLoraConfig(r=4, target_modules=["up", "down"]),
}
methods = pytest.mark.parametrize("name", CONFIGS)


class Stream:
    """A fake `torch.cuda.Stream` that logs the calls."""

    def __init__(self, name: str, log: list[tuple]) -> None:
        self.name = name
        self.log = log

    def record_event(self) -> str:
        self.log.append(("record", self.name))
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(("wait", self.name, event))


class GPU:
    """A fake GPU."""

    def __init__(self) -> None:
        self.log: list[tuple] = []
        self.capturing = False
        self.stream = self.new_stream("A")

    def new_stream(self, name: str) -> Stream:
        return Stream(name, self.log)


@pytest.fixture
def gpu(monkeypatch) -> Iterator[GPU]:
    """A fake GPU, within a call that keeps factors."""
    gpu = GPU()
    monkeypatch.setattr(streams, "capturing", lambda _device=None: gpu.capturing)
    monkeypatch.setattr(streams, "current", lambda _device: gpu.stream)
    monkeypatch.setattr(streams, "mark_used", lambda tensor, stream: gpu.log.append(("hold", stream.name, tensor)))
    monkeypatch.setattr(base, "_step_was_captured", False)
    with base.keeping_factors():
        yield gpu


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


def injected(name: str = "vblora") -> Net:
    torch.manual_seed(0)
    return vblora.inject(Net(blocks=3), CONFIGS[name])


def replay(net: nn.Module) -> None:
    """Replays a captured step: parameters change without any sign that Python sees."""
    for parameter in net.vblora.parameters():
        parameter.data.mul_(1.5)


def compositions(net: nn.Module) -> list[range | None]:
    """The targets that are composed from now on; None means all."""
    adapter, spans = net.vblora.default, []
    compose = adapter.compose
    adapter.compose = lambda dtype, span=None: spans.append(span) or compose(dtype, span)
    return spans


def assert_follows_its_parameters(net: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        for _ in range(2):
            before = net(x)
            replay(net)
            after = net(x)
            assert not torch.equal(after, before)
            assert torch.equal(after, copy.deepcopy(net)(x))


@methods
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_what_a_capture_composes_is_not_kept(gpu, x, name, context):
    """Before the first replay its memory holds no results."""
    net = injected(name)
    composed = compositions(net)
    with context():
        gpu.capturing = True
        net(x)
        gpu.capturing = False
        net(x)
    assert composed == [None, None]


@methods
def test_a_capture_composes_for_itself(gpu, x, name):
    """A graph that read cached factors would still read their memory after they were freed."""
    net = injected(name)
    with torch.no_grad():
        net(x), net(x)
        composed = compositions(net)
        gpu.capturing = True
        net(x), net(x)
    assert composed == [None, None]


@methods
def test_evaluation_between_replays_of_a_training_step(gpu, x, name):
    net = injected(name)
    optimizer = torch.optim.SGD(net.vblora.parameters(), lr=0.1)
    with torch.no_grad():
        net(x)
    gpu.capturing = True
    net(x).square().sum().backward()
    optimizer.step()
    gpu.capturing = False
    assert_follows_its_parameters(net, x)


def test_evaluation_between_replays_of_a_forward_and_backward_that_composed_layer_by_layer(gpu, x):
    net = injected()
    gpu.capturing = True
    net.blocks[0](x).sum().backward()
    gpu.capturing = False
    assert_follows_its_parameters(net, x)


def test_evaluation_between_replays_of_an_optimizer_step_alone(gpu, x):
    net = injected()
    optimizer = torch.optim.SGD(net.vblora.parameters(), lr=0.1)
    net(x).square().sum().backward()
    gpu.capturing = True
    optimizer.step()
    gpu.capturing = False
    assert_follows_its_parameters(net, x)


def test_layers_called_alone_after_a_capture_compose_their_own_rows(gpu, x):
    net = injected()
    gpu.capturing = True
    net(x)
    gpu.capturing = False
    composed = compositions(net)
    with torch.no_grad():
        for block in net.blocks:
            block(x)
    assert composed == [range(index, index + 1) for index in range(6)]


def test_a_copy_of_a_captured_adapter_keeps_factors(gpu, x):
    net = injected()
    gpu.capturing = True
    net(x)
    gpu.capturing = False
    twin = copy.deepcopy(net)
    with torch.no_grad(), ComposedRows() as composed:
        twin(x), twin(x)
    assert composed.calls == 1


@pytest.mark.parametrize("recording", [True, False])
def test_a_block_that_is_captured_within_a_forward(gpu, x, recording):
    """The forward's factors must not outlive it, and later forwards must not use those of the graph."""
    net = injected()

    def begin(*_):
        gpu.capturing = True

    def end(*_):
        gpu.capturing = False

    net.blocks[1].register_forward_pre_hook(begin)
    net.blocks[1].register_forward_hook(end)
    composed = compositions(net)
    with torch.set_grad_enabled(recording):
        net(x)
    assert composed == [None, range(2, 3), range(3, 4)]


def test_veras_cast_pair_belongs_to_a_capture_or_to_a_stream(gpu):
    adapter = injected("vera").vblora.default
    eager, _ = adapter.pair(torch.bfloat16)
    assert adapter.pair(torch.bfloat16)[0] is eager
    gpu.capturing = True
    captured, _ = adapter.pair(torch.bfloat16)
    gpu.capturing = False
    assert captured is not eager
    assert adapter.pair(torch.bfloat16)[0] is eager
    gpu.stream = gpu.new_stream("B")
    other, _ = adapter.pair(torch.bfloat16)
    assert other is not eager and adapter.pair(torch.bfloat16)[0] is other


@methods
def test_another_stream_waits_for_the_factors_and_holds_their_memory(gpu, x, name):
    net = injected(name)
    first, second = gpu.stream, gpu.new_stream("B")
    with torch.no_grad():
        expected = net(x)
        composed = compositions(net)
        assert gpu.log == [("record", "A")]
        gpu.stream = second
        used_after = []
        handle = net.embed.register_forward_pre_hook(lambda *_: used_after.append(len(gpu.log)))
        assert torch.equal(net(x), expected)
        handle.remove()
        assert gpu.log[1] == ("wait", "B", "event of A")
        assert used_after == [len(gpu.log)]  # all before the first layer
        held = {tensor.untyped_storage().data_ptr() for kind, on, tensor in gpu.log[2:] if (kind, on) == ("hold", "B")}
        assert len(gpu.log) == 2 + sum(kind == "hold" for kind, *_ in gpu.log)
        factors = net.vblora.default.factors_of(0, torch.float32), net.vblora.default.factors_of(5, torch.float32)
        assert {t.untyped_storage().data_ptr() for pair in factors for t in pair if t is not None} <= held
        events = len(gpu.log)
        for gpu.stream in (first, second, first):  # each stream is ready already
            net(x)
    assert len(gpu.log) == events
    assert composed == []


def test_a_layer_alone_on_another_stream_waits_too(gpu, x):
    net = injected()
    with torch.no_grad():
        net(x)
        gpu.stream = gpu.new_stream("B")
        net.blocks[0].up(x)
    assert ("wait", "B", "event of A") in gpu.log


@pytest.mark.parametrize("recording", [True, False])
def test_a_layer_on_another_stream_than_its_forward(gpu, x, recording):
    """With gradients it composes on its own stream; without, it waits for the cached factors."""
    net = injected()
    net.blocks[1].register_forward_pre_hook(lambda *_: setattr(gpu, "stream", gpu.new_stream("B")))
    composed = compositions(net)
    with torch.set_grad_enabled(recording):
        net(x)
    assert composed == [None, *(range(index, index + 1) for index in range(2, 6) if recording)]
    assert (("wait", "B", "event of A") in gpu.log) != recording


def test_without_a_gpu_there_is_nothing_to_ask():
    device = torch.device("cpu")
    assert not streams.capturing() and not streams.capturing(device) and streams.current(device) is None
    assert torch.cuda.is_initialized() or streams.current(torch.device("cuda")) is None  # for example of a fake tensor
