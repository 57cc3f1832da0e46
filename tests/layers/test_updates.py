"""In inference one operator adds an update to the layer's output in place, unless somebody else may have that output."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

import vblora
from tests.small_models import Net, relative_error
from vblora.layers import updates

TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the outputs that the operator changed."""
    shapes: list[tuple[int, ...]] = []
    operator = updates._add_updates

    def counted(y: Tensor, *rest: Tensor | None) -> None:
        shapes.append(tuple(y.shape))
        operator(y, *rest)

    monkeypatch.setattr(updates, "_add_updates", counted)
    return shapes


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


def adapted(dtype: torch.dtype = torch.float32, adapters: int = 1) -> nn.Module:
    model = One().to(dtype)
    for number in range(adapters):
        config = vblora.LoraConfig(r=3, target_modules=["up"], init_lora_weights=False)
        vblora.inject(model, config, adapter_name=str(number))
    vblora.set_adapter(model, [str(number) for number in range(adapters)])
    return model.eval()


def expected(model: nn.Module, x: Tensor) -> Tensor:
    layer = model.up
    weight = layer.base_layer.weight.double() + layer.delta_weight(layer.applied).double()
    return nn.functional.linear(x.double(), weight, layer.bias.double())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("adapters", [1, 2])
@torch.no_grad()
def test_one_call_for_each_adapter(dtype, adapters, calls):
    model = adapted(dtype, adapters)
    for shape in ((24,), (1, 24), (1, 1, 24), (2, 3, 24)):
        x = torch.randn(shape).to(dtype)
        y = model(x)
        assert y.dtype == dtype and relative_error(y.double(), expected(model, x)) < TOLERANCES[dtype]
        assert calls == [y.shape] * adapters
        calls.clear()
    x = torch.randn(4, 300, 24).to(dtype)  # matrix products are as fast
    assert relative_error(model(x).double(), expected(model, x)) < TOLERANCES[dtype]
    assert calls == []


@torch.no_grad()
def test_autocast(calls):
    model, x = adapted(), torch.randn(1, 1, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16 and relative_error(y.double(), expected(model, x)) < 2e-2
    assert len(calls) == 1


@torch.no_grad()
def test_gradients_dropout_and_scales_take_the_other_path(calls):
    model, x = adapted(), torch.randn(1, 1, 24)
    with torch.enable_grad():
        assert model(x).requires_grad
    vblora.inject(model, vblora.LoraConfig(r=2, target_modules=["up"], lora_dropout=0.5), adapter_name="dropping")
    vblora.inject(model, vblora.VeraConfig(r=2, target_modules=["up"]), adapter_name="vera")
    for name, training in (("dropping", True), ("vera", False)):
        vblora.set_adapter(model, name)
        model.train(training)(x)
        assert calls == []
    vblora.set_adapter(model, "0")
    model.train()(x)
    assert calls == []  # in float32, training uses torch's products
    with torch.autocast("cpu", torch.bfloat16):
        model(x)  # re-entrant checkpointing runs this, too, and then the fused layer with gradients
        assert calls == [(1, 1, 40)]
        calls.clear()
        vblora.set_adapter(model, ["0", "dropping"])  # of which the fused layer would add the first by other means
        model(x)
        assert calls == []


def hook_on_base(model: nn.Module, seen: list[Tensor]):
    return model.up.base_layer.register_forward_hook(lambda _module, _args, output: seen.append(output))


def hook_on_all(model: nn.Module, seen: list[Tensor]):
    base = model.up.base_layer
    return register_module_forward_hook(
        lambda module, _args, output: seen.append(output) if module is base else None  # type: ignore[func-returns-value]
    )


@pytest.mark.parametrize("install", [hook_on_base, hook_on_all])
@pytest.mark.parametrize("mixed", [False, True])
@torch.no_grad()
def test_an_output_that_a_hook_has_seen_is_not_changed(install, mixed):
    model, x, seen = adapted(), torch.randn(2, 1, 24), []
    names = {"adapter_names": ["0", None]} if mixed else {}
    y = model(x, **names)
    handle = install(model, seen)
    try:
        again = model(x, **names)
    finally:
        handle.remove()
    assert torch.equal(seen[0], model.up.base_layer(x))
    assert relative_error(again, y) < 1e-6 and not torch.equal(y, seen[0])


@pytest.mark.parametrize("mixed", [False, True])
@torch.no_grad()
def test_an_output_that_a_mode_has_seen_is_not_changed(mixed):
    kept: list[Tensor] = []

    class Keeps(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.addmm.default and not kept:
                kept.extend([result, result.clone()])
            return result

    model, x = adapted(), torch.randn(2, 24)
    names = {"adapter_names": ["0", None]} if mixed else {}
    y = model(x, **names)
    with Keeps():
        assert relative_error(model(x, **names), y) < 1e-6
    assert torch.equal(*kept)


@torch.no_grad()
def test_function_transforms_and_hooks_on_the_layer(calls):
    model, x = adapted(), torch.randn(5, 1, 24)
    y = model(x)
    calls.clear()
    assert relative_error(torch.vmap(model)(x), y) < 1e-6
    assert calls == []
    seen: list[Tensor] = []
    handle = model.up.register_forward_hook(lambda _module, _args, output: seen.append(output))
    assert relative_error(model(x), y) < 1e-6
    assert len(seen) == 1
    handle.remove()
    model(x)
    assert len(seen) == 1


@torch.no_grad()
def test_factors_of_rows_are_stacked_once_for_a_batch(calls, monkeypatch):
    """Each layer gets its rows' factors in one call, in which nothing is selected, whether or not all rows have an adapter."""
    model = Net(blocks=2).eval()
    for name in ("a", "b"):
        config = vblora.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
        vblora.inject(model, config, adapter_name=name)
    rows = model._vblora_adapted_model.rows(["a", None, "b", "a"])
    rows.outlasts_forwards = True
    model._vblora_adapted_model.let_rows_differ()
    asked: list[nn.Module] = []
    stacked = type(rows).stacked
    monkeypatch.setattr(type(rows), "stacked", lambda self, layer: asked.append(layer) or stacked(self, layer))
    with rows.running():
        for _ in range(3):
            model(torch.randn(4, 1, 16))
    assert len(asked) == len(set(asked)) == 4
    assert len(calls) == 12
