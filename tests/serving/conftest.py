"""A small model, its bank, and folders of adapters of all methods and formats."""

import copy
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vblora
from tests.small_models import llama

ADAPTER = {"num_vectors": 24, "vector_length": 16, "target_modules": "all-linear", "init_vector_bank_bound": 0.25}


@dataclass
class World:
    """A base model, and what its adapters do to it one at a time: without a store, read with `vblora.load`."""

    base: nn.Module
    folder: Path
    bank: vblora.VectorBank
    models: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def bank_file(self) -> Path:
        return self.folder.parent / "bank.safetensors"

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.base)

    def add(self, name: str, config, form: str = "deploy", *, own_bank: bool = False) -> None:
        choice = {}
        if isinstance(config, vblora.VBLoRAConfig) and not own_bank:
            choice = {"bank": self.bank, "freeze_bank": True}
        model = vblora.inject(self.fresh(), config, **choice)
        with torch.no_grad():
            for parameter in model.vblora["default"].parameters():
                if (
                    parameter is not getattr(model.vblora["default"], "logits", None)
                    and parameter is not self.bank.vectors
                ):
                    parameter.normal_(std=0.1)
        vblora.save(model, self.folder / name, form=form)

    def alone(self, name: str | None) -> nn.Module:
        """The model with one adapter."""
        if name is None:
            return self.base
        if name not in self.models:
            try:
                self.models[name] = vblora.load(self.fresh(), self.folder / name).eval()
            except ValueError:  # it names a file for its bank
                self.models[name] = vblora.load(self.fresh(), self.folder / name, bank=self.bank_file).eval()
        return self.models[name]

    def logits(self, names: list[str | None], ids: Tensor) -> Tensor:
        """Of each row those of its adapter, run over the whole batch."""
        return torch.stack([self.alone(name)(input_ids=ids).logits[row] for row, name in enumerate(names)])


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("serving")
    torch.manual_seed(0)
    bank = vblora.VectorBank(24, 16, 0.25)
    bank.save(root / "bank.safetensors")
    world = World(
        llama().eval().requires_grad_(False), root / "adapters", vblora.VectorBank.from_file(root / "bank.safetensors")
    )
    for number in range(6):
        world.add(f"user-{number}", vblora.VBLoRAConfig(r=4, **ADAPTER))
    two = ADAPTER | {"target_modules": ["q_proj", "down_proj"]}
    world.add("scaled", vblora.VBLoRAConfig(r=2, topk=3, scaling=2.0, **two))
    world.add("resumed", vblora.VBLoRAConfig(r=4, **ADAPTER), "resume")
    world.add("own bank", vblora.VBLoRAConfig(r=4, **ADAPTER), own_bank=True)
    world.add("padded", vblora.VBLoRAConfig(r=3, pad=True, **ADAPTER | {"vector_length": 24}), own_bank=True)
    world.add("lora", vblora.LoraConfig(r=3, target_modules="all-linear"))
    world.add("vera", vblora.VeraConfig(r=4, target_modules="all-linear"))
    world.add("tied", vblora.TiedLoraConfig(r=2, target_modules="all-linear"))
    world.add("peft lora", vblora.LoraConfig(r=2, target_modules=["v_proj"]), "peft")
    world.add("peft vera", vblora.VeraConfig(r=4, target_modules=["k_proj"]), "peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        world.add("peft vblora", vblora.VBLoRAConfig(r=4, **ADAPTER), "peft-topk", own_bank=True)
    return world
