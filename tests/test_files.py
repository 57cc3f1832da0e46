"""Files that are written all or not at all, and files that other processes replace meanwhile."""

import hashlib

import pytest
import torch

import vblora
from tests.small_models import Net
from vblora import bank, files


def test_either_all_files_are_replaced_or_none(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"before")
    with pytest.raises(FileNotFoundError):
        files.write_files({old: b"after", tmp_path / "nowhere" / "file": b"after"})
    assert old.read_bytes() == b"before" and list(tmp_path.iterdir()) == [old]
    files.write_files({old: b"after", new: b"too"})
    assert (old.read_bytes(), new.read_bytes()) == (b"after", b"too") and len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_the_adapter_as_it_was(tmp_path, monkeypatch):
    """Of PEFT's forms, both files count."""
    config = vblora.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)
    vblora.save(vblora.inject(Net(blocks=1), config), tmp_path, form="peft")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    sync = files.sync

    def fail(path):
        if path.name.startswith(".adapter_config"):
            raise OSError(28, "No space left on device")
        sync(path)

    monkeypatch.setattr(files, "sync", fail)
    with pytest.raises(OSError, match="No space left"):
        vblora.save(vblora.inject(Net(blocks=1), config), tmp_path, form="peft")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_banks_hash_is_that_of_the_file_that_was_read(tmp_path, monkeypatch):
    path = tmp_path / "bank.safetensors"
    vblora.VectorBank(4, 8).save(path)
    data, decode = path.read_bytes(), bank.decode_vectors

    def decode_and_replace(tensors):
        path.unlink()
        files.write_tensors(path, {"vectors": torch.ones(4, 8)})
        return decode(tensors)

    monkeypatch.setattr(bank, "decode_vectors", decode_and_replace)
    assert vblora.VectorBank.from_file(path).file.sha256 == hashlib.sha256(data).hexdigest()
