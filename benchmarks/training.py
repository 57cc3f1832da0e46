"""Training steps of SmolLM2-135M, all linear layers adapted."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import nn

from . import models
from .compose import steps
from .harness import Result, Settings, Times, bars, in_turn, ratio_row

SHAPES = {"1 × 32": (1, 32), "4 × 128": (4, 128)}
DTYPES = {"fp32": None, "bf16 autocast": torch.bfloat16}


class Training:
    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.optimizers = models.optimizers([p for p in model.parameters() if p.requires_grad])

    def step(self, ids: torch.Tensor, dtype: torch.dtype | None, optimizers: tuple[str, ...]) -> dict[str, float]:
        """Seconds of forward and backward, and of a step of each of these optimizers."""
        start = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        times = {"forward + backward": time.perf_counter() - start}
        for name in optimizers:
            start = time.perf_counter()
            self.optimizers[name].step()
            times[name] = time.perf_counter() - start
        self.optimizers["fused"].zero_grad()
        return times


def base_step(model: nn.Module, ids: torch.Tensor, dtype: torch.dtype | None) -> None:
    """The frozen model alone: forward, and backward to its embeddings."""
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        model(inputs_embeds=embedded, labels=ids).loss.backward()


def run(settings: Settings) -> Result:
    base = models.small_llama() if settings.quick else models.smollm2()
    base.requires_grad_(False).train()
    base.config.use_cache = False
    adapter = models.SMOLLM2_ADAPTER
    sides = {
        "vblora": Training(models.ours(models.twin(base), adapter)),
        "PEFT LoRA": Training(models.peft_lora(models.twin(base))),
        "PEFT VBLoRA": Training(models.peft_vblora(models.twin(base), adapter)),
    }
    if not settings.quick:
        sides["PEFT VBLoRA compiled"] = Training(models.peft_vblora(models.twin(base), adapter))
        models.compile_mixing(sides["PEFT VBLoRA compiled"].model)
    rows, groups = [], {}
    for dtype_name, dtype in DTYPES.items():
        for shape_name, shape in SHAPES.items():
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(3, 500, (1, 8) if settings.quick else shape, generator=generator)
            here = sides
            if shape[0] > 1:  # no target there for PEFT's VB-LoRA, and it would take minutes
                here = {name: side for name, side in sides.items() if "VBLoRA" not in name}
            work = {name: partial(side.step, ids, dtype, settings.optimizers) for name, side in here.items()}
            whole = steps(in_turn(work, settings.seconds(40 if shape[0] == 1 else 70), least=7))
            floor = in_turn({"base model": partial(base_step, base, ids, dtype)}, settings.seconds(8), warm_up=1)
            groups[f"{shape_name} tokens, {dtype_name}"] = Times(whole.seconds | floor.seconds)
            case = f"{shape_name}, {dtype_name}, AdamW"
            for optimizer in settings.optimizers:
                ratio = whole.ratio(f"vblora, {optimizer}", f"PEFT LoRA, {optimizer}")
                rows.append(ratio_row(f"{case} {optimizer}: vblora / PEFT LoRA r=4", ratio, at_most=1.02))
            for peer in [name for name in here if name.startswith("PEFT VBLoRA")]:
                for optimizer in settings.optimizers:
                    ratio = whole.ratio(f"{peer}, {optimizer}", f"vblora, {optimizer}")
                    rows.append(ratio_row(f"{case} {optimizer}: {peer} / vblora", ratio, at_least=1.25))
    title = "training step: SmolLM2-135M, all linear layers, r=4, h=2048, b=192, k=2"
    seconds = {name: times.seconds for name, times in groups.items()}
    return Result(title, rows, {"seconds": seconds}, bars(title, groups))
