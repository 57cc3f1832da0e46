"""vLLM's plugin with stand-ins for the parts of vLLM that it touches. `make test-vllm` runs it in vLLM itself."""

import asyncio
import importlib
import json
import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import vblora
from tests.small_models import llama


@dataclass
class Request:
    lora_name: str
    lora_int_id: int
    lora_path: str


def stand_ins() -> dict[str, dict[str, object]]:
    """What the plugin imports of vLLM, by module. Classes are new ones, as the plugin replaces their methods."""

    class PEFTHelper:
        @classmethod
        def from_local_dir(cls, lora_path, max_position_embeddings):
            return cls.from_dict(json.loads((Path(lora_path) / "adapter_config.json").read_text()))

        @classmethod
        def from_dict(cls, fields):
            return SimpleNamespace(**fields)

    class LoRAModel:
        @classmethod
        def from_local_checkpoint(cls, lora_dir, expected_lora_modules, peft_helper, **choice):
            return "vLLM's own"

        @classmethod
        def from_lora_tensors(cls, **given):
            return SimpleNamespace(**given)

    class LoRAResolverRegistry:
        resolvers: dict[str, object] = {}  # noqa: RUF012

        @classmethod
        def register_resolver(cls, name, resolver):
            cls.resolvers[name] = resolver

    def parse_fine_tuned_lora_name(name, mapper=None):
        assert name.startswith("base_model.model.")
        return name.removeprefix("base_model.model.").rpartition(".lora_")[0], ".lora_A." in name

    return {
        "vllm": {"__version__": "0.33.4", "envs": SimpleNamespace(VLLM_ALLOW_RUNTIME_LORA_UPDATING=False)},
        "vllm.lora": {},
        "vllm.logger": {"init_logger": logging.getLogger},
        "vllm.lora.lora_model": {"LoRAModel": LoRAModel},
        "vllm.lora.peft_helper": {"PEFTHelper": PEFTHelper},
        "vllm.lora.request": {"LoRARequest": Request},
        "vllm.lora.resolver": {"LoRAResolver": object, "LoRAResolverRegistry": LoRAResolverRegistry},
        "vllm.lora.utils": {"get_lora_id": lambda: 77, "parse_fine_tuned_lora_name": parse_fine_tuned_lora_name},
    }


@pytest.fixture
def plugin(monkeypatch):
    for name, values in stand_ins().items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("VBLORA_ADAPTERS", "VBLORA_BANK", "VBLORA_CAPACITY_BYTES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "vblora.integrations.vllm", raising=False)
    yield importlib.import_module("vblora.integrations.vllm")
    del sys.modules["vblora.integrations.vllm"]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A model, a bank, and an adapter, which environment variables name."""
    torch.manual_seed(0)
    base = llama()
    base.save_pretrained(tmp_path / "model")
    vblora.VectorBank(24, 16, 0.3).save(tmp_path / "bank.safetensors")
    config = vblora.VBLoRAConfig(r=4, num_vectors=24, vector_length=16, target_modules=["q_proj"])
    model = vblora.inject(base, config, bank=tmp_path / "bank.safetensors", freeze_bank=True)
    vblora.save(model, tmp_path / "adapters" / "user-17", form="deploy")
    monkeypatch.setenv("VBLORA_ADAPTERS", str(tmp_path / "adapters"))
    monkeypatch.setenv("VBLORA_BANK", str(tmp_path / "bank.safetensors"))
    return tmp_path


def resolve(plugin, name, model="unknown/model"):
    return asyncio.run(plugin.LoRAResolverRegistry.resolvers["vblora"].resolve_lora(str(model), name))


def load(plugin, path, **choice):
    """What a worker of vLLM does."""
    helper = plugin.PEFTHelper.from_local_dir(path, 64)
    return helper, plugin.LoRAModel.from_local_checkpoint(path, {"q_proj"}, helper, device="cpu", **choice)


def test_a_name_becomes_lora(plugin, folders):
    plugin.register()
    once = plugin.LoRAModel.from_local_checkpoint.__func__
    plugin.register()  # vLLM may do so
    assert plugin.LoRAModel.from_local_checkpoint.__func__ is once
    request = resolve(plugin, "user-17", folders / "model")
    assert request.lora_name == "user-17"
    for lora_model_id in (5, None):
        helper, model = load(plugin, request.lora_path, lora_model_id=lora_model_id, dtype=torch.bfloat16)
        assert (helper.r, helper.lora_alpha, helper.vllm_max_position_embeddings) == (4, 4, 64)
        assert len(model.tensors) == 4 and model.peft_helper is helper and model.device == "cpu"
        assert model.lora_model_id == (lora_model_id or 77)
        assert {tensor.dtype for tensor in model.tensors.values()} == {torch.bfloat16}
        shutil.rmtree(folders / "adapters" / "user-17", ignore_errors=True)


def test_modules_that_vllm_does_not_adapt_are_refused(plugin, folders):
    plugin.register()
    path = resolve(plugin, "user-17").lora_path
    helper = plugin.PEFTHelper.from_local_dir(path, None)
    with pytest.raises(ValueError, match=r"q_proj`, which vLLM does not adapt in this model"):
        plugin.LoRAModel.from_local_checkpoint(path, {"o_proj"}, helper)


def test_other_folders_are_left_to_vllm(plugin, folders):
    plugin.register()
    model = vblora.inject(llama(), vblora.LoraConfig(r=2, target_modules=["q_proj"]))
    vblora.save(model, folders / "peft", form="peft")
    helper, loaded = load(plugin, str(folders / "peft"))
    assert helper.peft_type == "LORA" and loaded == "vLLM's own"


def test_what_cannot_be_served_is_unknown_and_logged(plugin, folders, caplog):
    plugin.register()
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in caplog.text
    other = vblora.inject(llama(num_hidden_layers=3), vblora.LoraConfig(r=2, target_modules=["o_proj"]))
    vblora.save(other, folders / "adapters" / "deep")
    (folders / "adapters" / "empty").mkdir()
    caplog.clear()
    for name, reason in {"deep": "which the model does not have", "empty": "is missing"}.items():
        assert resolve(plugin, name, folders / "model") is None
        assert f"Adapter '{name}' cannot be served" in caplog.text and reason in caplog.text
    caplog.clear()
    for name in ("nobody", "../adapters/user-17"):
        assert resolve(plugin, name, folders / "model") is None
    assert not caplog.text
    assert resolve(plugin, "deep", folders / "nowhere") is not None
    assert "Whether adapters fit" in caplog.text
    caplog.clear()
    assert resolve(plugin, "user-17", folders / "nowhere") is not None
    assert not caplog.text  # once for each model


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("VBLORA_ADAPTERS", "/nowhere", "VBLORA_ADAPTERS is '/nowhere', which is not a directory"),
        ("VBLORA_BANK", "/nowhere", "/nowhere is missing"),
        ("VBLORA_CAPACITY_BYTES", "1 GB", "VBLORA_CAPACITY_BYTES is '1 GB', but must be a number of bytes"),
    ],
)
def test_a_wrong_setting_stops_the_start(plugin, folders, monkeypatch, name, value, reason):
    monkeypatch.setenv(name, value)
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        plugin.register()
    assert not plugin.LoRAResolverRegistry.resolvers
    assert not hasattr(plugin.LoRAModel.from_local_checkpoint, "of_vblora")


def test_other_versions_are_refused_by_name(plugin, folders, monkeypatch):
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.34.0")
    with pytest.raises(RuntimeError, match=r"vllm 0\.34\.0 is not known to vblora.*0\.32\.\*, 0\.33\.\*"):
        plugin.register()
    monkeypatch.delenv("VBLORA_ADAPTERS")
    monkeypatch.delenv("VBLORA_BANK")
    plugin.register()  # for whoever does not ask for vblora's adapters, any version will do
    assert not plugin.LoRAResolverRegistry.resolvers
