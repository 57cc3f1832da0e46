"""Files that are written all or not at all, and files that other processes replace meanwhile."""

import hashlib
import json
import threading
import time
import warnings
from contextlib import suppress

import pytest
import torch

import vblora
from tests.small_models import Net
from vblora import bank, files
from vblora.checkpoint import folder


def test_either_all_files_are_replaced_or_none(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"before")
    with pytest.raises(FileNotFoundError):
        files.write_files({old: b"after", tmp_path / "nowhere" / "file": b"after"})
    assert old.read_bytes() == b"before" and list(tmp_path.iterdir()) == [old]
    files.write_files({old: b"after", new: b"too"})
    assert (old.read_bytes(), new.read_bytes()) == (b"after", b"too") and len(list(tmp_path.iterdir())) == 2


def test_of_two_that_write_at_once_no_mixture_stays(tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    first = threading.Event()
    replace = files.os.replace

    def slow_replace(source, path):
        replace(source, path)
        if not first.is_set():
            first.set()
            time.sleep(0.3)  # in which the other would write both

    monkeypatch.setattr(files.os, "replace", slow_replace)
    monkeypatch.setattr(files, "_LOCK_TRIALS", 10_000)
    other = threading.Thread(target=lambda: first.wait() and files.write_files({two: b"2", one: b"2"}))
    other.start()
    files.write_files({one: b"1", two: b"1"})
    other.join()
    assert (one.read_bytes(), two.read_bytes()) == (b"2", b"2")


def test_no_mixture_is_read_while_files_are_replaced(tmp_path, monkeypatch):
    """Of PEFT's forms, both files count: here the factors, and by how much their product is multiplied."""

    def save(alpha):
        config = vblora.LoraConfig(r=1, lora_alpha=alpha, target_modules=["up"])
        model = vblora.inject(Net(blocks=1), config)
        with torch.no_grad():
            model.vblora.default.factors.fill_(alpha)
        vblora.save(model, tmp_path, form="peft")

    save(1)
    replace, first = files.os.replace, threading.Event()

    def slow_replace(source, path):
        replace(source, path)
        first.set()
        time.sleep(0.1)

    monkeypatch.setattr(files.os, "replace", slow_replace)
    monkeypatch.setattr(files, "_LOCK_TRIALS", 10_000)
    other = threading.Thread(target=save, args=[2])
    other.start()
    first.wait()
    during, _ = folder.read(tmp_path)
    other.join()
    after, _ = folder.read(tmp_path)
    assert during.config == after.config and torch.equal(during.tensors["factors"], after.tensors["factors"])


def save_lora(alpha, path):
    model = vblora.inject(Net(blocks=1), vblora.LoraConfig(r=1, lora_alpha=alpha, target_modules=["up"]))
    vblora.save(model, path, form="peft")


@pytest.mark.parametrize(
    ("new", "renames", "found", "whole"), [(2, 0, 1, False), (2, 1, 2, False), (2, 2, 2, True), (1, 0, 1, True)]
)
def test_a_crash_between_two_renames_leaves_one_adapter(new, renames, found, whole, tmp_path, monkeypatch):
    """The old one, or the new one. PEFT, which reads both files, then finds no config rather than another adapter's."""
    save_lora(1, tmp_path)
    replace, done = files.os.replace, []

    def dying(source, path):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(path)
        replace(source, path)

    monkeypatch.setattr(files.os, "replace", dying)
    with suppress(KeyboardInterrupt):
        save_lora(new, tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        contents, _ = folder.read(tmp_path)
    assert contents.config.lora_alpha == found and (tmp_path / folder.CONFIG_FILE).exists() == whole
    assert ["adapter_config.json is missing" in str(one.message) for one in caught] == [True] * (not whole)


def test_the_config_of_another_adapter_is_noticed(tmp_path):
    for alpha in (1, 2):
        save_lora(alpha, tmp_path / str(alpha))
    config = tmp_path / "1" / folder.CONFIG_FILE
    named = json.loads(config.read_text()) | {"base_model_name_or_path": "of my own"}
    config.write_text(json.dumps(named))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder.read(tmp_path / "1")
    (tmp_path / "2" / folder.CONFIG_FILE).replace(config)
    with pytest.warns(
        vblora.VBLoRAWarning, match=r"is not what adapter_model.safetensors was saved with: it was edited, or is"
    ):
        folder.read(tmp_path / "1")


def test_a_locked_folder_is_written_to_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LOCK_TRIALS", 2)
    with files.locked({tmp_path}):
        files.write_file(tmp_path / "one", b"1")
    assert (tmp_path / "one").read_bytes() == b"1"


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
