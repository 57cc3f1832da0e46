"""``train_scales``: a trained scale for each sub-vector. The oracle is plain PyTorch, in float64."""

import copy

import peft
import pytest
import torch
from torch import Tensor

import vblora
from tests.small_models import Net, bert, relative_error
from vblora.adapters.vblora import VBLoRAAdapter
from vblora.checkpoint import folder, native
from vblora.checkpoint.save_load import contents_of
from vblora.files import read_tensors, write_tensors
from vblora.finetune.bank_use import bank_use
from vblora.model.lookup import attached_adapter
from vblora.serving import AdapterStore

IDS = torch.arange(3, 17).view(2, 7)
SIZES = {"r": 2, "num_vectors": 24, "vector_length": 8, "init_vector_bank_bound": 1.0, "seed": 0, "train_scales": True}


def trained(make=bert, freeze_bank=False, **choice):
    """A base model, and the same one with an adapter whose parameters all moved."""
    torch.manual_seed(0)
    base = make().eval()
    config = vblora.VBLoRAConfig(**SIZES | choice)
    model = vblora.inject(copy.deepcopy(base), config, freeze_bank=freeze_bank)
    moved(model.vblora.default)
    return base, model


def moved(adapter: VBLoRAAdapter) -> None:
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    adapter.invalidate()


def plain(adapter: VBLoRAAdapter, width: int, start: int) -> Tensor:
    """A factor of ``width`` columns, whose first sub-vector is row ``start``."""
    rows = adapter.r * -(-width // adapter.bank.vector_length)
    logits, columns = adapter.logits[start : start + rows].topk(adapter.topk)
    if adapter.candidates is not None:
        columns = adapter.candidates[start : start + rows].long().gather(1, columns)
    mixtures = (logits.softmax(1)[..., None] * adapter.bank.vectors[columns]).sum(1)
    return (adapter.scales[start : start + rows, None] * mixtures).view(adapter.r, -1)[:, :width]


@pytest.mark.parametrize(
    "choice", [{}, {"num_candidates": 6}, {"topk": 1}, {"topk": 3, "pad": True, "vector_length": 5}]
)
def test_each_sub_vector_is_multiplied_and_all_gradients_are_right(choice):
    torch.manual_seed(0)
    layer = vblora.VBLinear(16, 24, **{"num_vectors": 24, "vector_length": 8, "train_scales": True} | choice).double()
    adapter = layer.adapter
    moved(adapter)
    x = torch.randn(3, 16, dtype=torch.float64)
    grad = torch.randn(3, 24, dtype=torch.float64)
    layer(x).backward(grad)
    ours = [parameter.grad for parameter in adapter.parameters()]
    A = plain(adapter, 16, 0)
    B = plain(adapter, 24, adapter.r * -(-16 // adapter.bank.vector_length))
    expected = layer.base_layer(x) + x @ A.T @ B
    torch.testing.assert_close(layer(x), expected)
    theirs = torch.autograd.grad(expected, list(adapter.parameters()), grad)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_the_first_forward_is_the_base_models_and_b_learns_first():
    torch.manual_seed(0)
    base = bert().eval()
    model = vblora.inject(copy.deepcopy(base), vblora.VBLoRAConfig(**SIZES), freeze_bank=True)
    adapter = model.vblora.default
    assert torch.equal(model(IDS).logits, base(IDS).logits)
    optimizer = torch.optim.AdamW(vblora.parameter_groups(model))
    assert {group["name"]: group["lr"] for group in optimizer.param_groups}.keys() == {"logits", "scales"}
    losses = []
    for _ in range(4):
        loss = (model(IDS).logits - 1).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and adapter.scales.lt(0).any()
    adapter.reset_parameters()
    assert torch.equal(model(IDS).logits, base(IDS).logits)


def test_the_rate_of_scales():
    _, model = trained()
    groups = {group["name"]: group["lr"] for group in vblora.parameter_groups(model, lr_scales=0.03)}
    assert groups == {"bank": 3e-3, "logits": 0.5, "scales": 0.03}


@pytest.mark.parametrize(("bound", "rate"), [(0.05, 0.1), (0.1, 0.05), (0.02, 0.25), (1e-3, 1.0), (0.0, 0.1)])
def test_the_rate_of_scales_falls_with_the_size_of_the_bank(bound, rate):
    model = bert()
    bank = vblora.VectorBank(64, 8, 0.02)
    with torch.no_grad():
        bank.vectors.copy_(torch.linspace(-bound, bound, 64 * 8, dtype=torch.float64).view(64, 8))
    vblora.inject(model, vblora.VBLoRAConfig(**SIZES | {"num_vectors": 64, "vector_length": 8}), bank=bank)
    groups = {group["name"]: group["lr"] for group in vblora.parameter_groups(model)}
    assert groups["scales"] == pytest.approx(rate, rel=0.01)


def test_what_trains_and_what_is_stored():
    counts = [vblora.count_parameters(trained(train_scales=with_scales)[1]) for with_scales in (False, True)]
    assert counts[1].trainable == counts[0].trainable + trained()[1].vblora.default.num_subvectors
    assert counts[1].stored == counts[0].stored


@pytest.mark.parametrize("choice", [{"num_candidates": 6}, {"num_candidates": None, "scaling": 3.0}, {"seed": None}])
@pytest.mark.parametrize("form", ["resume", "deploy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_both_forms_bring_back_every_bit(form, choice, dtype, tmp_path):
    base, model = trained(**choice)
    vblora.save(model, tmp_path, form=form)
    loaded = vblora.load(copy.deepcopy(base), tmp_path)
    adapter = loaded.vblora.default
    assert (adapter.scales is None) == (form == "deploy")
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    if form == "deploy":
        assert adapter.weights.lt(0).any() and not torch.allclose(adapter.weights.sum(1), torch.ones(()))
    vblora.load(loaded, tmp_path)  # over itself


def test_a_file_without_scales_or_with_bad_ones_is_refused(tmp_path):
    base, model = trained()
    vblora.save(model, tmp_path)
    path = tmp_path / folder.TENSORS_FILE
    tensors, metadata = read_tensors(path)
    assert tensors["scales"].shape == (model.vblora.default.num_subvectors,) and native.METADATA in metadata
    for change, message in (
        (None, "lacks tensor `scales`"),
        (tensors["scales"][1:], "`scales` is"),
        (tensors["scales"].double(), "`scales` is torch.float64"),
        (tensors["scales"] / 0, "`scales` holds an infinite"),
    ):
        changed = {name: tensor.clone() for name, tensor in tensors.items() if name != "scales"}
        if change is not None:
            changed["scales"] = change
        write_tensors(path, changed, metadata)
        with pytest.raises(ValueError, match=message):
            vblora.load(copy.deepcopy(base), tmp_path)


def test_pefts_formats_are_refused_and_lora_holds_the_update(tmp_path):
    base, model = trained()
    for form in ("peft", "peft-topk"):
        with pytest.raises(ValueError, match=rf'"{form}".*`train_scales`.*form="lora"'):
            vblora.save(model, tmp_path / form, form=form)
    vblora.save(model, tmp_path / "lora", form="lora")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits)


def test_a_deploy_form_trains_again_with_its_k_vectors(tmp_path):
    base, model = trained(bert, topk=3)
    with torch.no_grad():
        model.vblora.default.scales[:5] = 0  # which leave nothing of their mixtures
    vblora.save(model, tmp_path, form="deploy")
    loaded = vblora.load(copy.deepcopy(base), tmp_path, train_kept=True, is_trainable=True)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    torch.testing.assert_close(loaded.vblora.default.scales, model.vblora.default.scales)
    loaded(IDS).logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in loaded.vblora.default.parameters())


def test_pictures_show_the_mixtures_without_their_factors():
    _, model = trained()
    with_scales = bank_use(contents_of(attached_adapter(model)))
    with torch.no_grad():
        model.vblora.default.scales.fill_(1.0)
    without = bank_use(contents_of(attached_adapter(model)))
    assert with_scales.counts == without.counts and with_scales.depths == without.depths
    assert with_scales.entropies == pytest.approx(without.entropies, abs=1e-5)


def test_switching_merging_and_rows_of_a_batch():
    _, model = trained()
    vblora.inject(model, vblora.VBLoRAConfig(**SIZES | {"seed": 1}), adapter_name="second")
    moved(model.vblora.second)
    expected = {}
    for name in ("default", "second"):
        vblora.set_adapter(model, name)
        expected[name] = model(IDS).logits
        vblora.merge(model)
        torch.testing.assert_close(model(IDS).logits, expected[name])
        vblora.unmerge(model)
        assert torch.equal(model(IDS).logits, expected[name])
    with torch.no_grad():
        mixed = model(IDS, adapter_names=["default", "second"]).logits
    torch.testing.assert_close(mixed, torch.stack([expected["default"][0], expected["second"][1]]))


@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize("exact", [True, False])
def test_a_store_serves_it(exact, topk, tmp_path):
    base, model = trained(make=Net, target_modules=["up", "down"], topk=topk)
    with torch.no_grad():
        model.vblora.default.scales[3:7] = 0  # whose weights are all 0
    vblora.save(model, tmp_path / "one", form="deploy")
    x = torch.randn(3, 16)
    expected = model(x)
    store = AdapterStore(base, tmp_path, target_modules=["up", "down"], max_rank=2, exact=exact)
    with torch.no_grad():
        torch.testing.assert_close(base(x, adapter_names=["one"] * 3), expected, rtol=1e-4, atol=1e-4)
    rows = model.vblora.default.num_subvectors
    indices = -(-rows * topk * 5 // 8)  # 24 vectors: 5 bits
    assert store.stats()["bytes"]["cold"] == indices + rows * (4 * topk if exact else 4 + 2 * (topk - 1))


@pytest.mark.parametrize("row", [[0.5, -0.5], [3.0, -1.0]])
def test_a_store_serves_weights_that_no_factor_of_a_softmax_gives(row, tmp_path):
    base, model = trained(make=Net, target_modules=["up", "down"])
    vblora.save(model, tmp_path / "one", form="deploy")
    tensors, metadata = read_tensors(tmp_path / "one" / folder.TENSORS_FILE)
    weights = tensors["weights"].clone()
    weights[0] = torch.tensor(row)
    write_tensors(tmp_path / "one" / folder.TENSORS_FILE, tensors | {"weights": weights}, metadata)
    x = torch.randn(3, 16)
    expected = vblora.load(copy.deepcopy(base), tmp_path / "one")(x)
    AdapterStore(base, tmp_path, target_modules=["up", "down"], max_rank=2)
    with torch.no_grad():
        torch.testing.assert_close(base(x, adapter_names=["one"] * 3), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_give_the_same_gradients(reentrant):
    gradients = []
    for how in (None, reentrant):
        _, net = trained(lambda how=how: Net(blocks=3, reentrant=how), target_modules=["up", "down"], num_candidates=6)
        for _ in range(2):
            x = torch.linspace(-1, 1, 5 * 16).view(5, 16).requires_grad_()
            net(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in net.vblora.parameters()])
    for ours, expected in zip(*gradients, strict=True):
        assert relative_error(ours, expected) < 1e-6


def test_compiled_in_one_graph():
    _, net = trained(Net, target_modules=["up", "down"], num_candidates=6)
    x = torch.randn(3, 16)
    net(x).square().sum().backward()
    eager = [parameter.grad.clone() for parameter in net.vblora.parameters()]
    net.zero_grad()
    torch.compile(net, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    for ours, expected in zip((parameter.grad for parameter in net.vblora.parameters()), eager, strict=True):
        torch.testing.assert_close(ours, expected)


def test_two_ways_to_start_at_nothing_are_refused():
    with pytest.raises(ValueError, match=r"`init`.*`train_scales`"):
        vblora.VBLoRAConfig(**SIZES, init="noop")
    with pytest.raises(ValueError, match=r"`init`.*`train_scales`"):
        vblora.VBLinear(16, 16, init="noop", train_scales=True)


def test_k_1_trains_without_a_warning(recwarn):
    _, model = trained(topk=1)
    model(IDS).logits.sum().backward()
    assert model.vblora.default.scales.grad.any() and not recwarn.list
