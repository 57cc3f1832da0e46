"""Adapters by path: what an engine is told of, and what it gets, now and after the folder has changed."""

import re
import shutil

import pytest
import torch

import vblora
from tests.serving.test_store import USERS
from tests.small_models import llama, relative_error
from vblora.layers.kinds import has_kind, target_of
from vblora.serving.by_path import AdaptersByPath, lora_tensors


def adapters_of(world, capacity_bytes: int = 2**30) -> AdaptersByPath:
    return AdaptersByPath([world.bank], max_rank=64, capacity_bytes=capacity_bytes)


def layers_of(model):
    return {name: target_of(name, module) for name, module in model.named_modules() if has_kind(module)}


@pytest.fixture
def folders(world, tmp_path):
    for name in ("user-0", "user-1", "user-2", "lora"):
        shutil.copytree(world.folder / name, tmp_path / name)
    return tmp_path


def logits_with(world, tensors: dict[str, torch.Tensor], ids) -> torch.Tensor:
    """The base model with the updates of PEFT's tensors of LoRA added to its weights."""
    model = world.fresh()
    for name, A in tensors.items():
        if found := re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", name):
            B = tensors[name.replace("lora_A", "lora_B")]
            model.get_submodule(found[1]).weight.data += B @ A
    return model(input_ids=ids).logits


@torch.no_grad()
def test_every_method_and_format_as_lora(world):
    ids = torch.arange(3, 15)[None]
    adapters, names = adapters_of(world), sorted(path.name for path in world.folder.iterdir())
    assert len(names) == 16
    for name in names:
        if name == "peft vera":
            with pytest.raises(ValueError, match="widths"):
                adapters.resolve(world.folder, name)
            continue
        path = adapters.resolve(world.folder, name, layers_of(world.base))
        assert path is not None and path.startswith(f"{world.folder / name}@")
        adapter = adapters.read(path)
        assert adapter is not None and adapters.held(path) is adapter
        tensors = lora_tensors(adapter, torch.float32)
        assert {min(tensor.shape) for tensor in tensors.values()} == {adapter.rank}
        assert relative_error(logits_with(world, tensors, ids), world.alone(name)(input_ids=ids).logits) < 1e-5


@pytest.mark.parametrize("name", ["nobody", "../adapters/user-0", "..", ".", "", "user-0/", "/etc", "x" * 5000, "a\0b"])
def test_unknown_names(world, name):
    assert adapters_of(world).resolve(world.folder, name) is None


def test_an_adapter_outlives_its_folder(world, folders):
    adapters = adapters_of(world)
    path = adapters.resolve(folders, "user-0")
    first = adapters.read(path)
    shutil.rmtree(folders / "user-0")
    assert adapters.read(path) is first

    # The same name with other content is another path. Both are served.
    shutil.copytree(folders / "user-1", folders / "user-0")
    changed = adapters.resolve(folders, "user-0")
    assert changed != path
    assert not torch.equal(adapters.read(changed).indices, first.indices)
    assert adapters.read(path) is first
    # A process that has not read it yet does not take the new content for the old.
    with pytest.raises(ValueError, match="has changed since its name was resolved"):
        adapters_of(world).read(path)


@pytest.mark.parametrize(
    "use",
    [
        lambda adapters, folders, _: adapters.resolve(folders, "user-0"),
        lambda adapters, folders, new: adapters.read(f"{folders / 'user-0'}@{new}"),
    ],
    ids=["resolve", "read"],
)
def test_a_folder_that_changes_while_it_is_read_is_refused(world, folders, use, monkeypatch):
    """Else the old content would be served under the hash of the new one."""
    adapters = adapters_of(world)
    new = adapters.resolve(folders, "user-1").rpartition("@")[2]
    read = adapters._reader.read

    def read_and_change(path):
        adapter = read(path)
        shutil.rmtree(path)
        shutil.copytree(folders / "user-1", path)
        return adapter

    monkeypatch.setattr(adapters._reader, "read", read_and_change)
    with pytest.raises(ValueError, match="has changed since its name was resolved"):
        use(adapters, folders, new)


def test_a_folder_that_a_user_names_is_read_again(world, folders):
    adapters, path = adapters_of(world), str(folders / "user-0")
    first = adapters.read(path)
    shutil.rmtree(folders / "user-0")
    assert adapters.read(path) is first
    shutil.copytree(folders / "user-1", folders / "user-0")
    second = adapters.read(path)
    assert not torch.equal(second.indices, first.indices)
    (folders / "user-0" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.warns(vblora.VBLoRAWarning, match="so the adapter that was read before is served: .*damaged"):
        assert adapters.read(path) is second
    with pytest.raises(ValueError, match="damaged"):
        adapters_of(world).read(path)
    # What engines read themselves is left to them.
    assert adapters.read(str(world.folder / "peft lora")) is None
    assert adapters.read(str(folders / "nowhere")) is None


def test_the_least_recently_used_adapters_make_room(world):
    each = adapters_of(world).read(str(world.folder / "user-0")).nbytes
    adapters = adapters_of(world, 2 * each)
    paths = [adapters.resolve(world.folder, name) for name in USERS[:3]]
    for path in (*paths[:2], paths[0], paths[2]):
        adapters.read(path)
    assert [adapters.held(path) is not None for path in paths] == [True, False, True]


@pytest.mark.filterwarnings("ignore::vblora.VBLoRAWarning")
def test_what_an_engine_would_accept_in_silence_is_refused(world, tmp_path):
    models = {"narrow": llama(hidden_size=16, num_attention_heads=2), "deep": llama(num_hidden_layers=3)}
    for name, model in models.items():
        vblora.save(vblora.inject(model, vblora.LoraConfig(r=2, target_modules="all-linear")), tmp_path / name)
    head = vblora.inject(world.fresh(), vblora.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    vblora.save(head, tmp_path / "head")
    wide = vblora.inject(world.fresh(), vblora.LoraConfig(r=65, target_modules=["q_proj"]))
    vblora.save(wide, tmp_path / "wide")
    large = vblora.inject(world.fresh(), vblora.LoraConfig(r=2, target_modules=["q_proj"], lora_alpha=1e38))
    with torch.no_grad():
        large.vblora["default"].factors.fill_(1e30)
    vblora.save(large, tmp_path / "large")
    shutil.copytree(world.folder / "user-0", tmp_path / "bank")
    reasons = {
        "narrow": "which is linear 16 -> 16 there, but linear 32 -> 32 in the model",
        "deep": r"it adapts `model\.layers\.2\..*which the model does not have",
        "head": r"it trained `lm_head\.weight`",
        "wide": "its rank is 65, but `max_rank` is 64",
        "large": "not finite",
        "bank": "its vector bank is in a file of its own",
    }
    adapters = AdaptersByPath([], max_rank=64, capacity_bytes=1)
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=reason):
            adapters.resolve(tmp_path, name, layers_of(world.base))


def test_a_bank_goes_with_the_last_adapter_that_has_it(world):
    adapters = adapters_of(world, capacity_bytes=1)
    adapters.read(str(world.folder / "own bank"))
    own = adapters._reader.shared_bytes
    assert own == world.bank.vectors.nbytes
    adapters.read(str(world.folder / "padded"))
    assert adapters._reader.shared_bytes == 24 * 24 * 4
