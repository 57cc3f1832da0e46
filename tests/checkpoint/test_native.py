import copy
import json

import pytest
import safetensors.torch
import torch

import vblora
from tests.small_models import bert, gpt2, llama
from vblora.checkpoint import native

SIZES = {"r": 2, "num_vectors": 16, "vector_length": 8, "init_vector_bank_bound": 1.0}
IDS = torch.randint(3, 50, (2, 7))


def trained(make, **choice):
    torch.manual_seed(0)
    base = make().eval()
    model = vblora.inject(copy.deepcopy(base), vblora.VBLoRAConfig(**SIZES, **choice))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return base, model


@pytest.mark.parametrize("make", [bert, llama, gpt2])
@pytest.mark.parametrize("choice", [{}, {"target_modules": "all-linear", "bias": "all"}])
def test_round_trip(make, choice, tmp_path):
    base, model = trained(make, **choice)
    vblora.save(model, tmp_path / "a" / "b")
    loaded = vblora.load(copy.deepcopy(base), tmp_path / "a" / "b")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {native.CONFIG_FILE, native.TENSORS_FILE}
    vblora.eject(loaded)
    assert torch.equal(loaded(IDS).logits, base(IDS).logits)


def test_saves_what_trains_beside(tmp_path):
    base, model = trained(bert, modules_to_save=["classifier", "pooler"], bias="vblora_only")
    vblora.save(model, tmp_path)
    loaded = vblora.load(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    ours, theirs = ([n for n, p in m.named_parameters() if p.requires_grad] for m in (model, loaded))
    assert ours == theirs


def test_a_merged_model_saves_the_same(tmp_path):
    _, model = trained(bert, bias="all")
    vblora.save(model, tmp_path / "before")
    vblora.merge(model)
    vblora.save(model, tmp_path / "after")
    configs = [(tmp_path / name / native.CONFIG_FILE).read_bytes() for name in ("before", "after")]
    tensors = [safetensors.torch.load_file(tmp_path / name / native.TENSORS_FILE) for name in ("before", "after")]
    assert configs[0] == configs[1]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_loads_over_an_adapter_of_the_same_config(tmp_path):
    base, model = trained(bert)
    vblora.save(model, tmp_path)
    other = vblora.inject(copy.deepcopy(base), vblora.VBLoRAConfig(**SIZES))
    with torch.no_grad():
        other(IDS)  # keeps factors, which loading must forget
    vblora.load(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, model(IDS).logits)
    different = vblora.inject(copy.deepcopy(base), vblora.VBLoRAConfig(**SIZES | {"r": 1}))
    with pytest.raises(ValueError, match="another config"):
        vblora.load(different, tmp_path)


def test_tied_tensors_are_saved(tmp_path):
    choice = {"modules_to_save": ["lm_head", "embed_tokens"]}
    base, model = trained(lambda: llama(tie_word_embeddings=True), **choice)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    vblora.save(model, tmp_path)
    loaded = vblora.load(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_loading_into_a_merged_or_a_meta_model_is_refused(tmp_path):
    base, model = trained(bert)
    vblora.save(model, tmp_path)
    vblora.merge(model)
    with pytest.raises(ValueError, match="unmerge"):
        vblora.load(model, tmp_path)
    with pytest.raises(ValueError, match="meta"):
        vblora.load(copy.deepcopy(base).to("meta"), tmp_path)


def test_loading_leaves_an_adapters_flags_and_the_random_state_alone(tmp_path):
    base, model = trained(bert)
    vblora.save(model, tmp_path)
    model.vblora.bank.requires_grad_(False)
    vblora.load(model, tmp_path)
    assert model.vblora.logits.requires_grad and not model.vblora.bank.vectors.requires_grad
    state = torch.get_rng_state()
    vblora.load(copy.deepcopy(base), tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_config_is_in_pefts_names(tmp_path):
    vblora.save(trained(bert)[1], tmp_path)
    config = json.loads((tmp_path / native.CONFIG_FILE).read_text())
    assert config["peft_type"] == "VBLORA" and config["num_vectors"] == 16 and config["r"] == 2


def change_tensors(folder, change):
    path = folder / native.TENSORS_FILE
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata)


def change_config(folder, **values):
    path = folder / native.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGES = {
    "no tensors": (lambda d: (d / native.TENSORS_FILE).unlink(), FileNotFoundError, "adapter_model.safetensors"),
    "no config": (lambda d: (d / native.CONFIG_FILE).unlink(), FileNotFoundError, "adapter_config.json"),
    "cut short": (
        lambda d: (d / native.TENSORS_FILE).write_bytes((d / native.TENSORS_FILE).read_bytes()[:-9]),
        ValueError,
        "damaged",
    ),
    "empty": (lambda d: (d / native.TENSORS_FILE).write_bytes(b""), ValueError, "damaged"),
    "no JSON": (lambda d: (d / native.CONFIG_FILE).write_text("{"), ValueError, "no JSON"),
    "another method": (lambda d: change_config(d, peft_type="LORA"), ValueError, "VBLORA"),
    "unknown field": (lambda d: change_config(d, scale=3), ValueError, "`scale`"),
    "value out of range": (lambda d: change_config(d, r=0), ValueError, "`r` is 0"),
    "no bank": (
        lambda d: change_tensors(d, lambda t: t.pop("bank.vectors")),
        ValueError,
        "lacks tensor `bank.vectors`",
    ),
    "extra tensor": (
        lambda d: change_tensors(d, lambda t: t.update(x=torch.ones(1))),
        ValueError,
        "unknown tensor `x`",
    ),
    "wrong shape": (
        lambda d: change_tensors(d, lambda t: t.update(logits=t["logits"][1:].clone())),
        ValueError,
        "`logits` is",
    ),
    "wrong dtype": (lambda d: change_tensors(d, lambda t: t.update(logits=t["logits"].int())), ValueError, "int32"),
    "NaN": (lambda d: change_tensors(d, lambda t: t["bank.vectors"].fill_(float("nan"))), ValueError, "NaN"),
    "fewer layers": (lambda d: change_config(d, target_modules=["key"]), ValueError, "lists 4 layers, the model has 2"),
    "other layers": (lambda d: change_config(d, target_modules=["query", "key"]), ValueError, "value.*key"),
    "other sizes": (lambda d: change_config(d, vector_length=4), ValueError, "is \\("),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_folder_is_refused_and_changes_nothing(damage, tmp_path):
    harm, error, message = DAMAGES[damage]
    base, model = trained(bert)
    vblora.save(model, tmp_path)
    harm(tmp_path)
    target = copy.deepcopy(base)
    with pytest.raises(error, match=message):
        vblora.load(target, tmp_path)
    assert [name for name, _ in target.named_modules()] == [name for name, _ in base.named_modules()]
    assert all(p.requires_grad for p in target.parameters())
    assert torch.equal(target(IDS).logits, base(IDS).logits)


def test_a_save_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    _, model = trained(bert)
    vblora.save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        model.vblora.logits.add_(1)

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(native.os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        vblora.save(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
