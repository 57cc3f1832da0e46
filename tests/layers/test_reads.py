"""Layers whose weight the model's code reads itself: "all-linear" omits them, naming them is refused, and a forward warns."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vblora
from tests.small_models import Net, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"r": 2, "num_vectors": 16, "vector_length": 8, "init_vector_bank_bound": 0.5}


class Holder(nn.Module):
    """A layer whose weight a subclass reads in its own way, and a layer that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(16, 16)
        self.called = nn.Linear(16, 16)

    def forward(self, x):
        return self.called(self.use(x))

    def use(self, x):
        raise NotImplementedError


class Functional(Holder):
    def use(self, x):
        return F.linear(x, self.read.weight, self.read.bias)


class Transposed(Holder):
    """Multiplies by the transposed weight of a layer that it also calls."""

    def use(self, x):
        return self.read(x) @ self.read.weight


class Fused(Holder):
    """Calls the layer in training and reads its weight in evaluation."""

    def use(self, x):
        if self.training:
            return F.linear(x, weight=self.read.weight[:], bias=self.read.bias)
        return self.slowly(x)

    def slowly(this, x):
        return this.read(x) if this.training else F.linear(x, this.read.weight)


class OfAList(Holder):
    def __init__(self) -> None:
        super().__init__()
        self.read = nn.ModuleList([nn.Linear(16, 16)])

    def use(self, x):
        return F.linear(x, self.read[0].weight)


class Further(Holder):
    def __init__(self) -> None:
        super().__init__()
        self.read = nn.ModuleDict({"inner": nn.Linear(16, 16)})

    def use(self, x):
        return F.linear(x, self.read.inner.weight)


class OtherName(Holder):
    def use(self, x):
        layer = self.read
        return F.linear(layer(x), layer.weight.mT)


class Loop(OfAList):
    def use(self, x):
        for _index, layer in enumerate(self.read):
            x = F.linear(x, layer.weight)
        return x


class Zipped(OfAList):
    def use(self, x):
        return sum(F.linear(x, layer.weight) for _, layer in zip([x], self.read, strict=True))


class Inherited(Functional):
    def use(self, x):
        return super().use(x) + 1


READING = [Functional, Transposed, Fused, OfAList, Further, OtherName, Loop, Zipped, Inherited]


def config(*names, **choice):
    return vblora.VBLoRAConfig(target_modules=list(names) or "all-linear", **SIZES | choice)


@pytest.mark.parametrize("kind", READING)
def test_left_out_or_refused_by_name(kind):
    (name,) = [name for name, module in kind().named_modules() if name != "called" and isinstance(module, nn.Linear)]
    with pytest.warns(
        UserWarning, match=f'"all-linear" leaves out `{name}`, whose weight {kind.__name__} reads itself'
    ):
        model = vblora.inject(kind(), config())
    assert [target.name for target in model.vblora.default.targets] == ["called"]
    model = kind()
    with pytest.raises(TypeError, match=f"`{name}`, whose weight {kind.__name__} reads itself.*`exclude_modules`"):
        vblora.inject(model, config(name))
    assert not any("vblora" in name for name, _ in model.named_modules())


class Facts(Holder):
    """Reads the weight's metadata, not its values."""

    def use(self, x):
        weight = self.pick().weight
        y = self.read(x.to(self.read.weight).to(self.read.weight.dtype).to(weight).to(weight.device)) * weight.shape[0]
        return y if isinstance(self.read.weight, torch.Tensor) and self.read.weight is not None else None

    def pick(self):
        return self.read


class Called(OfAList):
    """Calls the layer by another name, in a loop, and reads its metadata."""

    def use(self, x):
        for layer in self.read:
            same = layer
            x = same(x.to(same.weight.dtype))
        return x


class Either(Holder):
    """Reads the weight for some inputs only, like DeBERTa and BLOOM."""

    def use(self, x):
        return self.read(x) if x.dim() == 2 else F.linear(x, self.read.weight)


@pytest.mark.parametrize("kind", [Facts, Called, Either])
def test_those_that_are_called_are_adapted(kind):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = vblora.inject(kind(), config())
        assert [target.name.partition(".")[0] for target in model.vblora.default.targets] == ["read", "called"]
        x = torch.randn(5, 16)
        y = model(x)
        y.square().sum().backward()
        vblora.merge(model)
    assert relative_error(model(x), y) < 1e-5


class ByName(Holder):
    """Reads the weight in a way that its code does not show."""

    def use(self, x):
        return F.linear(x, getattr(self, "re" + "ad").weight)


class Handed(Holder):
    def use(self, x):
        return times_transposed(self.read(x), self.read)


def times_transposed(x, layer):
    return x @ layer.weight


class Attending(Holder):
    """Like WavLM's attention, if its source were missing."""

    def use(self, x):
        layer = self.pick()
        y, _ = F.multi_head_attention_forward(
            *(x[:, None], x[:, None], x[:, None], 16, 2, torch.cat([layer.weight] * 3), torch.zeros(48), None, None),
            *(False, 0.0, layer.weight, layer.bias),
        )
        return y[:, 0]

    def pick(self):
        return self.read


class Unpacked(Holder):
    """Gets the weight without reading the attribute."""

    def use(self, x):
        return F.linear(x, *self.pick().parameters())

    def pick(self):
        return self.read


@pytest.mark.parametrize("kind", [ByName, Handed, Attending, Unpacked])
@pytest.mark.parametrize("training", [True, False])
def test_noticed_in_a_forward(kind, training):
    torch.manual_seed(0)
    base, x = kind(), torch.randn(5, 16)
    model = vblora.inject(copy.deepcopy(base), config()).train(training)
    with torch.set_grad_enabled(training), pytest.warns(UserWarning, match="read the weight of `read` itself"):
        before = model(x)
    with torch.set_grad_enabled(training), warnings.catch_warnings():  # inference rounds in another way
        warnings.simplefilter("error")
        assert torch.equal(model(x), before)  # warns only once
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"reads the weight of layer `read` itself.*nothing was merged"):
        vblora.merge(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    vblora.eject(model)
    assert torch.equal(model(x), base(x))


def test_a_way_that_is_taken_later_is_noticed_then():
    model = vblora.inject(Either(), config())
    model(torch.randn(5, 16))
    with pytest.warns(UserWarning, match="read the weight of `read` itself"):
        model(torch.randn(2, 5, 16))
    with pytest.raises(ValueError, match="`read`"):
        vblora.merge(model)


def test_before_any_forward_nothing_is_known():
    vblora.merge(vblora.inject(ByName(), config()))


class Unused(Holder):
    def use(self, x):
        return x


def test_layers_that_the_first_forward_does_not_call_are_named():
    model, x = vblora.inject(Unused(), config()), torch.randn(5, 16)
    with pytest.warns(UserWarning, match="first forward did not call `read`"):
        before = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        vblora.merge(model)  # a later call finds the update
    assert relative_error(model(x), before) < 1e-5


class Failing(Holder):
    def use(self, x):
        if x.dim() == 3:
            raise RuntimeError("not this one")
        return self.read(x)


def test_a_forward_that_fails_says_nothing():
    model = vblora.inject(Failing(), config())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="not this one"):
            model(torch.randn(2, 5, 16))
        model(torch.randn(5, 16))


@pytest.mark.parametrize("what", ["model", "blocks", "wrapped", "functions"])
def test_compiled_layers_are_not_missed(what):
    torch._dynamo.reset()
    model = vblora.inject(Net(blocks=2), config("up", "down"))
    how = {"backend": "aot_eager", "fullgraph": True}
    if what == "model":
        model.compile(**how)
    for index, block in enumerate(model.blocks):
        if what == "blocks":
            block.compile(**how)
        elif what == "wrapped":
            model.blocks[index] = torch.compile(block, **how)
        elif what == "functions":
            block.forward = torch.compile(block.forward, **how)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model(torch.randn(5, 16))
        model.eval()(torch.randn(5, 16))
        vblora.merge(model)
    assert not [warning for warning in said if "first forward" in str(warning.message)]


def test_facts_are_told_in_a_graph():
    torch._dynamo.reset()
    model, x = vblora.inject(Facts(), config()), torch.randn(5, 16)
    before = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x), before) < 1e-6


def test_a_copy_knows_what_was_noticed():
    model = vblora.inject(ByName(), config())
    with pytest.warns(UserWarning, match="`read`"):
        model(torch.randn(5, 16))
    with pytest.raises(ValueError, match="`read`"):
        vblora.merge(copy.deepcopy(model))
