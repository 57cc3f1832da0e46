"""How an adapter starts: with ``init="noop"``, its first update is exactly 0. And the scaling of its update."""

import copy

import peft
import pytest
import torch

import vblora
from tests.small_models import bert, gpt2, llama
from vblora.adapters.vblora_rows import draw_rows

IDS = torch.randint(3, 50, (2, 7))
SIZES = {"r": 2, "num_vectors": 24, "vector_length": 8, "init_vector_bank_bound": 1.0, "seed": 0}


def injected(make=bert, **choice):
    torch.manual_seed(0)
    base = make().eval()
    return base, vblora.inject(copy.deepcopy(base), vblora.VBLoRAConfig(**SIZES | choice))


@pytest.mark.parametrize("make", [bert, llama, gpt2])
@pytest.mark.parametrize("num_candidates", [None, 8])
@pytest.mark.parametrize("choice", [{}, {"pad": True, "vector_length": 20}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_noop_start_is_the_base_model_and_trains(make, num_candidates, choice, dtype):
    base, model = injected(make, init="noop", num_candidates=num_candidates, **choice)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = model(IDS).logits
        assert torch.equal(output, base(IDS).logits)
    output.float().square().sum().backward()
    adapter = model.vblora.default
    assert adapter.bank.vectors.grad.abs().sum() > 0 and adapter.logits.grad.abs().sum() > 0
    torch.optim.SGD(vblora.parameter_groups(model, lr_bank=0.1, lr_logits=0.1)).step()
    assert not torch.equal(model(IDS).logits, base(IDS).logits)


def test_b_starts_with_a_pair_and_a_as_ever():
    noop = draw_rows([3, 2, 4, 5], 24, None, seed=1, std=0.1, init="noop")
    paper = draw_rows([3, 2, 4, 5], 24, None, seed=1, std=0.1)
    of_b = torch.tensor([0] * 3 + [1] * 2 + [0] * 4 + [1] * 5).bool()
    assert torch.equal(noop.logits[~of_b], paper.logits[~of_b])
    assert torch.equal(noop.logits[of_b][:, ::2], noop.logits[of_b][:, 1::2])
    few = draw_rows([3, 2, 4, 5], 24, 8, seed=1, std=0.1, init="noop")
    wanted = noop.logits.sort(dim=1, descending=True, stable=True)  # ties go to the lowest vector
    assert torch.equal(few.logits, wanted.values[:, :8])
    assert torch.equal(few.candidates.long(), wanted.indices[:, :8])


def test_a_noop_start_with_candidates_is_dense_training():
    losses = {}
    for num_candidates in (None, 12):
        _, model = injected(init="noop", num_candidates=num_candidates)
        optimizer = torch.optim.AdamW(vblora.parameter_groups(model))
        losses[num_candidates] = []
        for _ in range(5):  # four updates touch at most 2 + 4 * 2 of the 12
            loss = model(IDS).logits.square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[num_candidates].append(loss.item())
        assert vblora.stats(model).exhausted == 0
    assert losses[None] == losses[12]
    assert losses[12][-1] < losses[12][0]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"topk": 3}, "`topk`=2.*not 3"),
        ({"num_candidates": 7}, "an even `num_candidates`, not 7"),
        ({"num_vectors": 23}, "`num_vectors` is 23, but must be even"),
    ],
)
def test_what_cannot_start_as_nothing_is_refused(choice, message):
    base = bert()
    with pytest.raises(ValueError, match=message):
        vblora.inject(base, vblora.VBLoRAConfig(**SIZES | {"init": "noop"} | choice))
    assert not hasattr(base, "vblora")


def test_a_noop_start_over_a_shared_bank_needs_pairs():
    config = vblora.VBLoRAConfig(**SIZES, init="noop")
    with pytest.raises(ValueError, match="a bank of pairs"):
        vblora.inject(bert(), config, bank=vblora.VectorBank(24, 8))
    vblora.inject(bert(), config, bank=vblora.VectorBank(24, 8, pairs=True))


def test_one_layer_starts_as_nothing_too():
    for layer in (vblora.VBLinear(16, 24, init="noop"), vblora.VBLinear(16, 25, init="noop", pad=True)):
        x = torch.randn(3, 16)
        assert torch.equal(layer(x), layer.base_layer(x))
        layer(x).square().sum().backward()
        assert layer.adapter.logits.grad.any() and layer.adapter.bank.vectors.grad.any()


@pytest.mark.parametrize(
    "choice", [{"scaling": 4.0}, {"scaling": 0.3, "init": "noop", "num_candidates": 8, "pad": True}]
)
@pytest.mark.parametrize("form", ["resume", "deploy", "peft", "peft-topk", "lora"])
def test_scaling_and_start_survive_every_form(choice, form, tmp_path):
    base, model = injected(**choice)
    with torch.no_grad():
        for parameter in model.vblora.default.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    vblora.save(model, tmp_path, form=form)
    expected = model(IDS).logits
    if form == "lora":
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        torch.testing.assert_close(loaded(IDS).logits, expected)
        return
    loaded = vblora.load(copy.deepcopy(base), tmp_path)
    if form in ("resume", "deploy"):
        assert torch.equal(loaded(IDS).logits, expected)
        assert loaded.vblora.default.scaling == choice["scaling"]
        vblora.save(loaded, tmp_path / "again", form=form)
    else:
        torch.testing.assert_close(loaded(IDS).logits, expected)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        torch.testing.assert_close(theirs(IDS).logits, expected)


def test_scaling_is_a_factor_of_the_update():
    outputs = []
    for scaling in (1.0, 4.0):
        torch.manual_seed(0)
        layer = vblora.VBLinear(16, 24, scaling=scaling, seed=1)
        x = torch.ones(2, 16)
        outputs.append(layer(x) - layer.base_layer(x))
    torch.testing.assert_close(outputs[1], 4 * outputs[0])
    with pytest.raises(ValueError, match="`scaling` is -1"):
        vblora.VBLinear(16, 24, scaling=-1)


def test_a_noop_adapter_made_on_the_meta_device():
    with torch.device("meta"):
        layer = vblora.VBLinear(16, 16, vector_length=8, init="noop", seed=3, num_vectors=24, num_candidates=8)
    layer.to_empty(device="cpu")
    layer.adapter.bank.reset_parameters()
    layer.adapter.reset_parameters()
    torch.nn.init.normal_(layer.base_layer.weight), torch.nn.init.zeros_(layer.base_layer.bias)
    x = torch.randn(2, 16)
    assert torch.equal(layer(x), layer.base_layer(x))
