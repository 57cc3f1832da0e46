"""Serving many adapters of SmolLM2-135M at a time: mixed batches, how many fit, and what it takes to switch."""

from __future__ import annotations

import copy
import gc
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

import vblora
from vblora.serving import AdapterStore

from . import models
from .harness import Result, Row, Settings, Times, bars, in_turn, ratio_row, value_row


class Generation:
    """Greedy generation of a batch. ``names``: of the rows' adapters; None for a model that takes none."""

    def __init__(self, model: nn.Module, prompt: torch.Tensor, tokens: int, names: list[str | None] | None) -> None:
        self.model, self.prompt, self.tokens, self.names = model, prompt, tokens, names

    def __call__(self) -> None:
        choice = {} if self.names is None else {"adapter_names": self.names}
        self.model.generate(
            input_ids=self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            max_new_tokens=self.tokens,
            min_new_tokens=self.tokens,
            do_sample=False,
            pad_token_id=0,
            **choice,
        )


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def write_adapters(base: nn.Module, folder: Path, count: int) -> None:
    """Folders ``0``, ``1``, ... of deployed adapters that share a bank, whose file is beside them."""
    config = vblora.VBLoRAConfig(**models.SMOLLM2_ADAPTER, init_vector_bank_bound=0.1)
    bank = vblora.VectorBank(config.num_vectors, config.vector_length, 0.1)
    bank.save(folder.parent / "bank.safetensors")
    bank = vblora.VectorBank.from_file(folder.parent / "bank.safetensors")
    for number in range(count):
        model = vblora.inject(models.twin(base), config, bank=bank, freeze_bank=True)
        vblora.save(model, folder / str(number), form="deploy")


def peft_with(base: nn.Module, count: int) -> nn.Module:
    """The model with ``count`` PEFT LoRAs ``"0"``, ``"1"``, ..."""
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(models.twin(base), config, adapter_name="0")
    for number in range(1, count):
        model.add_adapter(str(number), copy.copy(config))
    return model.eval()


def mixed_batches(base: nn.Module, folder: Path, settings: Settings, rows: list[Row], groups: dict[str, Times]) -> None:
    for batch, limit in ((2, 1.15), (4, 1.3)) if settings.quick else ((8, 1.15), (64, 1.3)):
        tokens = 2 if settings.quick else 12
        prompt = torch.randint(3, 500, (batch, 8), generator=torch.Generator().manual_seed(0))
        served = models.twin(base)
        AdapterStore(served, folder, bank=folder.parent / "bank.safetensors", slots=batch)
        names = [str(number) for number in range(batch)]
        work: dict[str, Callable[[], object]] = {
            "base model": Generation(base, prompt, tokens, None),
            "vblora store": Generation(served, prompt, tokens, names),
            "vblora store, a quarter base rows": Generation(
                served, prompt, tokens, [*names[: batch - batch // 4], *[None] * (batch // 4)]
            ),
            "vblora store, two adapters": Generation(served, prompt, tokens, [names[row % 2] for row in range(batch)]),
        }
        case = f"{batch} rows, {batch} adapters, {tokens} tokens"
        times = in_turn(work, settings.seconds(45), least=3, warm_up=1)
        groups[case] = times
        for name in list(work)[1:]:
            at_most = limit if name == "vblora store" else None
            rows.append(ratio_row(f"{case}: {name} / base model", times.ratio(name, "base model"), at_most=at_most))
        peft = {
            "base model": work["base model"],
            "PEFT LoRA": Generation(peft_with(base, batch), prompt, tokens, names),
        }
        times = in_turn(peft, settings.seconds(20), least=2, warm_up=1)  # apart: with 64 rows it takes far longer
        groups[f"{case}, PEFT"] = times
        rows.append(ratio_row(f"{case}: PEFT LoRA / base model", times.ratio("PEFT LoRA", "base model")))


def many_adapters(base: nn.Module, folder: Path, settings: Settings, rows: list[Row], groups: dict[str, Times]) -> None:
    written = len(list(folder.iterdir()))
    known = 20 if settings.quick else 10_000
    # Names of which several mean one folder: each is read, checked and held by itself.
    source = {f"user {number}": folder / str(number % written) for number in range(known)}
    model = models.twin(base)
    store = AdapterStore(model, source, bank=folder.parent / "bank.safetensors", slots=16)
    store.prefetch(["user 0"])
    gc.collect()
    before = resident_bytes()
    start = perf_counter()
    store.prefetch(source)
    store_seconds = perf_counter() - start
    kilobytes = (resident_bytes() - before) / known / 1e3
    packed = store.stats()["bytes"]["cold"] / known / 1e3
    rows.append(
        value_row(f"{known} adapters: read and checked", f"{store_seconds:.1f} s", store_seconds, "s", at_most=30)
    )
    rows.append(
        value_row("an adapter in memory", f"{kilobytes:.0f} KB ({packed:.1f} KB packed)", kilobytes, "KB", at_most=40)
    )
    fresh = iter(source)

    def admit() -> None:
        name = next(fresh)
        store.pin(name)
        store.unpin(name)

    times = in_turn({"vblora: admit one adapter": admit}, settings.seconds(10), most=min(known - 10, 300))
    groups["admission"] = times
    seconds = times.median("vblora: admit one adapter")
    rows.append(value_row("admit an adapter from memory", f"{1e3 * seconds:.1f} ms", 1e3 * seconds, "ms", at_most=5))


def switching(settings: Settings, rows: list[Row], groups: dict[str, Times]) -> None:
    model = models.Layout(models.llama_targets(2 if settings.quick else 30))
    config = vblora.TiedLoraConfig(
        r=1, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    done = 0
    for count in (2, 4) if settings.quick else (2, 50, 1000):
        for number in range(done, count):
            vblora.inject(model, config, adapter_name=str(number))
        done = count
        turn = iter(range(10**9))
        times = in_turn(
            {"vblora set_adapter": lambda turn=turn: vblora.set_adapter(model, str(next(turn) % 2))},
            settings.seconds(3),
        )
        groups[f"set_adapter, {count} adapters"] = times
        milliseconds = 1e3 * times.median("vblora set_adapter")
        rows.append(value_row(f"set_adapter among {count}", f"{milliseconds:.2f} ms", milliseconds, "ms", at_most=1))


@torch.no_grad()
def run(settings: Settings) -> Result:
    rows: list[Row] = []
    groups: dict[str, Times] = {}
    base = (models.small_llama() if settings.quick else models.smollm2()).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "adapters")
        folder.mkdir()
        write_adapters(base, folder, 4 if settings.quick else 64)
        mixed_batches(base, folder, settings, rows, groups)
        many_adapters(base, folder, settings, rows, groups)
        switching(settings, rows, groups)
    title = "serving: SmolLM2-135M, all linear layers, r=4"
    seconds = {name: times.seconds for name, times in groups.items()}
    return Result(title, rows, {"seconds": seconds}, bars(title, groups))
