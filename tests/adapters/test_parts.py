"""A part of a model that is called by itself, such as ``model.bert(ids)``, composes once, for its own layers."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import vblora
from tests.small_models import ComposedRows, Net, bert, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"r": 2, "vector_length": 8, "target_modules": ["up", "down"]}
CONFIGS = {
    "vblora": vblora.VBLoRAConfig(**SIZES, num_vectors=16, init_vector_bank_bound=1.0),
    "lora": vblora.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False),
    "vera": vblora.VeraConfig(r=4, target_modules=["up", "down"], d_initial=0.5),
    "tied_lora": vblora.TiedLoraConfig(r=4, target_modules=["up", "down"]),
}


class Pair(nn.Module):
    """Two networks, the second of which has a list that is called as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Net(blocks=2), Net(blocks=3)
        self.second.blocks = nn.Sequential(*self.second.blocks)

    def forward(self, x):
        return self.first(x) + self.second(x)


@pytest.fixture
def x():
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


def pair(method="vblora") -> Pair:
    torch.manual_seed(0)
    model = vblora.inject(Pair(), CONFIGS[method])
    if method == "vera":
        with torch.no_grad():  # starts at 0
            getattr(model.vblora.default, model.vblora.default.VECTORS[1]).normal_()
    return model


def compositions(model: nn.Module) -> list[range | None]:
    """The targets that are composed from now on; None means all."""
    adapter, spans = model.vblora.default, []
    compose = adapter.compose
    adapter.compose = lambda dtype, span=None: spans.append(span) or compose(dtype, span)
    return spans


def gradients(model: nn.Module) -> list[torch.Tensor]:
    found = [parameter.grad for parameter in model.vblora.default.parameters()]
    model.zero_grad()
    return found


def assert_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) < 1e-6


@pytest.mark.parametrize("method", CONFIGS)
def test_a_part_composes_its_layers_once(method, x):
    model = pair(method)
    expected = type(model.second).forward(model.second, x)  # not through the hooks of `second`
    expected.square().sum().backward()
    expected_gradients = gradients(model)
    spans = compositions(model)
    y = model.second(x)
    assert spans == [range(4, 10)]
    y.square().sum().backward()
    assert torch.equal(y, expected)
    assert_close(gradients(model), expected_gradients)


def test_a_part_within_a_forward_composes_nothing(x):
    model = pair()
    spans = compositions(model)
    model(x).sum().backward()
    assert spans == [None]
    model.second.blocks(x)
    assert spans == [None, range(4, 10)]


def test_parts_do_not_share_a_graph(x):
    model = pair()
    one, other, whole = model.first(x).sum(), model.second(x).sum(), model(x).sum()
    separate = torch.autograd.grad(one + other, [*model.vblora.default.parameters()])
    together = torch.autograd.grad(whole, [*model.vblora.default.parameters()])
    assert_close(separate, together)
    assert all(slot.forward_factors is None for slot in model.vblora.default.slots)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_part_is_recomputed(reentrant, x):
    model = pair()
    x.requires_grad_()
    (model.first(x) + model.second(x)).sum().backward()
    expected = gradients(model)
    spans = compositions(model)
    y = checkpoint(model.first, x, use_reentrant=reentrant) + checkpoint(model.second, x, use_reentrant=reentrant)
    y.sum().backward()
    assert spans == [range(4), range(4, 10), range(4, 10), range(4)]
    assert_close(gradients(model), expected)


def test_a_part_that_fails_hands_nothing_on(x):
    model = pair()
    with pytest.raises(RuntimeError, match="mat1"):
        model.second(x[:, :3])
    assert all(slot.forward_factors is None for slot in model.vblora.default.slots)


def test_a_part_that_was_interrupted_composes_anew(x):
    model = pair()

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.second.blocks[-1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.second(x)
    hook.remove()
    with torch.no_grad():
        model.vblora.default.bank.vectors.mul_(2)
    assert torch.equal(model.second(x), copy.deepcopy(model).second(x))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copys_parts_are_its_own(clone, x):
    model = pair()
    twin = clone(model)
    with torch.no_grad():
        twin.vblora.default.bank.vectors.mul_(2)
    spans = compositions(twin)
    assert not torch.equal(twin.second(x), model.second(x))
    assert spans == [range(4, 10)]


def test_parts_of_the_adapters_that_are_active(x):
    model = pair()
    few = vblora.LoraConfig(r=2, target_modules=r"second\.blocks\.[12]\.\w+", init_lora_weights=False)
    vblora.inject(model, few, adapter_name="few")
    with torch.no_grad(), ComposedRows() as composed:
        model.second(x)
        assert composed.calls == 1
        vblora.set_adapter(model, "few")
        y = model.second(x)
        assert composed.calls == 1
        assert torch.equal(y, type(model.second).forward(model.second, x))
    vblora.delete_adapter(model, "default")
    assert not model.first._forward_pre_hooks and model.second._forward_pre_hooks
    vblora.eject(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_compiled_part(x):
    torch._dynamo.reset()
    model = pair()
    expected = model.second(x)
    composed = []

    def backend(graph, _inputs):
        composed.extend(node for node in graph.graph.nodes if "admixture" in str(node.target))
        return graph.forward

    y = torch.compile(model.second, fullgraph=True, backend=backend)(x)
    assert len(composed) == 1
    assert relative_error(y, expected) < 1e-6
    y.sum().backward()
    compiled_gradients = gradients(model)
    model.second(x).sum().backward()
    assert_close(compiled_gradients, gradients(model))


def test_the_encoder_of_a_transformers_model():
    model = vblora.inject(bert(), vblora.VBLoRAConfig(r=2, num_vectors=16, vector_length=8)).eval()
    ids = torch.tensor([[5, 6, 7]])
    with ComposedRows() as composed:
        hidden = model.bert(ids).last_hidden_state
    assert (composed.calls, composed.rows) == (1, model.vblora.default.num_subvectors)
    hidden.sum().backward()
    assert model.vblora.default.logits.grad.any()
    with pytest.raises(ValueError, match="`adapter_names` was passed to the submodule `bert`"):
        model.bert(ids, adapter_names=["default"])
