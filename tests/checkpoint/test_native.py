import copy
import json

import peft
import pytest
import safetensors.torch
import torch
import yaml

import vblora
from tests.small_models import bert, gpt2, llama
from vblora import files
from vblora.checkpoint import folder, native

SIZES = {"r": 2, "num_vectors": 16, "vector_length": 8, "init_vector_bank_bound": 1.0}
pytestmark = pytest.mark.usefixtures("device")


def ids() -> torch.Tensor:
    return 3 + torch.arange(14).view(2, 7)


def trained(make, **choice):
    choice = SIZES | choice
    torch.manual_seed(0)
    base = make().eval()
    model = vblora.inject(copy.deepcopy(base), vblora.VBLoRAConfig(**choice))
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
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {
        folder.CONFIG_FILE,
        folder.TENSORS_FILE,
        "README.md",
    }
    vblora.eject(loaded)
    assert torch.equal(loaded(ids()).logits, base(ids()).logits)


@pytest.mark.parametrize("form", ["resume", "deploy", "peft", "peft-topk", "lora"])
def test_the_default_device_has_no_part_in_it(form, tmp_path):
    """The model says where it is, and files are read on the CPU."""
    base, model = trained(bert, num_vectors=17, num_candidates=8, seed=3)
    expected = model(ids()).logits
    with torch.device("meta"):
        vblora.save(model, tmp_path, form=form)
        loaded = vblora.load(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(loaded(ids()).logits, expected)


@pytest.mark.parametrize("name", ["org/name", "C: #1", 'a "quoted" \\ path', "two\nlines", "caf\u00e9", "\udcff"])
def test_the_model_card_names_the_base_model(name, tmp_path):
    _, model = trained(bert)
    model.config._name_or_path = name
    vblora.save(model, tmp_path)
    _, header, _ = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(header) == {"library_name": "vblora", "base_model": name}


def test_a_model_card_tells_of_the_adapter_that_is_there(tmp_path):
    """What the user has added stays, and so does a card of somebody else's."""
    card = tmp_path / "README.md"
    for name, r in (("org/one", 2), ("org/two", 4)):
        _, model = trained(bert, r=r)
        model.config._name_or_path = name
        vblora.save(model, tmp_path, form="deploy" if r == 2 else "lora")
        if r == 2:
            card.write_text(card.read_text() + "\nMy notes: An adapter.\n")
    text = card.read_text()
    assert text.startswith('---\nlibrary_name: peft\nbase_model: "org/two"\n---\nAn adapter of org/two: LoRA, r=4, ')
    assert "PeftModel.from_pretrained(" in text and text.endswith("\nMy notes: An adapter.\n")
    assert "org/one" not in text and "vblora.load" not in text
    card.write_text("---\nlicense: mit\n---\nNobody's business.\n")
    vblora.save(model, tmp_path)
    assert card.read_text() == "---\nlicense: mit\n---\nNobody's business.\n"


def test_saves_what_trains_beside(tmp_path):
    base, model = trained(bert, modules_to_save=["classifier", "pooler"], bias="vblora_only")
    vblora.save(model, tmp_path)
    loaded = vblora.load(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    ours, theirs = ([n for n, p in m.named_parameters() if p.requires_grad] for m in (model, loaded))
    assert ours == theirs


def test_a_merged_model_saves_the_same(tmp_path):
    _, model = trained(bert, bias="all")
    vblora.save(model, tmp_path / "before")
    vblora.merge(model)
    vblora.save(model, tmp_path / "after")
    configs = [(tmp_path / name / folder.CONFIG_FILE).read_bytes() for name in ("before", "after")]
    tensors = [safetensors.torch.load_file(tmp_path / name / folder.TENSORS_FILE) for name in ("before", "after")]
    assert configs[0] == configs[1]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_loads_over_an_adapter_of_the_same_config(tmp_path):
    base, model = trained(bert)
    vblora.save(model, tmp_path)
    other = vblora.inject(copy.deepcopy(base), vblora.VBLoRAConfig(**SIZES))
    with torch.no_grad():
        other(ids())  # keeps factors, which loading must forget
    vblora.load(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other(ids()).logits, model(ids()).logits)
    different = vblora.inject(copy.deepcopy(base), vblora.VBLoRAConfig(**SIZES | {"r": 1}))
    with pytest.raises(ValueError, match="another config"):
        vblora.load(different, tmp_path)


def test_tied_tensors_are_saved(tmp_path):
    choice = {"modules_to_save": ["lm_head", "embed_tokens"]}
    base, model = trained(lambda: llama(tie_word_embeddings=True), **choice)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    vblora.save(model, tmp_path)
    loaded = vblora.load(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
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
    model.vblora.default.bank.requires_grad_(False)
    vblora.load(model, tmp_path)
    assert model.vblora.default.logits.requires_grad and not model.vblora.default.bank.vectors.requires_grad
    state = torch.get_rng_state()
    vblora.load(copy.deepcopy(base), tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_config_is_in_pefts_names(tmp_path):
    vblora.save(trained(bert)[1], tmp_path)
    config = json.loads((tmp_path / folder.CONFIG_FILE).read_text())
    assert config["format"] == "vblora" and config["num_vectors"] == 16 and config["r"] == 2


def test_peft_names_the_folder_as_none_of_its_own(tmp_path):
    vblora.save(trained(bert)[1], tmp_path)
    with pytest.raises(KeyError, match=r"load with vblora\.load"):
        peft.PeftModel.from_pretrained(bert(), tmp_path)


def change_tensors(directory, change):
    path = directory / folder.TENSORS_FILE
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata)


def change_description(directory, **values):
    path = directory / folder.TENSORS_FILE
    with safetensors.safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()[native.METADATA])
    config = {name: values.pop(name) for name in list(values) if name not in description}
    description |= values
    description["config"] |= config
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {native.METADATA: json.dumps(description)})


def tensors(**changes):
    return lambda d: change_tensors(d, lambda t: t.update({name: change(t[name]) for name, change in changes.items()}))


DAMAGES = {
    "no tensors": (lambda d: (d / folder.TENSORS_FILE).unlink(), FileNotFoundError, "adapter_model.safetensors"),
    "cut short": (
        lambda d: (d / folder.TENSORS_FILE).write_bytes((d / folder.TENSORS_FILE).read_bytes()[:-9]),
        ValueError,
        "damaged",
    ),
    "empty": (lambda d: (d / folder.TENSORS_FILE).write_bytes(b""), ValueError, "damaged"),
    "of somebody else": (
        lambda d: safetensors.torch.save_file({"weight": torch.ones(1)}, d / folder.TENSORS_FILE),
        ValueError,
        "another program has written it",
    ),
    "another version": (
        lambda d: change_description(d, version=2),
        ValueError,
        "version 2; .* A newer vblora wrote it",
    ),
    "another form": (lambda d: change_description(d, form="x"), ValueError, "form 'x'"),
    "unknown field": (lambda d: change_description(d, scale=3), ValueError, "`scale`"),
    "value out of range": (lambda d: change_description(d, r=0), ValueError, "`r` is 0"),
    "no bank": (
        lambda d: change_tensors(d, lambda t: t.pop("bank.vectors")),
        ValueError,
        "lacks its vector bank, tensor `bank.vectors`",
    ),
    "extra tensor": (
        lambda d: change_tensors(d, lambda t: t.update(x=torch.ones(1))),
        ValueError,
        "unknown tensor `x`",
    ),
    "NaN": (tensors(**{"bank.vectors": lambda t: t.fill_(float("nan"))}), ValueError, "NaN"),
    "a bank of integers": (tensors(**{"bank.vectors": lambda t: t.int()}), ValueError, "int32"),
    "a bank without scales": (tensors(**{"bank.vectors": lambda t: t.to(torch.int8)}), ValueError, "scales"),
    "fewer layers": (
        lambda d: change_description(d, target_modules=["key"]),
        ValueError,
        "key. is a target in the model, but not in the file",
    ),
    "other sizes": (lambda d: change_description(d, vector_length=4), ValueError, "is \\("),
    "no layers": (lambda d: change_description(d, targets=[]), ValueError, "no layer"),
    "a layer of no width": (lambda d: change_description(d, targets=[["x", 0, 8]]), ValueError, "0 -> 8"),
    "huge layers": (lambda d: change_description(d, targets=[["x", 8 << 40, 8]]), ValueError, "integers of|must be"),
    "no description": (lambda d: change_description(d, targets=7), ValueError, "description"),
}
RESUME = {
    "lengths missing": (lambda d: change_tensors(d, lambda t: t.pop("logits.lengths")), ValueError, "logits.lengths"),
    "lengths wrong": (tensors(**{"logits.lengths": lambda t: (t - 1).relu()}), ValueError, "values are"),
    "lengths too large": (tensors(**{"logits.lengths": lambda t: t + 1000}), ValueError, "length of"),
    "lengths negative": (tensors(**{"logits.lengths": lambda t: t - 1000}), ValueError, "length of"),
    "values too few": (tensors(**{"logits.values": lambda t: t[1:].clone()}), ValueError, "values"),
    "values of another type": (tensors(**{"logits.values": lambda t: t.double()}), ValueError, "float64"),
    "logits NaN": (tensors(**{"logits.values": lambda t: t * float("nan")}), ValueError, "`logits` holds NaN"),
    "logits -inf": (tensors(**{"logits.values": lambda t: t.fill_(-torch.inf)}), ValueError, "nothing but -inf"),
    "exhausted": (tensors(exhausted=lambda t: t[1:].clone()), ValueError, "integers of 1 bits"),
}
DEPLOY = {
    "weights missing": (lambda d: change_tensors(d, lambda t: t.pop("weights")), ValueError, "lacks tensor `weights`"),
    "weights of another shape": (tensors(weights=lambda t: t[1:].clone()), ValueError, "`weights` is"),
    "weights infinite": (tensors(weights=lambda t: t / 0), ValueError, "infinite"),
    "weights integer": (tensors(weights=lambda t: t.int()), ValueError, "floating-point"),
    "indices too few": (tensors(indices=lambda t: t[1:].clone()), ValueError, "integers of 5 bits"),
    "indices out of range": (tensors(indices=lambda t: t.fill_(255)), ValueError, "`indices` holds 31"),
}
ALL_DAMAGES = [
    *(("resume", name) for name in DAMAGES | RESUME),
    *(("deploy", name) for name in DAMAGES | DEPLOY),
]


@pytest.mark.parametrize(("form", "damage"), ALL_DAMAGES)
def test_a_bad_folder_is_refused_and_changes_nothing(form, damage, tmp_path):
    harm, error, message = (DAMAGES | RESUME | DEPLOY)[damage]
    base, model = trained(bert, num_vectors=17, num_candidates=8)
    vblora.save(model, tmp_path, form=form)
    harm(tmp_path)
    target = copy.deepcopy(base)
    with pytest.raises(error, match=message):
        vblora.load(target, tmp_path)
    assert [name for name, _ in target.named_modules()] == [name for name, _ in base.named_modules()]
    assert all(p.requires_grad for p in target.parameters())
    assert torch.equal(target(ids()).logits, base(ids()).logits)


def test_a_save_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    _, model = trained(bert)
    vblora.save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        model.vblora.default.logits.add_(1)

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        vblora.save(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
