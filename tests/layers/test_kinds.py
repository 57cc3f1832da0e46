"""Embeddings and convolutions as targets, compared with the base layer on ``W + ΔW``; refused layers; their files."""

import copy
import json

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import vblora
from tests.small_models import bert, gpt2, llama, relative_error
from vblora.adapters.base import Factors
from vblora.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"r": 3, "num_vectors": 16, "vector_length": 4, "init_vector_bank_bound": 0.5, "num_candidates": 8}
IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))


class Holder(nn.Module):
    """A chain of layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def ids(*shape, entries=12):
    return torch.randint(0, entries, shape)


def scaled(kind, padding_idx):
    return kind(12, 8, padding_idx, embed_scale=2.5)


# The layer, and the shape of its input.
CASES = {
    "linear": (lambda: nn.Linear(8, 12), lambda: (3, 5, 8)),
    "linear, a subclass": (lambda: NonDynamicallyQuantizableLinear(8, 12), lambda: (3, 5, 8)),
    "linear, Falcon's": (lambda: FalconLinear(8, 12), lambda: (3, 5, 8)),
    "embedding": (lambda: nn.Embedding(12, 8), lambda: ids(3, 5)),
    "embedding, one index": (lambda: nn.Embedding(12, 8), lambda: ids()),
    "embedding, no index": (lambda: nn.Embedding(12, 8), lambda: ids(0, 5)),
    "embedding, padding": (lambda: nn.Embedding(12, 8, padding_idx=3), lambda: ids(6, 9)),
    "embedding, last padding": (lambda: nn.Embedding(12, 8, padding_idx=-1), lambda: ids(6, 9)),
    "embedding, int32": (lambda: nn.Embedding(12, 8, padding_idx=3), lambda: ids(6, 9).int()),
    "embedding, sparse": (lambda: nn.Embedding(12, 8, sparse=True), lambda: ids(6, 9)),
    "scaled": (lambda: scaled(BartScaledWordEmbedding, 1), lambda: ids(4, 9)),
    "scaled by a buffer": (lambda: scaled(Gemma3TextScaledWordEmbedding, 0), lambda: ids(4, 9)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3), lambda: (2, 8, 11)),
    "conv1d, unbatched": (lambda: nn.Conv1d(8, 12, 3, padding=1), lambda: (8, 11)),
    "conv1d, groups": (lambda: nn.Conv1d(8, 12, 3, groups=2, bias=False), lambda: (2, 8, 11)),
    "conv1d, depthwise": (lambda: nn.Conv1d(8, 16, 4, groups=8), lambda: (2, 8, 11)),
    "conv1d, same": (lambda: nn.Conv1d(8, 12, 4, padding="same"), lambda: (2, 8, 11)),
    "conv1d, circular": (lambda: nn.Conv1d(8, 12, 3, padding=2, padding_mode="circular"), lambda: (2, 8, 11)),
    "conv1d, no rows": (lambda: nn.Conv1d(8, 12, 3), lambda: (0, 8, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3), lambda: (2, 4, 7, 6)),
    "conv2d, unbatched": (lambda: nn.Conv2d(4, 8, (2, 3), stride=2), lambda: (4, 7, 6)),
    "conv2d, everything": (
        lambda: nn.Conv2d(8, 12, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=4),
        lambda: (3, 8, 9, 8),
    ),
    "conv2d, reflect": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), lambda: (2, 4, 7, 6)),
    "conv2d, replicate": (
        lambda: nn.Conv2d(8, 8, 3, padding="same", dilation=2, padding_mode="replicate", groups=2),
        lambda: (2, 8, 7, 6),
    ),
    "conv2d, patches": (lambda: nn.Conv2d(4, 8, 4, stride=4), lambda: (2, 4, 8, 8)),
}


@pytest.fixture(params=CASES)
def case(request, generator):
    torch.manual_seed(generator.initial_seed())
    make, inputs = CASES[request.param]
    base, x = Holder(make()).double(), inputs()
    x = torch.randn(x, dtype=torch.float64) if isinstance(x, tuple) else x
    model = vblora.inject(copy.deepcopy(base), vblora.VBLoRAConfig(target_modules=["layers.0"], **SIZES)).double()
    return base, model, x


def composed(model, name="default"):
    """A and B of the only layer, from the oracle's sub-vectors."""
    adapter = model.vblora[name]
    (target,) = adapter.targets
    mixed, _, _ = vblora.reference.admixture(adapter.logits, adapter.bank.vectors, adapter.candidates, adapter.topk)
    mixed = mixed * adapter.scaling**0.5
    A, B = mixed.split([adapter.r * target.in_features // 4, adapter.r * target.out_features // 4])
    return A.reshape(adapter.r, -1), B.reshape(adapter.r, -1)


def expected(base, model, x):
    """The base layer on its weight plus the update."""
    layer = base.layers[0]
    A, B = composed(model)
    delta = (A.T @ B if isinstance(layer, nn.Embedding) else B.T @ A).view_as(layer.weight)
    if getattr(layer, "sparse", False):  # only a leaf can get a sparse gradient
        return F.embedding(x, layer.weight.detach() + delta, layer.padding_idx)
    return functional_call(layer, {"weight": layer.weight.detach() + delta}, (x,))


def test_outputs_and_gradients_are_those_of_the_updated_weight(case):
    base, model, x = case
    if x.is_floating_point():
        x.requires_grad_(True)
    theirs, ours = expected(base, model, x), model(x)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert relative_error(ours, theirs) < 1e-12
    wanted = [model.vblora.default.logits, model.vblora.default.bank.vectors] + [x] * x.is_floating_point()
    weight = torch.randn_like(theirs)
    gradients = [torch.autograd.grad((y * weight).sum(), wanted) for y in (ours, theirs)]
    for one, other in zip(*gradients, strict=True):
        assert relative_error(one, other) < 1e-10
    assert base.layers[0].weight.grad is None


def test_factors_with_scales_are_those_with_the_scales_in_them(case):
    """The scales that some methods train: ``d`` after A, ``e`` after B."""
    _, model, x = case
    layer = model.layers[0]
    A, B = composed(model)
    d, e = torch.randn(A.shape[0], dtype=A.dtype), torch.randn(B.shape[1], dtype=A.dtype)
    y = torch.zeros_like(layer.base_layer(x))
    ours = layer.kind.add_update(layer.base_layer, y, x, Factors(A, B, d, e))
    theirs = layer.kind.add_update(layer.base_layer, y, x, Factors(A * d[:, None], B * e))
    assert relative_error(ours, theirs) < 1e-12


def test_merge_and_unmerge(case):
    base, model, x = case
    before = model(x)
    vblora.merge(model)
    assert relative_error(model(x), before) < 1e-12
    assert type(model.layers[0].weight) is nn.Parameter and model.layers[0].weight.shape == base.layers[0].weight.shape
    with vblora.disabled(model):
        assert torch.equal(model(x), base(x))
    vblora.unmerge(model)
    assert torch.equal(model.layers[0].weight, base.layers[0].weight)
    assert torch.equal(model(x), before)
    vblora.merge(model, release=True)
    vblora.eject(model)
    assert type(model.layers[0]) is type(base.layers[0])
    assert relative_error(model(x), before) < 1e-12


def test_native_forms_come_back_to_the_bit(case, tmp_path):
    base, model, x = case
    model = model.float()
    x = x.float() if x.is_floating_point() else x
    for form in ("resume", "deploy"):
        vblora.save(model, tmp_path / form, form=form)
        again = vblora.load(copy.deepcopy(base).float(), tmp_path / form)
        assert torch.equal(again(x), model(x))
        assert again.vblora.default.targets == model.vblora.default.targets


@pytest.mark.parametrize("training", [False, True])
def test_compiles_in_one_graph(case, training):
    _, model, x = case
    torch._dynamo.reset()
    model.train(training)
    before = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        assert relative_error(compiled(x), before) < 1e-12
    if training:
        adapter = model.vblora.default
        wanted = torch.autograd.grad(before.square().sum(), (adapter.logits, adapter.bank.vectors))
        gradients = torch.autograd.grad(compiled(x).square().sum(), (adapter.logits, adapter.bank.vectors))
        assert all(relative_error(*pair) < 1e-10 for pair in zip(gradients, wanted, strict=True))


def test_exports(case):
    _, model, x = case
    model.eval().requires_grad_(False)
    program = torch.export.export(model, (x,))
    assert relative_error(program.module()(x), model(x)) < 1e-12
    merged = torch.export.export(vblora.merge(model), (x,))
    assert relative_error(merged.module()(x), program.module()(x)) < 1e-12
    assert not any("vblora" in str(node.target) for node in merged.graph.nodes if node.op == "call_function")


def test_runs_under_autocast(case):
    base, model, x = case
    base, model = base.float(), model.float()
    x = x.float() if x.is_floating_point() else x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, ours = base(x), model(x)
    assert ours.dtype == plain.dtype and ours.shape == plain.shape
    assert relative_error(ours.float(), expected(base, model, x)) < 2e-2
    ours.float().square().sum().backward()
    assert model.vblora.default.logits.grad.isfinite().all()


def test_dropout_is_of_the_updates_input():
    torch.manual_seed(0)
    config = vblora.VBLoRAConfig(target_modules=["layers.0"], vblora_dropout=0.5, **SIZES)
    model, x = vblora.inject(Holder(nn.Conv1d(8, 12, 3)), config), torch.randn(2, 8, 11)
    torch.manual_seed(1)
    ours = model(x)
    torch.manual_seed(1)
    layer = model.layers[0]
    seen = F.dropout(x, 0.5)
    assert torch.allclose(ours, layer.base_layer(x) + F.conv1d(seen, layer.delta_weight(["default"])), atol=1e-5)
    assert not torch.equal(ours, model(x))
    # Indices cannot be dropped: embeddings have no dropout, like PEFT's.
    model, x = vblora.inject(Holder(nn.Embedding(12, 8)), config), ids(4, 5)
    assert torch.equal(model(x), model(x))


def test_no_op_start_and_scaling_hold_for_every_kind():
    torch.manual_seed(0)
    layers, x = (nn.Embedding(12, 8), nn.Conv1d(6, 8, 2)), ids(2, 6)
    base = Holder(*layers)
    choice = SIZES | {"target_modules": ["layers.0", "layers.1"], "scaling": 4.0}
    model = vblora.inject(copy.deepcopy(base), vblora.VBLoRAConfig(**choice | {"init": "noop"}))
    assert torch.equal(model(x), base(x))
    model(x).square().sum().backward()
    assert model.vblora.default.logits.grad.any() and model.vblora.default.bank.vectors.grad.any()


class Shifted(nn.Embedding):
    def forward(self, x):
        return super().forward(x + 2)


class Causal(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (2, 0)))


class Doubled(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return 2 * super()._conv_forward(x, weight, bias)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Tripled(nn.Linear):
    def __call__(self, x):
        return 3 * super().__call__(x)


class Router(nn.Linear):
    def forward(self, x):
        scores = super().forward(x)
        return scores, scores.argmax(-1)


class OtherConv1D(Conv1D):
    def forward(self, x):
        return super().forward(x).relu()


def patched():
    layer = nn.Linear(8, 12)
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: Scaled(8, 12), r"a Scaled, which is no plain nn\.Linear: its `forward` may compute something else"),
        (lambda: Router(8, 12), r"a Router, which is no plain nn\.Linear"),
        (lambda: Tripled(8, 12), "a Tripled, which has a `__call__` of its own that may compute something else"),
        (lambda: OtherConv1D(12, 8), "a OtherConv1D, which is no plain Conv1D"),
        (patched, "a Linear, which has a replaced `forward`"),
        (lambda: nn.Embedding(12, 8, max_norm=1.0), "a Embedding, which changes its weight.*`max_norm`"),
        (
            lambda: nn.Embedding(12, 8, scale_grad_by_freq=True),
            "a Embedding, which scales its gradients.*`scale_grad_by_freq`",
        ),
        (
            lambda: Shifted(12, 8),
            r"a Shifted, which is no plain nn\.Embedding: its `forward` may compute something else",
        ),
        (lambda: Causal(8, 12, 3), r"a Causal, which is no plain nn\.Conv1d"),
        (lambda: Doubled(8, 12, 3), "a Doubled, which overrides `_conv_forward`"),
        (lambda: nn.LazyLinear(8), "a LazyLinear, which has no sizes yet"),
        (lambda: nn.LazyConv1d(8, 3), "a LazyConv1d, which has no sizes yet"),
        (lambda: nn.Conv3d(8, 12, 3), r"a Conv3d; allowed are nn\.Linear, nn\.Embedding, nn\.Conv1d"),
        (lambda: nn.ConvTranspose1d(8, 12, 3), "a ConvTranspose1d; allowed are"),
        (lambda: nn.EmbeddingBag(12, 8), "a EmbeddingBag; allowed are"),
    ],
)
def test_refuses_by_name(layer, message):
    model = Holder(layer())
    with pytest.raises(TypeError, match=rf"`layers\.0`, {message}.*`exclude_modules`"):
        vblora.inject(model, vblora.VBLoRAConfig(target_modules=["layers.0"], **SIZES))
    assert [name for name, _ in model.named_modules()] == ["", "layers", "layers.0"]


@pytest.mark.parametrize("layer", [lambda: Scaled(8, 8), lambda: Router(8, 8), lambda: OtherConv1D(8, 8), patched])
def test_all_linear_leaves_out_layers_with_a_forward_of_their_own(layer):
    model = Holder(nn.Linear(8, 8), layer(), layer())
    with pytest.warns(UserWarning, match=r'"all-linear" leaves out `layers\.1`, `layers\.2`, a \w+, which') as said:
        vblora.inject(model, vblora.VBLoRAConfig(target_modules="all-linear", **SIZES))
    assert len(said) == 1
    assert [target.name for target in model.vblora.default.targets] == ["layers.0"]
    with pytest.raises(TypeError, match=r"`base_layer` is a .*forward"):
        vblora.VBLinear(base_layer=layer())


def test_layers_whose_forward_accelerate_wraps_are_adapted():
    from accelerate.hooks import ModelHook, add_hook_to_module

    layer, x = add_hook_to_module(nn.Linear(8, 12).double(), ModelHook()), torch.randn(3, 8, dtype=torch.float64)
    base = Holder(nn.Linear(8, 12).double())
    base.layers[0].load_state_dict(layer.state_dict())
    model = vblora.inject(Holder(layer), vblora.VBLoRAConfig(target_modules="all-linear", **SIZES)).double()
    before = model(x)
    assert relative_error(before, expected(base, model, x)) < 1e-12
    assert relative_error(vblora.merge(model)(x), before) < 1e-12


def test_positions_of_transformers_that_count_otherwise_are_refused():
    from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding

    model = Holder(BartLearnedPositionalEmbedding(12, 8))
    with pytest.raises(TypeError, match="BartLearnedPositionalEmbedding, which is no plain"):
        vblora.inject(model, vblora.VBLoRAConfig(target_modules=["layers.0"], **SIZES))


def test_widths_that_the_vector_length_does_not_divide_are_named():
    with pytest.raises(ValueError, match=r"`vector_length` is 4.*`layers\.0` \(15 -> 8\)"):
        vblora.inject(Holder(nn.Conv1d(5, 8, 3)), vblora.VBLoRAConfig(target_modules=["layers.0"], **SIZES))


def test_all_linear_means_linear_layers():
    model = Holder(nn.Embedding(12, 8), nn.Linear(8, 8), nn.Conv1d(4, 8, 1))
    vblora.inject(model, vblora.VBLoRAConfig(target_modules="all-linear", **SIZES))
    assert [target.name for target in model.vblora.default.targets] == ["layers.1"]


# Models


class Vision(nn.Module):
    """Patches, a depthwise convolution and a head, like a small vision model."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, 16, 4, stride=4)
        self.mix = nn.Conv1d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.relu(self.mix(self.patches(x).flatten(2))).mean(-1))


def trained(model, **inputs):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs).logits.square().mean().backward()
        optimizer.step()
    return model.eval()


def injected(make, *targets, **choice):
    torch.manual_seed(0)
    base = make().eval()
    config = vblora.VBLoRAConfig(target_modules=list(targets), **SIZES | choice)
    return base, trained(vblora.inject(copy.deepcopy(base), config), input_ids=IDS)


@torch.no_grad()
def outputs(model):
    return model.eval()(input_ids=IDS).logits


def tied_llama():
    return llama(tie_word_embeddings=True, vocab_size=52)


def test_tied_embeddings_and_head_are_two_targets():
    _, model = injected(tied_llama, "embed_tokens", "lm_head")
    embed, head = model.model.embed_tokens, model.lm_head
    assert embed.weight is head.weight
    before, weight = outputs(model), embed.weight.detach().clone()
    vblora.merge(model)
    assert relative_error(outputs(model), before) < 1e-5
    assert not torch.equal(embed.weight, head.weight)
    vblora.unmerge(model)
    assert embed.weight is head.weight and torch.equal(embed.weight, weight)
    vblora.eject(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_update_of_the_embeddings_leaves_a_tied_head_alone():
    base, model = injected(tied_llama, "embed_tokens")
    assert not torch.equal(outputs(model), outputs(base))
    hidden = torch.randn(2, 32)
    assert torch.equal(model.lm_head(hidden), base.lm_head(hidden))
    vblora.merge(model)
    assert torch.equal(model.lm_head(hidden), base.lm_head(hidden))


def test_tying_again_and_resizing_are_the_models():
    _, model = injected(tied_llama, "embed_tokens")
    model.tie_weights()
    assert model.get_input_embeddings().weight is model.lm_head.weight


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("embed_tokens", r"type .*AdaptedLayer.* is not an instance of .*Embedding"),  # transformers' own
        ("lm_head", "`out_features` of an adapted layer would change from [0-9]+ to "),
    ],
)
def test_resizing_an_adapted_layer_is_refused(target, error):
    _, model = injected(tied_llama, target)
    rows = len(model.lm_head.weight)
    expected = outputs(model)
    model.resize_token_embeddings(rows)
    assert torch.equal(outputs(model), expected)
    with pytest.raises((TypeError, ValueError), match=error):
        model.resize_token_embeddings(rows + 2)


EMBEDDINGS = {"bert": (bert, ("word_embeddings", "query"), {"vocab_size": 52}), "gpt2": (gpt2, ("wpe", "c_attn"), {})}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_peft_computes_the_same_from_a_lora_of_embeddings(name, tmp_path):
    make, targets, sizes = EMBEDDINGS[name]
    base, model = injected(lambda: make(**sizes), *targets)
    vblora.save(model, tmp_path, form="lora")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative_error(outputs(loaded), outputs(model)) < 1e-5
    assert relative_error(outputs(base), outputs(model)) > 1e-3


@pytest.mark.filterwarnings("ignore:Adapter .* was active")
def test_peft_computes_the_same_from_a_lora_of_convolutions(tmp_path):
    torch.manual_seed(0)
    base, x = Vision().eval(), torch.randn(2, 4, 12, 8)
    config = vblora.VBLoRAConfig(target_modules=["patches", "mix"], **SIZES)
    model = vblora.inject(copy.deepcopy(base), config)
    vblora.save(model, tmp_path, form="lora")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative_error(loaded(x), model(x)) < 1e-5
    assert relative_error(base(x), model(x)) > 1e-3


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (nn.Conv1d(8, 12, 3, groups=2), "groups"),
        (nn.Conv1d(8, 12, 3, dilation=2, padding=1, padding_mode="circular"), "dilation, padding_mode"),
    ],
)
def test_a_lora_of_convolutions_that_peft_computes_otherwise_is_refused(layer, what, tmp_path):
    model = vblora.inject(Holder(layer), vblora.VBLoRAConfig(target_modules=["layers.0"], **SIZES))
    with pytest.raises(ValueError, match=rf"`layers\.0` is a convolution with {what} of its own"):
        vblora.save(model, tmp_path / "lora", form="lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("form", ["peft", "peft-topk"])
@pytest.mark.parametrize("layer", [nn.Embedding(12, 8), nn.Conv1d(8, 12, 3)], ids=["embedding", "convolution"])
def test_pefts_vb_lora_holds_linear_layers_alone(layer, form, tmp_path):
    model = vblora.inject(Holder(copy.deepcopy(layer)), vblora.VBLoRAConfig(target_modules=["layers.0"], **SIZES))
    with pytest.raises(ValueError, match=rf'`form` is "{form}", but `layers\.0` is not a linear layer.*form="lora"'):
        vblora.save(model, tmp_path / form, form=form)
    assert not (tmp_path / form).exists()


def test_a_file_for_another_kind_of_layer_is_refused(tmp_path):
    config = vblora.VBLoRAConfig(target_modules=["layers.0"], **SIZES)
    vblora.save(vblora.inject(Holder(nn.Embedding(12, 8)), config), tmp_path / "one")
    with pytest.raises(ValueError, match=r"is embedding 12 -> 8 there, linear 12 -> 8 here"):
        vblora.load(Holder(nn.Linear(12, 8)), tmp_path / "one")
    vblora.save(vblora.inject(Holder(nn.Conv1d(4, 8, 3)), config), tmp_path / "two")
    for other in (nn.Conv1d(6, 8, 2), nn.Conv1d(4, 8, 3, dilation=2)):
        with pytest.raises(ValueError, match=r"of another kernel, groups, dilation or padding_mode here"):
            vblora.load(Holder(other), tmp_path / "two")


@pytest.mark.parametrize(
    "entry",
    [
        [12],
        [12, 8, "nothing"],
        [12, 8, "linear", [3, 4]],
        [12, 8, "embedding", [-3, -4]],
        [12, 8, "convolution"],
        [12, 8, "convolution", [5, 3]],
    ],
)
def test_a_damaged_description_of_a_layer_is_refused(entry, tmp_path):
    config = vblora.VBLoRAConfig(target_modules=["layers.0"], **SIZES)
    vblora.save(vblora.inject(Holder(nn.Conv1d(4, 8, 3)), config), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    description = json.loads(metadata["vblora"])
    assert description["targets"] == [["layers.0", 12, 8, "convolution", [4, 3]]]
    description["targets"] = [["layers.0", *entry]]
    safetensors.torch.save_file(tensors, path, metadata | {"vblora": json.dumps(description)})
    with pytest.raises(ValueError, match="description is invalid"):
        vblora.load(Holder(nn.Conv1d(4, 8, 3)), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "targets", "sizes"), EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_merges_embeddings_into_shards(make, targets, sizes, dtype, tmp_path, capsys):
    base, model = injected(lambda: make(**sizes), *targets)
    base.to(dtype).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    vblora.save(model, tmp_path / "adapter")
    assert main(["merge", *map(str, (tmp_path / "base", tmp_path / "adapter", tmp_path / "out"))]) == 0
    vblora.load(wanted := copy.deepcopy(base), tmp_path / "adapter")
    vblora.eject(vblora.merge(wanted, release=True))
    merged = type(base).from_pretrained(tmp_path / "out", dtype=dtype).state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in wanted.state_dict().items())
    capsys.readouterr()
    assert main(["info", str(tmp_path / "adapter")]) == 0
    assert f"{targets[0]} (embedding " in capsys.readouterr().out


def test_merges_square_embeddings_and_convolutions_into_files(tmp_path):
    torch.manual_seed(0)
    base = Holder(nn.Embedding(8, 8), nn.Conv1d(4, 8, 3, groups=2, padding=1), nn.Conv2d(4, 8, (1, 2)))
    (tmp_path / "base").mkdir()
    safetensors.torch.save_file(base.state_dict(), tmp_path / "base" / "model.safetensors", {"format": "pt"})
    config = vblora.VBLoRAConfig(target_modules=r"layers\.\d", **SIZES | {"vector_length": 2})
    vblora.save(model := vblora.inject(copy.deepcopy(base), config), tmp_path / "adapter")
    assert main(["merge", *map(str, (tmp_path / "base", tmp_path / "adapter", tmp_path / "out"))]) == 0
    vblora.eject(vblora.merge(model, release=True))
    merged = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(merged[name], tensor)
        assert torch.equal(tensor, base.state_dict()[name]) == name.endswith("bias")


def test_refuses_to_merge_tied_embeddings_alone_into_files(tmp_path, capsys):
    base, model = injected(tied_llama, "embed_tokens")
    base.save_pretrained(tmp_path / "base")
    vblora.save(model, tmp_path / "adapter")
    assert main(["merge", *map(str, (tmp_path / "base", tmp_path / "adapter", tmp_path / "out"))]) == 2
    assert "`model.embed_tokens.weight` is also that of the head" in capsys.readouterr().err
