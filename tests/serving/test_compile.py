"""Under torch.compile, other adapters, other slots and other mixes of a batch run the graphs that are there."""

import copy

import pytest
import torch
import torch._dynamo.testing

import vblora
from tests.serving.test_store import store_of
from tests.small_models import Net, relative_error

pytestmark = pytest.mark.usefixtures("fresh_graphs")
SWAPS = 20


@pytest.fixture
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole model"])
@torch.no_grad()
def test_swaps_and_mixes_compile_nothing_anew(world, whole):
    store, model = store_of(world, slots=4)
    counter = torch._dynamo.testing.CompileCounter()
    ids = torch.randint(3, 50, (4, 5), generator=torch.Generator().manual_seed(0))
    good = [None, *store.names()]
    run = torch.compile(model, backend=counter) if whole else model
    if not whole:
        for block in model.model.layers:
            block.compile(backend=counter, fullgraph=True)

    def check(number: int) -> None:
        names = [good[(number * step + step) % len(good)] for step in range(4)]
        found, expected = run(input_ids=ids, adapter_names=names).logits, world.logits(names, ids)
        for row, name in enumerate(names):
            assert relative_error(found[row], expected[row]) < (2e-6 if name else 1e-12), name

    check(0)
    check(1)
    compiled = counter.frame_count
    assert compiled > 0
    for number in range(2, 2 + SWAPS):
        check(number)
    assert counter.frame_count == compiled
    assert store.stats()["evictions_total"]["warm"] > SWAPS
    assert relative_error(run(input_ids=ids).logits, world.base(input_ids=ids).logits) < 1e-6


@pytest.mark.slow
@torch.no_grad()
def test_inductor(world):
    _, model = store_of(world)
    model.compile()
    ids = torch.randint(3, 50, (4, 5))
    for names in (["user-0", None, "lora", "user-1"], ["user-2", "user-3", None, "user-1"]):
        found, expected = model(input_ids=ids, adapter_names=names).logits, world.logits(names, ids)
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


def test_an_injected_model_serves_and_trains_in_graphs():
    model = Net(blocks=2).double()
    for name in ("first", "second"):
        config = vblora.LoraConfig(target_modules=["up", "down"], init_lora_weights=False)
        vblora.inject(model, config, adapter_name=name)
    x = torch.randn(2, 16, dtype=torch.float64)
    eager = copy.deepcopy(model)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for names in (None, ["first", "second"], ["second", None], None):
        with torch.no_grad():
            assert relative_error(model(x, adapter_names=names), eager(x, adapter_names=names)) < 1e-12
    for each in (model, eager):
        each(x).square().sum().backward()
    gradients = [each.vblora["first"].factors.grad for each in (model, eager)]
    assert relative_error(*gradients) < 1e-12
    # A copy has layers of its own, and so have its graphs.
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.vblora["first"].factors.zero_()
        assert (
            relative_error(other(x, adapter_names=["first", "second"]), eager(x, adapter_names=["first", "second"]))
            < 1e-12
        )
