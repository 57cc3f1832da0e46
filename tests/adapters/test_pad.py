"""``pad=True``: widths that ``vector_length`` does not divide. The oracle mixes one sub-vector at a time, in plain PyTorch."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vblora
from tests.small_models import ComposedRows, Net, relative_error
from vblora.adapters import Target, VBLoRAAdapter
from vblora.adapters.base import keeping_factors

LENGTH = 256
SIZES = {"r": 3, "num_vectors": 12, "vector_length": LENGTH, "target_modules": ["0", "2", "4"], "pad": True}
ROWS = 3 * (3 + 1 + 1 + 1 + 1 + 2)  # ranks, and sub-vectors of 576, 192, 192, 50, 50 and 512


def uneven() -> nn.Sequential:
    """Widths that 256 does not divide, widths below 256, and 512, which it divides; one layer has both."""
    layers = nn.Linear(576, 192), nn.Tanh(), nn.Linear(192, 50), nn.Tanh(), nn.Linear(50, 512)
    return nn.Sequential(*layers)


def injected(dtype=torch.float64, **choice):
    torch.manual_seed(0)
    base = uneven().to(dtype)
    model = vblora.inject(copy.deepcopy(base), vblora.VBLoRAConfig(**SIZES | choice)).to(dtype)
    with torch.no_grad():
        for parameter in model.vblora.default.parameters():
            parameter.normal_()
    return base, model


def mixed(adapter: VBLoRAAdapter, row: int) -> Tensor:
    """Sub-vector ``row``, with all b elements."""
    columns = sorted(range(adapter.logits.shape[1]), key=lambda j: -adapter.logits[row, j].item())[: adapter.topk]
    weights = torch.softmax(torch.stack([adapter.logits[row, j] for j in columns]), 0)
    vectors = columns if adapter.candidates is None else [int(adapter.candidates[row, j]) for j in columns]
    return sum(weight * adapter.bank.vectors[vector] for weight, vector in zip(weights, vectors, strict=True))


def plain_weights(base: nn.Module, adapter: VBLoRAAdapter) -> dict[str, Tensor]:
    """The targets' weights plus the update, for ``torch.func.functional_call``."""
    row = 0
    weights = {}
    for target in adapter.targets:
        factors = []
        for width in (target.in_features, target.out_features):
            ranks = []
            for _ in range(adapter.r):
                elements = []
                while len(elements) < width:
                    elements += mixed(adapter, row)[: width - len(elements)].unbind()
                    row += 1
                ranks.append(torch.stack(elements))
            factors.append(torch.stack(ranks))
        A, B = factors
        layer = base.get_submodule(target.name)
        delta = A.T @ B if isinstance(layer, nn.Embedding) else (B.T @ A).view_as(layer.weight)
        weights[f"{target.name}.weight"] = layer.weight + adapter.scaling * delta
    assert row == len(adapter.logits)
    return weights


@pytest.mark.parametrize("choice", [{}, {"num_candidates": 5, "topk": 3}, {"scaling": 2.5, "r": 1}])
def test_is_the_formula(choice):
    base, model = injected(**choice)
    adapter, x = model.vblora.default, torch.randn(5, 576, dtype=torch.float64)
    assert adapter.num_subvectors == ROWS * choice.get("r", 3) // 3
    parameters = (adapter.logits, adapter.bank.vectors)
    expected = torch.func.functional_call(base, plain_weights(base, adapter), x)
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    for forward in (nn.Module.__call__, nn.Sequential.forward):  # all layers composed at once, or each on its own
        with ComposedRows() as composed:
            actual = forward(model, x)
        assert composed.calls == (1 if forward is nn.Module.__call__ else 3)
        assert relative_error(actual, expected) < 1e-12
        for ours, theirs in zip(torch.autograd.grad(actual.square().sum(), parameters), wanted, strict=True):
            assert relative_error(ours, theirs) < 1e-12


class Tokens(nn.Module):
    """An embedding, and a convolution with 2 groups and 7 * 3 inputs per output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(101, 14)
        self.convolve = nn.Conv1d(14, 6, 3, groups=2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.convolve(self.embed(ids).mT)


def test_a_vocabulary_and_a_convolution():
    torch.manual_seed(0)
    base = Tokens().double()
    config = vblora.VBLoRAConfig(r=2, num_vectors=12, vector_length=16, pad=True, target_modules=["embed", "convolve"])
    model = vblora.inject(copy.deepcopy(base), config).double()
    adapter, ids = model.vblora.default, torch.randint(0, 101, (4, 9))
    nn.init.normal_(adapter.bank.vectors)
    assert adapter.num_subvectors == 2 * (7 + 1 + 2 + 1)
    expected = torch.func.functional_call(base, plain_weights(base, adapter), ids)
    assert relative_error(model(ids), expected) < 1e-12
    ours, theirs = (torch.autograd.grad(y.square().sum(), adapter.parameters()) for y in (model(ids), expected))
    for one, other in zip(ours, theirs, strict=True):
        assert relative_error(one, other) < 1e-12
    vblora.merge(model)
    assert relative_error(model(ids), expected) < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_other_dtypes(dtype, tolerance):
    base, model = injected(torch.float32)
    x = torch.randn(5, 576)
    expected = torch.func.functional_call(base, plain_weights(base, model.vblora.default), x)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert relative_error(model(x).float(), expected) < tolerance


def test_what_is_cut_off_gets_no_gradient():
    """A bank vector that only sub-vectors of length 50 use."""
    layer = vblora.VBLinear(50, 50, vector_length=64, pad=True, num_vectors=6)
    layer(torch.randn(3, 50)).square().sum().backward()
    gradient = layer.adapter.bank.vectors.grad
    assert (gradient[:, 50:] == 0).all() and gradient[:, :50].any()


class LargestSlices(TorchDispatchMode):
    """The sizes of the tensors that the backward of slices creates."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.slice_backward.default:
            self.elements.append(result.numel())
        return result


def test_a_cut_is_a_view_whose_gradient_is_no_larger_than_the_factor():
    model = injected()[1]
    factors = [factor for layer in model.vblora.default.compose(torch.float64) for factor in (layer.A, layer.B)]
    assert [tuple(f.shape) for f in factors] == [(3, w) for w in (576, 192, 192, 50, 50, 512)]
    assert [factor.stride(0) for factor in factors] == [768, 256, 256, 256, 256, 512]
    ends = [factor.data_ptr() + 3 * factor.stride(0) * factor.itemsize for factor in factors]
    assert ends[:-1] == [factor.data_ptr() for factor in factors[1:]]  # views of the sub-vectors' memory
    with LargestSlices() as slices:
        sum(factor.square().sum() for factor in factors).backward()
    assert sorted(slices.elements) == [3 * 256] * 4 + [3 * 768]  # none for 512, which is not cut


def test_a_call_that_keeps_factors_composes_once():
    base, model = injected()
    x = torch.randn(5, 576, dtype=torch.float64)
    with torch.no_grad(), keeping_factors(), ComposedRows() as composed:
        first, second = model(x), model(x)
        assert composed.calls == 1 and torch.equal(first, second)
        model.vblora.default.bank.vectors.mul_(2)
        expected = torch.func.functional_call(base, plain_weights(base, model.vblora.default), x)
        assert relative_error(model(x), expected) < 1e-12


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(compiler):
    torch._dynamo.reset()
    model = injected(torch.float32)[1]
    x = torch.randn(5, 576)
    parameters = (model.vblora.default.logits, model.vblora.default.bank.vectors)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    ours, theirs = (torch.autograd.grad(m(x).square().sum(), parameters) for m in (compiled, model))
    for one, other in zip(ours, theirs, strict=True):
        assert relative_error(one, other) < 1e-5
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < 1e-5


def test_exports():
    model = injected(torch.float32)[1]
    x = torch.randn(5, 576)
    assert relative_error(torch.export.export(model, (x,)).module()(x), model(x)) < 1e-6


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    torch.manual_seed(0)
    config = vblora.VBLoRAConfig(r=2, num_vectors=16, vector_length=8, target_modules=["up", "down"], pad=True)
    net = vblora.inject(Net(width=13, blocks=3), config)
    x = torch.randn(5, 13, requires_grad=True)
    gradients = []
    for net.reentrant in (None, reentrant):
        net(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in net.vblora.default.parameters()])
        net.zero_grad()
    for one, other in zip(*gradients, strict=True):
        assert relative_error(one, other) < 1e-6


def test_where_every_width_is_divided_it_changes_nothing():
    x = torch.randn(5, 16)
    results = []
    for pad in (False, True):
        torch.manual_seed(0)
        config = vblora.VBLoRAConfig(
            r=2, num_vectors=16, vector_length=8, target_modules=["up", "down"], pad=pad, seed=1
        )
        net = vblora.inject(Net(blocks=2), config)
        optimizer = torch.optim.AdamW(vblora.parameter_groups(net))
        for _ in range(3):
            loss = net(x).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(dict(net.state_dict()))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_candidates_are_dense_training_and_grow():
    losses = {}
    x = torch.randn(5, 576)

    def train(model, optimizer):
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    for num_candidates in (None, 6):
        torch.manual_seed(0)
        config = vblora.VBLoRAConfig(
            **SIZES | {"num_vectors": 24}, num_candidates=num_candidates, seed=3, init_vector_bank_bound=0.5
        )
        model = vblora.inject(uneven(), config)
        optimizer = torch.optim.AdamW(vblora.parameter_groups(model))
        losses[num_candidates] = [train(model, optimizer) for _ in range(3)]
        if num_candidates:
            assert vblora.stats(model) == (ROWS, 24, 6, 0)
            vblora.grow(model, 12, optimizer)
        losses[num_candidates] += [train(model, optimizer) for _ in range(3)]
    assert losses[None] == losses[6]
    assert vblora.stats(model) == (ROWS, 24, 12, 0)


def test_counts_whole_sub_vectors():
    model = injected(num_candidates=5)[1]
    bank = 12 * LENGTH
    assert vblora.count_parameters(model) == (bank + ROWS * 5, bank + round(ROWS * 2 * 1.25))


def test_merge_unmerge_and_eject():
    base, model = injected()
    x = torch.randn(5, 576, dtype=torch.float64)
    expected = plain_weights(base, model.vblora.default)
    vblora.merge(model)
    for name, weight in expected.items():
        assert relative_error(model.get_submodule(name.removesuffix(".weight")).weight, weight) < 1e-12
    vblora.eject(vblora.unmerge(model))
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize(
    ("widths", "length", "rows"),
    [((50, 50), 16, 4 + 4), ((5, 64), 16, 1 + 4), ((64, 50), 16, 4 + 4), ((1, 1), 4, 1 + 1), ((7, 9), 1, 7 + 9)],
)
def test_rows_of_one_layer(widths, length, rows):
    bank = vblora.VectorBank(8, length)
    adapter = VBLoRAAdapter([Target("layer", *widths)], bank, r=2, pad=True)
    assert adapter.num_subvectors == 2 * rows
    (factors,) = adapter.compose(torch.float32)
    assert (factors.A.shape, factors.B.shape) == ((2, widths[0]), (2, widths[1]))
