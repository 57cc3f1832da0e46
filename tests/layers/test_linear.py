import copy

import pytest
import torch
from torch import nn

import vblora
from tests.small_models import relative_error


def explicit(layer: vblora.VBLinear, x: torch.Tensor) -> torch.Tensor:
    """The layer's formula, from the oracle's sub-vectors."""
    adapter = layer.adapter
    subvectors, _, _ = vblora.reference.admixture(
        adapter.logits, adapter.bank.vectors, adapter.candidates, adapter.topk
    )
    rows = adapter.r * layer.in_features // adapter.bank.vector_length
    A, B = subvectors[:rows].reshape(adapter.r, -1), subvectors[rows:].reshape(adapter.r, -1)
    return layer.base_layer(x) + x @ A.T @ B


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (12,), (0, 12), (2, 0, 12)])
def test_is_the_formula(shape):
    layer = vblora.VBLinear(12, 20, r=3, num_vectors=10, vector_length=4)
    nn.init.normal_(layer.adapter.bank.vectors)
    x = torch.randn(shape)
    assert layer(x).shape == (*shape[:-1], 20)
    assert torch.allclose(layer(x), explicit(layer, x), atol=1e-5)


def test_gradients_are_the_formulas():
    layer = vblora.VBLinear(12, 20, r=3, num_vectors=10, vector_length=4).double()
    nn.init.normal_(layer.adapter.bank.vectors)
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    wanted = (x, layer.adapter.logits, layer.adapter.bank.vectors)
    ours = torch.autograd.grad(layer(x).square().sum(), wanted)
    theirs = torch.autograd.grad(explicit(layer, x).square().sum(), wanted)
    for one, other in zip(ours, theirs, strict=True):
        assert relative_error(one, other) < 1e-12


def test_only_the_adapter_trains():
    layer = vblora.VBLinear(8, 8)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        "adapter.logits",
        "adapter.bank.vectors",
    }
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.base_layer.weight.grad is None and layer.adapter.logits.grad is not None


def test_wraps_a_layer_and_keeps_it():
    base = nn.Linear(8, 16)
    layer = vblora.VBLinear(base_layer=base, num_vectors=4, vector_length=8)
    assert layer.base_layer is base and layer.weight.shape == base.weight.shape and layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (8, 16)


def test_default_vector_length_divides_both_widths():
    assert vblora.VBLinear(768, 3072).adapter.bank.vector_length == 256
    assert vblora.VBLinear(12, 20).adapter.bank.vector_length == 4
    assert vblora.VBLinear(700, 3001, pad=True).adapter.bank.vector_length == 256
    assert vblora.VBLinear(12, 19, pad=True).adapter.bank.vector_length == 19


def test_layers_share_a_bank():
    bank = vblora.VectorBank(16, 4)
    net = nn.Sequential(vblora.VBLinear(8, 12, bank=bank), vblora.VBLinear(12, 4, bank=bank, r=2))
    net(torch.randn(3, 8)).sum().backward()
    assert sum(p is bank.vectors for p in net.parameters()) == 1
    assert bank.vectors.grad.any()
    twin = copy.deepcopy(net)
    assert twin[0].adapter.bank is twin[1].adapter.bank is not bank
    fresh = nn.Sequential(
        vblora.VBLinear(8, 12, bank=(other := vblora.VectorBank(16, 4))), vblora.VBLinear(12, 4, bank=other, r=2)
    )
    fresh.load_state_dict(net.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(fresh(x), net(x))
    groups = {group["name"]: group["params"] for group in vblora.parameter_groups(net)}
    assert groups["bank"] == [bank.vectors] and len(groups["logits"]) == 2


def test_dropout_is_on_the_update_while_training():
    layer = vblora.VBLinear(64, 8, dropout=0.5)
    nn.init.normal_(layer.adapter.bank.vectors)
    x = torch.randn(4, 64)
    torch.manual_seed(1)
    one = layer(x)
    assert not torch.equal(one, layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert torch.allclose(layer(x), explicit(layer, x), atol=1e-5)


def test_evaluation_sees_every_write():
    layer, x = vblora.VBLinear(8, 8), torch.randn(2, 8)
    with torch.no_grad():
        layer(x)
        layer.adapter.bank.vectors.data.normal_()
        assert torch.allclose(layer(x), explicit(layer, x), atol=1e-5)


def test_compiles_in_one_graph():
    torch._dynamo.reset()
    layer, x = vblora.VBLinear(8, 8), torch.randn(2, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({}, ValueError, "in_features"),
        ({"in_features": 8}, ValueError, "out_features"),
        ({"base_layer": nn.Linear(8, 8), "in_features": 8}, ValueError, "in_features"),
        ({"base_layer": nn.Linear(8, 8), "dtype": torch.float64}, ValueError, "dtype"),
        ({"base_layer": nn.Embedding(8, 8)}, TypeError, "base_layer"),
        (
            {"in_features": 8, "out_features": 8, "bank": vblora.VectorBank(4, 8), "num_vectors": 4},
            ValueError,
            "num_vectors",
        ),
        (
            {"in_features": 8, "out_features": 12, "vector_length": 8},
            ValueError,
            "vector_length.*Allowed lengths: 1, 2, 4; .*pad=True",
        ),
        ({"in_features": 8, "out_features": 8, "num_vectors": 2, "topk": 3}, ValueError, "topk"),
        ({"in_features": 8, "out_features": 8, "r": 0}, ValueError, "`r`"),
        ({"in_features": 8, "out_features": 8, "dropout": 1.0}, ValueError, "dropout"),
        ({"in_features": 8, "out_features": 8, "dropout": "0.1"}, TypeError, "`dropout` is '0.1'"),
        ({"in_features": 8, "out_features": 8, "init": "nop"}, ValueError, "`init` is 'nop'; allowed"),
        ({"in_features": 8, "out_features": 8, "init_logits_std": -1.0}, ValueError, "`init_logits_std`"),
        ({"in_features": 8, "out_features": 8, "seed": 2**63}, ValueError, "`seed`"),
        ({"in_features": 8, "out_features": 8, "num_candidates": 2.5}, TypeError, "`num_candidates`"),
        ({"in_features": 8, "out_features": 8, "num_vectors": -1}, ValueError, "num_vectors"),
        ({"in_features": 8, "out_features": 8, "num_vectors": 0}, ValueError, "num_vectors"),
        ({"in_features": 8, "out_features": 8, "r": 2.5}, TypeError, "`r`"),
        ({"in_features": 8, "out_features": 8, "bank": torch.ones(4, 8)}, TypeError, "bank"),
        ({"in_features": 8, "out_features": 8, "bias": 3}, TypeError, "`bias` is 3"),
        ({"in_features": 8, "out_features": 8, "pad": "yes"}, TypeError, "`pad` is 'yes'"),
    ],
)
def test_refuses(arguments, error, name):
    with pytest.raises(error, match=name):
        vblora.VBLinear(**arguments)


@pytest.mark.parametrize(
    "arguments", [{"num_vectors": 0}, {"vector_length": 0}, {"init_bound": 0.0}, {"init_bound": float("nan")}]
)
def test_bank_refuses(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        vblora.VectorBank(**{"num_vectors": 4, "vector_length": 4} | arguments)


def test_bank_starts_within_its_bound():
    vectors = vblora.VectorBank(200, 50, init_bound=0.02).vectors
    assert vectors.abs().max() <= 0.02
    assert abs(vectors.std().item() - 0.02 / 3**0.5) < 5e-4


def test_a_layer_calls_no_more_than_it_must_unless_somebody_looks_on():
    layer = vblora.VBLinear(8, 6, r=2, num_vectors=8)
    x = torch.randn(3, 8)
    layer.set(enabled=False)
    calls = []
    layer.forward = lambda x: calls.append("own forward") or layer.base_layer(x)
    assert torch.equal(layer(x), layer.base_layer(x))
    del layer.forward
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook, layer.register_full_backward_hook):
        hook = register(lambda *_: calls.append("hook"))
        layer(x.requires_grad_()).sum().backward()
        hook.remove()
    assert calls == ["own forward", "hook", "hook", "hook"]

    def fail(*_):
        raise AssertionError("Module's way was taken")

    layer._call_impl = fail
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.set(enabled=True)
    layer(x).sum().backward()  # nor does one that adds an update
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(AssertionError, match="way was taken"):
            layer(x)
    finally:
        hook.remove()


def test_a_fused_kernel_does_not_leave_out_the_update():
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    encoder.linear1 = vblora.VBLinear(base_layer=encoder.linear1, num_vectors=16, vector_length=8)
    nn.init.normal_(encoder.linear1.adapter.bank.vectors)
    encoder.requires_grad_(False)
    x = torch.randn(2, 5, 16)
    updated = encoder(x)
    encoder.linear1.set(enabled=False)
    assert (updated - encoder(x)).abs().max() > 0.1
    encoder.linear1.set(enabled=True)
    encoder.train()
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    encoder.self_attn.dropout = 0.0
    torch.testing.assert_close(updated, encoder(x), rtol=1e-4, atol=1e-5)


def test_code_that_reads_the_weight_is_warned_of():
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    attention.out_proj = vblora.VBLinear(base_layer=attention.out_proj, num_vectors=16, vector_length=8)
    x = torch.randn(2, 5, 16)
    with pytest.warns(
        vblora.VBLoRAWarning, match=r"weight of a VBLinear was used without calling.*`layer.base_layer.weight`"
    ):
        attention(x, x, x)


def test_a_layer_that_could_not_be_made_does_not_disturb_an_optimizer():
    layer = vblora.VBLinear(16, 8, num_vectors=16, vector_length=8)
    with pytest.raises(ValueError, match="topk") as failed:  # whose traceback keeps what was made until then
        vblora.VBLinear(16, 8, num_vectors=16, vector_length=8, topk=17)
    optimizer = torch.optim.AdamW(vblora.parameter_groups(layer))
    layer(torch.randn(2, 16)).sum().backward()
    optimizer.step()
    assert failed.traceback
