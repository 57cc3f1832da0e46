"""PEFT's files that hold tensors of the base model: embeddings that it adapts, or whose vocabulary was resized."""

import copy
import warnings

import peft
import pytest
import safetensors.torch
import torch
from transformers import LlamaForCausalLM

import vblora
from tests.small_models import bert, gpt2, llama, relative_error
from vblora.cli import main
from vblora.serving import AdapterStore

IDS = torch.arange(12).view(2, 6)
ROUNDING = 1e-6
CONFIGS = {
    "lora": lambda **fields: peft.LoraConfig(r=2, lora_alpha=16, **fields),
    "vblora": lambda **fields: peft.VBLoRAConfig(
        r=2, num_vectors=16, vector_length=2, init_vector_bank_bound=0.5, **fields
    ),
    "vera": lambda **fields: peft.VeraConfig(r=4, d_initial=1.0, **fields),
}


def base_model(make=llama, **choice):
    torch.manual_seed(0)
    return make(**choice).eval()


def shaken(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.3
    return model


@torch.no_grad()
def outputs(model):
    return model.eval()(input_ids=IDS).logits


def other_embeddings(base):
    """A model whose embeddings are others, as new rows are after a resize."""
    other = copy.deepcopy(base)
    with torch.no_grad():
        for layer in (other.get_input_embeddings(), other.get_output_embeddings()):
            layer.weight[-3:] = 1.5 * torch.randn(layer.weight[-3:].shape)
    return other


def written(base, folder, config, **choice):
    """The outputs of a model of PEFT's whose adapter is in ``folder``."""
    model = shaken(peft.get_peft_model(copy.deepcopy(base), config))
    model.save_pretrained(folder, **choice)
    return outputs(model)


def names_in(folder):
    return set(safetensors.torch.load_file(folder / "adapter_model.safetensors"))


TARGETS = [
    ("lora", ["q_proj", "lm_head"]),
    ("lora", ["q_proj", "embed_tokens"]),
    ("lora", ["embed_tokens", "lm_head"]),
    ("vblora", ["q_proj", "lm_head"]),
    ("vera", ["lm_head"]),
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("method", "targets"), TARGETS)
def test_outputs_are_those_of_pefts_reload(method, targets, tied, tmp_path):
    base = base_model(tie_word_embeddings=tied)
    expected = written(base, tmp_path, CONFIGS[method](target_modules=targets))
    assert any(".base_layer.weight" in name for name in names_in(tmp_path))
    loaded = vblora.load(copy.deepcopy(base), tmp_path)
    assert relative_error(outputs(loaded), expected) < ROUNDING
    assert not loaded._vblora_adapted_model.adapters["default"].extra  # the model has them
    other = other_embeddings(base)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(other), tmp_path)
    loaded = vblora.load(copy.deepcopy(other), tmp_path)
    assert relative_error(outputs(loaded), outputs(theirs)) < ROUNDING
    if tied or len(targets) == 2:
        assert relative_error(outputs(loaded), outputs(other)) > 0.1
    vblora.merge(loaded)
    assert relative_error(outputs(loaded), outputs(theirs)) < ROUNDING
    with vblora.disabled(loaded):
        assert torch.equal(outputs(loaded), outputs(other))
    assert relative_error(outputs(loaded), outputs(theirs)) < ROUNDING
    vblora.unmerge(loaded)
    assert relative_error(outputs(loaded), outputs(theirs)) < ROUNDING
    merged = vblora.eject(vblora.merge(copy.deepcopy(loaded), release=True))
    assert relative_error(outputs(merged), outputs(theirs)) < ROUNDING
    assert torch.equal(outputs(vblora.eject(loaded)), outputs(other))


@pytest.mark.parametrize("form", ["resume", "deploy", "peft", "lora"])
def test_what_was_brought_is_saved_and_does_not_train(form, tmp_path):
    base = base_model(tie_word_embeddings=True)
    expected = written(base, tmp_path / "peft", CONFIGS["lora"](target_modules=["q_proj", "lm_head"]))
    other = other_embeddings(base)
    loaded = vblora.load(copy.deepcopy(other), tmp_path / "peft", is_trainable=True)
    trained = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert trained == ["vblora.default.factors"]
    vblora.merge(loaded)  # what is saved is without the update
    vblora.save(loaded, tmp_path / "ours", form=form)
    again = vblora.load(copy.deepcopy(other), tmp_path / "ours")
    assert relative_error(outputs(again), expected) < ROUNDING
    if form in ("peft", "lora"):
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(other), tmp_path / "ours")
        assert relative_error(outputs(theirs), expected) < ROUNDING
        assert "base_model.model.lm_head.base_layer.weight" in names_in(tmp_path / "ours")
    vblora.load(again, tmp_path / "peft")  # over itself
    assert relative_error(outputs(again), expected) < ROUNDING
    plain = vblora.inject(copy.deepcopy(other), CONFIGS["lora"](target_modules=["q_proj", "lm_head"]))
    vblora.load(plain, tmp_path / "peft")  # over an adapter that has brought nothing yet
    assert relative_error(outputs(plain), expected) < ROUNDING
    assert torch.equal(outputs(vblora.eject(plain)), outputs(other))
    vblora.merge(vblora.unmerge(loaded), release=True)
    with pytest.raises(ValueError, match=r"weight` was merged into with release=True, which freed what the file"):
        vblora.save(loaded, tmp_path / "released")


def test_adapters_bring_their_own_while_they_are_active(tmp_path):
    base = base_model()
    first = written(base, tmp_path / "first", CONFIGS["lora"](target_modules=["lm_head"]))
    other = other_embeddings(base)
    second = written(other, tmp_path / "second", CONFIGS["lora"](target_modules=["lm_head", "embed_tokens"]))
    model = vblora.load(copy.deepcopy(base), tmp_path / "second")
    vblora.load(model, tmp_path / "first", adapter_name="first")
    assert not model._vblora_adapted_model.adapters["first"].extra
    assert relative_error(outputs(model), second) < ROUNDING
    vblora.set_adapter(model, "first")
    assert relative_error(outputs(model), first) < ROUNDING


@pytest.mark.parametrize(("make", "name"), [(bert, "bert.embeddings.word_embeddings"), (gpt2, "transformer.wte")])
def test_a_resized_vocabulary_comes_along_in_any_model(make, name, tmp_path):
    targets = ["query", "value"] if make is bert else ["c_attn"]
    base = base_model(make)
    base.resize_token_embeddings(53)
    expected = written(base, tmp_path, CONFIGS["vblora"](target_modules=targets), save_embedding_layers=True)
    assert f"base_model.model.{name}.weight" in names_in(tmp_path)
    other = base_model(make)
    with pytest.raises(ValueError, match=r"must be \(50, 32\)\. If .* call model\.resize_token_embeddings\(53\) first"):
        vblora.load(other, tmp_path)
    torch.manual_seed(1)
    other.resize_token_embeddings(53)
    assert not torch.equal(other.get_submodule(name).weight, base.get_submodule(name).weight)
    loaded = vblora.load(other, tmp_path, is_trainable=True)
    assert relative_error(outputs(loaded), expected) < ROUNDING
    assert not loaded.get_submodule(name).weight.requires_grad


def test_a_folder_without_a_config_says_nothing_of_a_vocabulary(tmp_path):
    """As that of a GGUF file: transformers reads the class's defaults from it."""
    model = base_model()
    model.config._name_or_path = str(tmp_path)
    assert type(model.config).from_pretrained(tmp_path).vocab_size != model.config.vocab_size
    vblora.inject(model, CONFIGS["vblora"](target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", vblora.VBLoRAWarning)
        vblora.save(model, tmp_path / "adapter")
    assert not [name for name in names_in(tmp_path / "adapter") if "embed_tokens" in name]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", ["resume", "lora"])
def test_we_save_a_resized_vocabulary_too(form, tied, tmp_path):
    base_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")

    def resized(seed):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(seed)
        model.resize_token_embeddings(54)
        return model

    saved = [] if tied else ["lm_head"]
    config = CONFIGS["vblora"](target_modules=["q_proj", "embed_tokens"], modules_to_save=saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error", vblora.VBLoRAWarning)
        model = shaken(vblora.inject(resized(1), config))
        # That the new rows do not train is no loss.
        vblora.inject(resized(1), CONFIGS["lora"](target_modules=["q_proj"]))
    vblora.merge(model)
    with pytest.warns(vblora.VBLoRAWarning, match=r"the vocabulary was resized .* holds `model\.embed_tokens\.weight`"):
        vblora.save(model, tmp_path / "adapter", form=form)
    vblora.unmerge(model)
    loaded = vblora.load(resized(2), tmp_path / "adapter")
    assert relative_error(outputs(loaded), outputs(model)) < ROUNDING
    assert not torch.equal(outputs(resized(2)), outputs(resized(1)))
    vblora.save(model, tmp_path / "small", form=form, save_embedding_layers=False)
    assert not any(name.endswith("embed_tokens.base_layer.weight") for name in names_in(tmp_path / "small"))


def test_which_embeddings_are_saved_is_checked(tmp_path):
    model = vblora.inject(torch.nn.Sequential(torch.nn.Linear(8, 8)), vblora.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="`save_embedding_layers` is True, but the model has no"):
        vblora.save(model, tmp_path, save_embedding_layers=True)
    with pytest.raises(ValueError, match="`save_embedding_layers` is 'yes'; allowed are True, False"):
        vblora.save(model, tmp_path, save_embedding_layers="yes")


def test_merging_into_files(tmp_path):
    base = base_model()
    other_embeddings(base).save_pretrained(tmp_path / "base")
    expected = written(base, tmp_path / "adapter", CONFIGS["lora"](target_modules=["lm_head", "embed_tokens"]))
    arguments = [str(tmp_path / name) for name in ("base", "adapter", "merged")]
    assert main(["merge", *arguments]) == 0
    merged = type(base).from_pretrained(tmp_path / "merged")
    assert relative_error(outputs(merged), expected) < ROUNDING
    assert main(["convert", str(tmp_path / "adapter"), str(tmp_path / "ours"), "--form", "deploy"]) == 0
    loaded = vblora.load(type(base).from_pretrained(tmp_path / "base"), tmp_path / "ours")
    assert relative_error(outputs(loaded), expected) < ROUNDING


def test_a_store_takes_it_where_the_model_has_the_same(tmp_path):
    base = base_model()
    expected = written(base, tmp_path / "a", CONFIGS["lora"](target_modules=["q_proj", "lm_head"]))
    targets = ["q_proj", "lm_head"]
    model = copy.deepcopy(base)
    AdapterStore(model, tmp_path, target_modules=targets)
    with torch.no_grad():
        assert relative_error(model(IDS, adapter_names=["a", "a"]).logits, expected) < 1e-5
    other = other_embeddings(base)
    AdapterStore(other, tmp_path, target_modules=targets)
    with torch.no_grad(), pytest.raises(ValueError, match=r"holds another `lm_head\.weight` than the model's"):
        other(IDS, adapter_names=["a", "a"])


def test_trainable_tokens_are_refused_by_name(tmp_path):
    base = base_model()
    written(
        base,
        tmp_path,
        CONFIGS["lora"](target_modules=["q_proj"], trainable_token_indices=[1]),
        save_embedding_layers=False,
    )
    with pytest.raises(ValueError, match=r"`trainable_token_indices` = \[1\], which vblora does not support"):
        vblora.load(copy.deepcopy(base), tmp_path)


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    base = base_model(tie_word_embeddings=True)
    written(base, tmp_path, CONFIGS["lora"](target_modules=["lm_head", "embed_tokens"]))
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    head = "base_model.model.lm_head.base_layer.weight"
    for change, message in [
        ({head: tensors[head] + 1}, r"`(lm_head|model.embed_tokens).weight` and `.*` are one tied tensor in the model"),
        ({head: tensors[head].int()}, r"`lm_head\.weight` is torch\.int32"),
        ({"base_model.model.no.weight": tensors[head].clone()}, r"unknown tensor `no\.weight`"),
        ({"base_model.model.model.norm.weight": torch.ones(32)}, r"unknown tensor `model\.norm\.weight`"),
    ]:
        safetensors.torch.save_file(tensors | change, path)
        target = copy.deepcopy(base)
        with pytest.raises(ValueError, match=message):
            vblora.load(target, tmp_path)
        assert torch.equal(outputs(target), outputs(base)) and not hasattr(target, "vblora")
