"""Merging into files follows the base model's config and transformers' choice of files; tied tensors have one value."""

import json
import shutil

import peft
import pytest
import safetensors.torch
import torch

import vblora
from tests.small_models import bert, gpt2, llama
from vblora.checkpoint import folder
from vblora.checkpoint.merge_files import merge_into_shards

IDS = torch.arange(12).view(2, 6)
SIZES = {"num_vectors": 16, "vector_length": 8, "init_vector_bank_bound": 0.5}


def merged_into_files(base, adapter, out) -> dict[str, torch.Tensor]:
    merge_into_shards(folder.read(adapter)[0], base, out)
    return safetensors.torch.load_file(out / "model.safetensors")


@pytest.mark.parametrize("targets", ["all-linear", [r"encoder.layer.0.attention.self.query", "c_proj"]])
def test_layouts_are_told_apart_within_one_model(targets, tmp_path):
    from transformers import EncoderDecoderModel

    torch.manual_seed(0)
    decoder = gpt2(add_cross_attention=True)
    model = EncoderDecoderModel(encoder=bert().bert, decoder=decoder)
    model.save_pretrained(tmp_path / "base")
    vblora.inject(model, vblora.VBLoRAConfig(**SIZES, target_modules=targets, pad=True))
    vblora.save(model, tmp_path / "adapter", form="deploy")
    found = merged_into_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    vblora.eject(vblora.merge(model, release=True))
    wanted = model.state_dict()
    assert len(found) > 50
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], msg=name)


def test_square_weights_of_unknown_layout_are_refused(tmp_path):
    from transformers import EncoderDecoderModel

    model = EncoderDecoderModel(encoder=bert().bert, decoder=gpt2(add_cross_attention=True))
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").unlink()
    vblora.save(vblora.inject(model, vblora.VBLoRAConfig(**SIZES, target_modules="all-linear")), tmp_path / "adapter")
    with pytest.raises(ValueError, match="layers of both layouts"):
        merge_into_shards(folder.read(tmp_path / "adapter")[0], tmp_path / "base", tmp_path / "out")


def test_the_single_file_counts_where_an_index_lies_beside_it(tmp_path):
    torch.manual_seed(0)
    model = llama().eval()
    llama().save_pretrained(tmp_path / "stale", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "base")
    for file in (tmp_path / "stale").glob("model*"):
        shutil.copy(file, tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors.index.json").is_file()
    again = type(model).from_pretrained(tmp_path / "base").eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)  # so transformers does
    vblora.save(vblora.inject(model, vblora.VBLoRAConfig(**SIZES)), tmp_path / "adapter")
    merge_into_shards(folder.read(tmp_path / "adapter")[0], tmp_path / "base", tmp_path / "out")
    merged = type(model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits)


def test_what_a_config_leaves_out_is_its_classes_default(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    config.pop("tie_word_embeddings", None)
    path.write_text(json.dumps(config))
    vblora.inject(model, vblora.VBLoRAConfig(**SIZES, target_modules=["wte"], pad=True))
    vblora.save(model, tmp_path / "adapter")
    contents = folder.read(tmp_path / "adapter")[0]
    with pytest.raises(ValueError, match="is also that of the head"):
        merge_into_shards(contents, tmp_path / "base", tmp_path / "out")
    path.write_text('{"model_type": "gpt2"')
    with pytest.raises(ValueError, match=r"config.json"):
        merge_into_shards(contents, tmp_path / "base", tmp_path / "out")


def test_two_values_for_one_tied_tensor_are_refused(tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    theirs = peft.get_peft_model(llama(tie_word_embeddings=True), config)
    with torch.no_grad():
        theirs.base_model.model.lm_head.modules_to_save["default"].weight.normal_()
        theirs.base_model.model.model.embed_tokens.modules_to_save["default"].weight.normal_()
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`.*weight` and `.*weight` are one tied tensor in the model"):
        vblora.load(llama(tie_word_embeddings=True), tmp_path)
    model = vblora.load(llama(), tmp_path).eval()
    wanted = theirs.base_model.model.lm_head.modules_to_save["default"].weight
    assert torch.equal(model.lm_head.weight, wanted) and not torch.equal(model.model.embed_tokens.weight, wanted)
