"""Prefill and token-by-token decoding of SmolLM2-135M: with adapters, unmerged and merged."""

from __future__ import annotations

import torch
from torch import nn
from transformers import DynamicCache

import vblora
from vblora.adapters.base import keeping_factors

from . import models
from .harness import Result, Settings, bars, in_turn, ratio_row


class Decoder:
    """A model in the middle of a text. Each call decodes one more token."""

    def __init__(self, model: nn.Module, prompt: torch.Tensor) -> None:
        self.model = model
        self.prompt = prompt
        self.restart()

    def prefill(self) -> None:
        self.model(input_ids=self.prompt, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)

    def restart(self) -> None:
        self.cache = DynamicCache()
        self.token = self.prompt[:, :1]

    def decode(self) -> None:
        output = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = output.logits[:, -1:].argmax(-1)


@torch.no_grad()
@keeping_factors()  # as `generate` does
def run(settings: Settings) -> Result:
    rows, groups = [], {}
    adapter = models.SMOLLM2_ADAPTER
    for dtype in (torch.float32, torch.bfloat16):
        base = (models.small_llama() if settings.quick else models.smollm2()).to(dtype).eval().requires_grad_(False)
        made = {
            "base model": base,
            "vblora": models.ours(models.twin(base), adapter),
            "PEFT LoRA": models.peft_lora(models.twin(base)),
            "vblora merged": vblora.merge(models.ours(models.twin(base), adapter)),
        }
        prompt = torch.randint(3, 500, (1, 8 if settings.quick else 128), generator=torch.Generator().manual_seed(0))
        sides = {name: Decoder(model.eval(), prompt) for name, model in made.items()}
        name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        prefill = in_turn({key: side.prefill for key, side in sides.items()}, settings.seconds(25), least=11)
        decode = in_turn({key: side.decode for key, side in sides.items()}, settings.seconds(40), least=11, most=500)
        for case, times in (("prefill of 128", prefill), ("decoding a token", decode)):
            groups[f"{case}, {name}"] = times
            ratio = times.ratio("vblora", "PEFT LoRA")
            rows.append(ratio_row(f"{case}, {name}: vblora / PEFT LoRA r=4", ratio, at_most=1.0))
            ratio = times.ratio("vblora merged", "base model")
            rows.append(ratio_row(f"{case}, {name}: vblora merged / base model", ratio, at_most=1.01))
    title = "inference: SmolLM2-135M, all linear layers, r=4"
    seconds = {name: times.seconds for name, times in groups.items()}
    return Result(title, rows, {"seconds": seconds}, bars(title, groups))
