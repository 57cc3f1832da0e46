"""A store of adapters: each row of a batch is what its adapter makes of it alone; and what the store holds, reads and refuses."""

import copy
import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import vblora
from tests.small_models import relative_error
from vblora import files, streams
from vblora.serving import AdapterStore, packed

USERS = [f"user-{number}" for number in range(6)]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 50, (8, 5), generator=torch.Generator().manual_seed(0))


def store_of(world, source=None, **choice) -> tuple[AdapterStore, nn.Module]:
    model = world.fresh()
    choice = {"bank": world.bank_file, "exact": True} | choice
    return AdapterStore(model, world.folder if source is None else source, **choice), model


def assert_rows(world, model, names, ids, tolerance=1e-6) -> None:
    with torch.no_grad():
        mixed, alone = model(input_ids=ids, adapter_names=names).logits, world.logits(names, ids)
    for row, name in enumerate(names):
        if name is None:
            assert torch.equal(mixed[row], alone[row])
        else:
            assert relative_error(mixed[row], alone[row]) < tolerance, name


def test_every_method_and_format_in_one_batch(world, ids):
    store, model = store_of(world)
    names = store.names()
    assert len(names) == 16
    for start in range(0, 16, 7):
        batch = names[start : start + 7]
        assert_rows(world, model, [None] * (8 - len(batch)) + batch, ids)
    assert_rows(world, model, ["user-1"] * 5 + ["lora"] * 3, ids)
    assert_rows(world, model, [None] * 8, ids)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, world.base(input_ids=ids).logits)
        assert relative_error(world.alone("user-1")(input_ids=ids).logits, world.base(input_ids=ids).logits) > 0.01


class Stream:
    """A fake ``torch.cuda.Stream`` that logs what it waits for."""

    def __init__(self, name: str, log: list[tuple[str, str]]) -> None:
        self.name, self.log, self.events = name, log, 0

    def record_event(self) -> str:
        self.events += 1
        return f"{self.name}{self.events}"

    def wait_event(self, event: str) -> None:
        self.log.append((self.name, event))


@torch.no_grad()
def test_slots_are_filled_and_read_in_order_on_several_streams(world, ids, monkeypatch):
    log: list[tuple[str, str]] = []
    stream, other = Stream("a", log), Stream("b", log)
    now = stream
    monkeypatch.setattr(streams, "current", lambda _device: now)
    _, model = store_of(world, slots=2)  # a1: its memory is there
    model(input_ids=ids[:2], adapter_names=USERS[:2])  # a2: filled
    model(input_ids=ids[:2], adapter_names=USERS[:2])
    assert not log
    now = other
    model(input_ids=ids[:2], adapter_names=USERS[:2])
    assert log == [("b", "a2")]  # does not read before they are filled
    log.clear()
    model(input_ids=ids[:2], adapter_names=USERS[2:4])
    assert ("b", "a3") in log  # does not fill before they are read
    log.clear()
    now = stream
    model(input_ids=ids[:2], adapter_names=USERS[2:4])
    assert [name for name, _ in log] == ["a"] and log[0][1].startswith("b")


def test_weights_of_16_bits(world, ids):
    names = [None, *USERS, "resumed"]
    _, model = store_of(world, exact=False)
    assert_rows(world, model, names, ids, 1e-4)
    exact, rounded = (store_of(world, exact=exact)[0] for exact in (True, False))
    for name in USERS:
        weights = [store._packed(name).deployed().weights for store in (exact, rounded)]
        assert 0 < (weights[0] - weights[1]).abs().max() < 4e-6
        assert rounded._packed(name).weights.dtype == torch.int16
    rows = exact._packed("user-0").layout.num_rows
    assert rounded._packed("user-0").nbytes == rows * 2 * 5 // 8 + rows * 2  # 24 vectors: 5 bits


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate(world, ids, how):
    store, model = store_of(world, slots=5)
    names = ["user-0", None, "lora", "user-3", "user-0", None, "padded", "vera"]
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[5, :3] = 0
    choice = {
        "input_ids": ids,
        "attention_mask": mask,
        "max_new_tokens": 5,
        "pad_token_id": 0,
        "eos_token_id": None,
        **how,
    }
    mixed = model.generate(**choice, adapter_names=names).unflatten(0, (8, -1))
    for row, name in enumerate(names):
        assert torch.equal(mixed[row], world.alone(name).generate(**choice).unflatten(0, (8, -1))[row]), name
    assert store.stats()["misses_total"]["warm"] == 5


def test_the_least_recently_used_leaves_its_slot(world, ids):
    store, model = store_of(world, slots=3)
    store.pin("user-5")
    for names in (USERS[:2], USERS[2:4], USERS[1:3], USERS[3:5]):
        assert_rows(world, model, names + [None] * 6, ids)
        assert set(store._warm) == {*names, "user-5"}
    assert_rows(world, model, [None, "user-5"] * 4, ids)
    stats = store.stats()
    assert stats["adapters"] == {"cold": 6, "warm": 3, "pinned": 1}
    assert (stats["misses_total"]["warm"], stats["evictions_total"]["warm"]) == (8, 5)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"the batch names 3 adapters, but only 2 of the store.s slots"),
    ):
        model(input_ids=ids[:3], adapter_names=USERS[:3])
    store.unpin("user-5")
    assert_rows(world, model, USERS[:3], ids[:3])
    with pytest.raises(ValueError, match="3 pinned adapters would leave no slot"):
        store.pin(USERS[:3])


def test_nothing_is_left_of_what_a_slot_held_before(world, ids):
    _, model = store_of(world, slots=1)
    for name in ("user-0", "peft lora", "scaled", "tied"):  # of fewer ranks, or of fewer layers
        assert_rows(world, model, [name] * 8, ids)


def test_the_cold_tier_is_bounded(world, ids):
    one = store_of(world)[0]._packed("user-0").nbytes
    store, model = store_of(world, capacity_bytes=2 * one, slots=2)
    for names in (USERS[:2], USERS[2:4], USERS[:2]):
        assert_rows(world, model, names, ids[:2])
        assert store.stats()["bytes"]["cold"] == 2 * one
    assert store.stats()["misses_total"]["cold"] == 6
    assert store.stats()["evictions_total"]["cold"] == 4


def test_banks_and_layouts_are_checked_and_held_once(world, monkeypatch):
    store, _ = store_of(world)
    read, checked = packed.folder.read, []
    monkeypatch.setattr(packed.folder, "read", lambda *args: checked.append(args) or read(*args))
    store.prefetch(USERS)
    assert len(checked) == 1
    adapters = [store._packed(name) for name in USERS]
    assert len({id(adapter.bank) for adapter in adapters}) == len({id(adapter.layout) for adapter in adapters}) == 1
    assert store.stats()["bytes"]["shared"] == world.bank.vectors.nbytes


def test_what_is_held_does_not_depend_on_files(world, tmp_path):
    """What safetensors reads is a map of the file: whoever truncates that would end the process."""
    for name in ("user-0", "lora", "own bank"):
        shutil.copytree(world.folder / name, tmp_path / name)
    shutil.copy(world.bank_file, tmp_path / "bank.safetensors")
    store, _ = store_of(world, tmp_path, bank=tmp_path / "bank.safetensors")
    store.prefetch(["user-0", "lora", "own bank"])
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path) not in maps.replace(str(tmp_path / "bank.safetensors"), "")


@torch.no_grad()
def test_a_bank_that_trains_elsewhere_does_not_change_the_store(world, ids):
    bank = vblora.VectorBank.from_file(world.bank_file)
    store, model = store_of(world, bank=bank)
    model(input_ids=ids, adapter_names=["user-1"] * 8)
    bank.vectors.mul_(2.0)
    store.discard("user-1")
    assert_rows(world, model, ["user-1"] * 4 + ["user-2"] * 4, ids)


def test_several_adapters_are_composed_in_one_call(world, ids, monkeypatch):
    store, model = store_of(world)
    store.prefetch(USERS)
    calls = []
    compose = torch.ops.vblora.compose
    monkeypatch.setattr(torch.ops.vblora, "compose", lambda *args: calls.append(1) or compose(*args))
    with torch.no_grad():
        model(input_ids=ids[:6], adapter_names=USERS)
    assert len(calls) == 1


def test_sources(world, ids, tmp_path):
    for name in USERS[:2]:
        shutil.copytree(world.folder / name, tmp_path / name)
    mapping = {"one": world.folder / "user-0"}
    fetched = []

    def fetch(name: str):
        if name != "far":
            raise KeyError(name)
        fetched.append(name)
        return world.folder / "user-1"

    for source, name, same in ((tmp_path, "user-1", "user-1"), (mapping, "one", "user-0"), (fetch, "far", "user-1")):
        store, model = store_of(world, source)
        with torch.no_grad():
            found = model(input_ids=ids, adapter_names=[name] * 8).logits
            assert relative_error(found, world.alone(same)(input_ids=ids).logits) < 1e-6
        for unknown in ("nobody", "../adapters/user-0", "", ".."):
            with torch.no_grad(), pytest.raises(ValueError, match="`source` has no adapter"):
                model(input_ids=ids, adapter_names=[unknown] * 8)
        assert name in store.names()
    assert fetched == ["far"]


def test_a_changed_folder_is_read_again_once_it_is_discarded(world, ids, tmp_path):
    shutil.copytree(world.folder / "user-0", tmp_path / "mine")
    store, model = store_of(world, tmp_path)
    names = ["mine"] * 8
    with torch.no_grad():
        first = model(input_ids=ids, adapter_names=names).logits
        shutil.rmtree(tmp_path / "mine")
        shutil.copytree(world.folder / "user-1", tmp_path / "mine")
        assert torch.equal(model(input_ids=ids, adapter_names=names).logits, first)
        store.discard("mine")
        assert (
            relative_error(
                model(input_ids=ids, adapter_names=names).logits, world.alone("user-1")(input_ids=ids).logits
            )
            < 1e-6
        )


def test_an_adapter_that_is_discarded_while_it_is_read_is_read_again(world, ids):
    versions = iter(("user-0", "user-1", "user-2"))

    def locate(name: str) -> Path:
        version = next(versions)
        if version == "user-0":
            store.discard(name)  # as another thread does, once it has written the next version
        return world.folder / version

    store, model = store_of(world, locate)
    for _ in range(2):
        with torch.no_grad():
            found = model(input_ids=ids, adapter_names=["mine"] * 8).logits
        assert relative_error(found, world.alone("user-1")(input_ids=ids).logits) < 1e-6


def damaged(folder, how: str) -> None:
    file = folder / "adapter_model.safetensors"
    data = file.read_bytes()
    if how == "cut off":
        file.write_bytes(data[: len(data) // 2])
    elif how == "no file":
        file.unlink()
    elif how == "infinite":
        file.write_bytes(data[:-4] + b"\x00\x00\x80\x7f")
    elif how == "not JSON":
        file.write_bytes(data.replace(b'{\\"', b'[\\"', 1))
    elif how == "nested too deeply":
        tensors, _ = files.read_tensors(file)
        files.write_tensors(file, tensors, {"vblora": "[" * 100_000})
    elif how == "index too large":
        begin = 8 + int.from_bytes(data[:8], "little")
        file.write_bytes(data[:begin] + b"\xff" * 16 + data[begin + 16 :])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("how", ["cut off", "no file", "infinite", "not JSON", "nested too deeply", "index too large"])
def test_a_damaged_adapter_is_refused_by_name_and_the_others_run(world, ids, tmp_path, how, first):
    for name in ("good", "bad"):
        shutil.copytree(world.folder / "user-0", tmp_path / name)
    # Either the weights or the indices are last in the file; both get what is wrong with them.
    damaged(tmp_path / "bad", how)
    store, model = store_of(world, tmp_path)
    if not first:  # the short way of reading, too
        store.prefetch(["good"])
    with torch.no_grad():
        with pytest.raises(ValueError, match="adapter 'bad' cannot be used: "):
            model(input_ids=ids, adapter_names=["good", "bad"] * 4)
        found = model(input_ids=ids, adapter_names=["good"] * 8).logits
        assert relative_error(found, world.alone("user-0")(input_ids=ids).logits) < 1e-6
    with pytest.raises(ValueError, match="adapter 'bad' cannot be used: "):
        store.prefetch(["bad", "good"])
    assert store.stats()["refusals_total"] == 2
    assert set(store._warm) == {"good"}


def test_what_does_not_fit_is_refused_by_name(world, ids, tmp_path):
    wide = vblora.inject(world.fresh(), vblora.LoraConfig(r=5, target_modules=["q_proj"]))
    vblora.save(wide, tmp_path / "rank")
    other = vblora.inject(world.fresh(), vblora.LoraConfig(r=2, target_modules=["lm_head"]))
    vblora.save(other, tmp_path / "layer")
    head = vblora.inject(world.fresh(), vblora.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    vblora.save(head, tmp_path / "head")
    shutil.copytree(world.folder / "user-0", tmp_path / "bank")
    _, model = store_of(world, tmp_path, bank=())
    reasons = {"rank": "its rank is 5, but `max_rank` is 4", "layer": "it adapts `lm_head`"}
    reasons |= {"head": "it trained `lm_head.weight`", "bank": "its vector bank is in a file of its own"}
    for name, reason in reasons.items():
        with torch.no_grad(), pytest.raises(ValueError, match=f"adapter '{name}' cannot be used: .*{reason}"):
            model(input_ids=ids[:1], adapter_names=[name])


def test_attaching_and_detaching(world, ids):
    store, model = store_of(world)
    with pytest.raises(ValueError, match="AdapterStore attached"):
        vblora.inject(model, vblora.LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="AdapterStore attached"):
        AdapterStore(model, world.folder)
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(model)
    with torch.no_grad(), vblora.disabled(model), pytest.raises(ValueError, match="are disabled"):
        model(input_ids=ids, adapter_names=["user-0"] * 8)
    with torch.no_grad(), pytest.raises(ValueError, match="`adapter_names` was passed to the submodule `model`"):
        model.model(input_ids=ids, adapter_names=["user-0"] * 8)
    store.detach()
    store.detach()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in world.base.named_modules()]
    assert "generate" not in vars(model)
    vblora.inject(model, vblora.LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="has adapters, default"):
        AdapterStore(model, world.folder)
    with pytest.raises(ValueError, match="not a directory"):
        AdapterStore(world.fresh(), world.folder / "nowhere")
    for name in ("slots", "max_rank", "capacity_bytes"):
        with pytest.raises(ValueError, match=f"`{name}` is 0"):
            AdapterStore(world.fresh(), world.folder, **{name: 0})


def test_two_requests_for_one_adapter_read_it_once(world, monkeypatch):
    store, _ = store_of(world)
    started, read = threading.Barrier(4), packed.Reader.read
    calls = []

    def slow(reader, directory):
        calls.append(directory.name)
        threading.Event().wait(0.1)
        return read(reader, directory)

    monkeypatch.setattr(packed.Reader, "read", slow)

    def ask() -> None:
        started.wait()
        store.prefetch(["user-0", "user-1"])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(calls) == ["user-0", "user-1"]


def test_a_batch_outlives_its_slots(world, ids):
    """Whoever fills a slot anew does not touch a call that is under way."""
    store, model = store_of(world, slots=1)

    def evict(*_) -> None:
        store._rows(["user-1"])

    handle = model.model.layers[0].register_forward_hook(evict)
    assert_rows(world, model, ["user-0"] * 8, ids)
    assert list(store._warm) == ["user-0"]  # what came meanwhile had a slot of its own
    handle.remove()
    assert_rows(world, model, ["user-1"] * 8, ids)
    assert list(store._warm) == ["user-1"]


@torch.no_grad()
def test_batches_that_use_all_slots_do_not_hold_up_others(world, ids):
    store, model = store_of(world, slots=3)
    running = store._rows(["user-0", "user-1", "user-2"])
    expected = running.slots.arena.clone()
    for names in (["user-3"] * 8, ["user-0", "user-4", None, "user-5"] * 2):
        assert_rows(world, model, names, ids)
    store.discard("user-1")  # its slot is free, but not to be filled
    store.pin("user-3")
    assert_rows(world, model, ["user-3"] * 8, ids)
    assert torch.equal(store._slots.arena, expected)
    assert list(store._warm) == ["user-0", "user-2"] or list(store._warm) == ["user-2", "user-0"]
    del running
    assert_rows(world, model, ["user-3", "user-4"] * 4, ids)
    assert_rows(world, model, ["user-5", "user-1"] * 4, ids)
    assert "user-3" in store._warm  # pinned
    assert len(store._warm) == 3


def test_prometheus(world, ids):
    store, model = store_of(world)
    with torch.no_grad():
        model(input_ids=ids, adapter_names=["user-0"] * 8)
    lines = store.prometheus().splitlines()
    assert 'vblora_store_adapters{kind="warm"} 1' in lines
    assert 'vblora_store_misses_total{kind="cold"} 1' in lines
    assert "# TYPE vblora_store_load_seconds gauge" in lines
    assert store.stats()["load_seconds"]["p99"] > 0 < store.stats()["compose_seconds"]["p50"]


@torch.no_grad()
def test_slots_are_filled_in_place(world, ids):
    """Batches that run hold views of them."""
    store, model = store_of(world, slots=2)
    arena = store._slots.arena
    place = arena.data_ptr()
    for name in ("user-0", "lora"):  # composed by one operator, and copied factor by factor
        model(input_ids=ids, adapter_names=[name] * 8)
        assert store._slots.arena is arena and arena.data_ptr() == place
    assert arena.any(1).all()
