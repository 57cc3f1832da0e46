"""What `vblora.load` and `vblora.save` say of a wrong path and of another base model."""

from pathlib import Path

import pytest

import vblora
from tests.small_models import bert, llama


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = vblora.inject(llama(), vblora.VBLoRAConfig(r=2, num_vectors=16, vector_length=8))
    vblora.save(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_files_of_an_adapter_are_not_its_folder(saved):
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is a file\. Pass the folder .*adapter\.$"):
        vblora.load(llama(), saved / "adapter_model.safetensors")


def test_a_missing_folder_is_named(saved):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing\. .*snapshot_download"):
        vblora.load(llama(), saved / "missing")


def test_an_adapter_of_another_base_model_names_its_layer(saved, tmp_path):
    message = "it updates `model.layers.0.self_attn.q_proj`, but BertForSequenceClassification has no such module"
    with pytest.raises(ValueError, match=message):
        vblora.load(model := bert(), saved)
    assert not hasattr(model, "vblora")
    # Of other widths, which `vector_length` does not divide: the error is not about that.
    with pytest.raises(ValueError, match=r"other layers than the model's: `.*q_proj` is 32 -> 32 there, 40 -> 40 here"):
        vblora.load(model := llama(hidden_size=40), saved)
    assert not hasattr(model, "vblora")
    config = vblora.VBLoRAConfig(
        r=2, num_vectors=16, vector_length=8, target_modules="all-linear", modules_to_save=["classifier"]
    )
    vblora.save(vblora.inject(bert(), config), tmp_path / "of-bert")
    with pytest.raises(ValueError, match=r"it updates `bert\..*, but LlamaForCausalLM has no such module"):
        vblora.load(llama(), tmp_path / "of-bert")  # and nothing about its head


def test_a_file_is_no_folder_to_save_into(saved, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"`directory` is .*file, which is a file"):
        vblora.save(vblora.load(llama(), saved), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_bank_in_a_folder_is_pointed_out(tmp_path):
    vblora.VectorBank(4, 8).save(tmp_path / "bank.safetensors")
    with pytest.raises(FileNotFoundError, match=r"Give .*bank.safetensors\.$"):
        vblora.VectorBank.from_file(tmp_path)
