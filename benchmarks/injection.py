"""Injecting an adapter into the layout of Llama-2-7B, saving it, and loading it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import peft

import vblora

from . import models
from .harness import Result, Settings, Times, bars, in_turn, peak_bytes, value_row


def run(settings: Settings) -> Result:
    targets = models.llama_targets(1 if settings.quick else models.LLAMA_LAYERS)
    adapter = models.LLAMA_ADAPTER
    with tempfile.TemporaryDirectory() as folder:
        mine, theirs = Path(folder, "vblora"), Path(folder, "peft")
        model = models.ours(models.Layout(targets), adapter, seed=0)
        other = models.peft_vblora(models.Layout(targets), adapter)
        # A model takes only one adapter of a name, so each call needs a new layout.
        fresh = iter(lambda: models.Layout(targets), None)
        work: dict[str, Callable[[], object]] = {
            "vblora inject": lambda: models.ours(next(fresh), adapter, seed=0),
            "vblora save": lambda: vblora.save(model, mine),
            "vblora load": lambda: vblora.load(next(fresh), mine),
            "PEFT VBLoRA inject": lambda: models.peft_vblora(next(fresh), adapter),
            "PEFT VBLoRA save": lambda: other.save_pretrained(theirs),
            "PEFT VBLoRA load": lambda: peft.PeftModel.from_pretrained(next(fresh), theirs),
            "the layout alone": lambda: next(fresh),
        }
        times = in_turn(work, settings.seconds(30), warm_up=1)
        # The result is dropped at once, so the peak includes its memory.
        peak = {name: peak_bytes(function) for name, function in work.items()}
    rows = []
    for name in work:
        if name.startswith("vblora"):
            beside = name.replace("vblora", "PEFT VBLoRA")
            seconds = times.median(name)
            figure = f"{seconds:.2f} s, {peak[name] / 2**20:.0f} MiB"
            figure += f" (PEFT VBLoRA: {times.median(beside):.2f} s, {peak[beside] / 2**20:.0f} MiB)"
            rows.append(value_row(f"{name.split()[1]}: time, peak memory", figure, seconds, "s", at_most=1))
    title = "injection, save, load: Llama-2-7B's layout, r=4, h=2048, b=256, k=2"
    return Result(title, rows, {"seconds": times.seconds, "peak bytes": peak}, bars(title, {"": Times(times.seconds)}))
