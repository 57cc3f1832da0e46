"""Composing the factors of all layers, forward, backward and AdamW step, with no base model."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import vblora
from vblora.adapters import Target
from vblora.adapters.vblora import VBLoRAAdapter

from . import models
from .harness import (
    COPIED,
    Result,
    Settings,
    Times,
    bars,
    ceilings,
    copying,
    held_bytes,
    in_turn,
    peak_bytes,
    ratio_row,
    value_row,
)

R = models.LLAMA_ADAPTER["r"]


class Layers(torch.autograd.Function):
    """Replaces the layers: takes the factors, and returns a gradient for each."""

    @staticmethod
    def forward(ctx, grads: list[Tensor], *factors: Tensor) -> Tensor:
        ctx.grads = grads
        return factors[0].new_zeros(())

    @staticmethod
    def backward(ctx, _grad: Tensor):
        return None, *ctx.grads


class Side:
    """Parameters, the function that composes factors of them, and a gradient for each factor, as layers would return it."""

    def __init__(self, parameters: list[nn.Parameter], factors: Callable[[], list[Tensor]]) -> None:
        self.parameters = parameters
        self.factors = factors
        self.optimizers = models.optimizers(parameters)
        self.grads = [torch.randn_like(factor) for factor in factors()]

    def step(self, optimizers: tuple[str, ...] = ("fused",)) -> dict[str, float]:
        """Seconds of forward and backward, and of a step of each of these optimizers."""
        start = time.perf_counter()
        Layers.apply(self.grads, *self.factors()).backward()
        times = {"forward + backward": time.perf_counter() - start}
        for name in optimizers:
            start = time.perf_counter()
            self.optimizers[name].step()
            times[name] = time.perf_counter() - start
        for parameter in self.parameters:
            parameter.grad = None
        return times

    def settled_step(self) -> dict[str, float]:
        """Seconds of a whole step with fused AdamW, after a step that is not timed, which warms the caches."""
        self.step()
        return {"step": sum(self.step().values())}

    def state_bytes(self) -> int:
        """Bytes of the parameters, their gradients, and AdamW's two moments."""
        return 4 * held_bytes(self.parameters)


def ours(targets: list[Target], dtype: torch.dtype, num_candidates: int | None) -> tuple[Side, VBLoRAAdapter]:
    config = models.LLAMA_ADAPTER
    bank = vblora.VectorBank(config["num_vectors"], config["vector_length"])
    adapter = VBLoRAAdapter(targets, bank, r=R, topk=config["topk"], num_candidates=num_candidates, seed=0)

    def factors() -> list[Tensor]:
        adapter.begin_forward(dtype)
        made = [factor for slot in adapter.slots for factor in slot.forward_factors.factors[:2]]
        adapter.end_forward()
        return made

    return Side(list(adapter.parameters()), factors), adapter


def peft_vblora(targets: list[Target], compiled: bool = False) -> Side:
    model = models.peft_vblora(models.Layout(targets), models.LLAMA_ADAPTER).train()
    layers = [module for module in model.modules() if hasattr(module, "_get_lora_matrices")]
    if compiled:
        models.compile_mixing(model)

    def factors() -> list[Tensor]:
        return [factor for layer in layers for factor in layer._get_lora_matrices("default")]

    return Side([p for p in model.parameters() if p.requires_grad], factors)


def lora_bytes(targets: list[Target]) -> int:
    """Bytes of PEFT LoRA's factors in float32, their gradients, and AdamW's moments."""
    model = models.peft_lora(models.Layout(targets), R)
    return 4 * held_bytes([p for p in model.parameters() if p.requires_grad])


def floor_bytes(adapter: VBLoRAAdapter, dtype: torch.dtype) -> int:
    """Bytes that must move: the forward reads logits and writes sub-vectors, the backward reads their gradient and writes
    that of the logits, AdamW reads a parameter, its gradient and two moments, and writes all but the gradient. Candidates of
    the k selected columns, indices and weights are left out; so is the bank but for AdamW, as if caches held it."""
    logits, bank = adapter.logits.nbytes, adapter.bank.vectors.nbytes
    subvectors = adapter.num_subvectors * adapter.bank.vector_length * dtype.itemsize
    return logits + subvectors + subvectors + logits + 7 * (logits + bank)


def steps(times: Times) -> Times:
    """Whole steps, by optimizer, from the parts of each."""
    whole = {}
    for name, seconds in times.seconds.items():
        side, part = name.split(", ")
        if part in models.ADAMW:
            before = times.seconds[f"{side}, forward + backward"]
            whole[name] = [a + b for a, b in zip(before, seconds, strict=True)]
    return Times(whole)


def memory(targets: list[Target], make: Callable[[], Side]) -> int:
    """Peak memory of creating an adapter and training it for two steps, with the gradients of its factors."""

    def run() -> None:
        side = make()
        for _ in range(2):
            side.step()

    return peak_bytes(run)


def run(settings: Settings) -> Result:
    targets = models.llama_targets(1 if settings.quick else models.LLAMA_LAYERS)
    rows, groups, measurements = [], {}, {}
    float32, bfloat16 = torch.float32, torch.bfloat16

    candidates, adapter = ours(targets, float32, 128)
    half, _ = ours(targets, bfloat16, 128)
    # The floor is measured first. On a shared machine, memory bandwidth changes by the minute.
    turns = {"vblora": candidates.settled_step, "vblora bf16 factors": half.settled_step, "memcpy": copying()}
    alone = in_turn(turns, settings.seconds(15))
    del turns

    dense, _ = ours(targets, float32, None)
    eager = peft_vblora(targets)
    sides = {"vblora": candidates, "vblora bf16 factors": half, "vblora dense": dense, "PEFT VBLoRA": eager}
    if not settings.quick:
        sides["PEFT VBLoRA compiled"] = peft_vblora(targets, compiled=True)
    work = {name: partial(side.step, settings.optimizers) for name, side in sides.items()}
    peers = [name for name in work if name.startswith("PEFT")]
    parts = in_turn(work, settings.seconds(60), least=5)
    whole = steps(parts)
    groups["a step"] = whole
    for optimizer in settings.optimizers:
        for ours_, least in (("vblora", 15), ("vblora dense", 4)):
            for peer in peers:
                ratio = whole.ratio(f"{peer}, {optimizer}", f"{ours_}, {optimizer}")
                rows.append(ratio_row(f"{peer}'s step / {ours_}'s, AdamW {optimizer}", ratio, at_least=least))
    for name, dtype in (("vblora", float32), ("vblora bf16 factors", bfloat16)):
        share = floor_bytes(adapter, dtype) / COPIED
        against = Times(
            {"step": alone.seconds[f"{name}, step"], "floor": [share * copy for copy in alone.seconds["memcpy"]]}
        )
        ratio = against.ratio("step", "floor")
        figure = f"{ratio}, {against.median('step') * 1e3:.1f} of {against.median('floor') * 1e3:.1f} ms"
        rows.append(value_row(f"{name}'s step / its memcpy floor, AdamW fused", figure, ratio.middle, "×", at_most=2))

    state = {"vblora": candidates.state_bytes(), "PEFT VBLoRA": eager.state_bytes()}
    state["vblora"] += held_bytes(list(adapter.buffers()))
    share = state["vblora"] / state["PEFT VBLoRA"]
    mib = {name: f"{size / 2**20:.0f}" for name, size in state.items()}
    figure = f"{share:.3f} × ({mib['vblora']} of {mib['PEFT VBLoRA']} MiB)"
    rows.append(value_row("parameters, gradients, moments: vblora / PEFT VBLoRA", figure, share, "×", at_most=0.1))
    del work, sides, eager, dense, candidates, half
    peak = {
        "vblora, bf16 factors": memory(targets, lambda: ours(targets, bfloat16, 128)[0]),
        "vblora, fp32 factors": memory(targets, lambda: ours(targets, float32, 128)[0]),
        "PEFT VBLoRA": memory(targets, lambda: peft_vblora(targets)),
        "PEFT LoRA": lora_bytes(targets),
    }
    share = peak["vblora, bf16 factors"] / peak["PEFT LoRA"]
    mib = {name: f"{size / 2**20:.0f}" for name, size in peak.items()}
    figure = f"{share:.2f} × ({mib['vblora, bf16 factors']} of {mib['PEFT LoRA']} MiB)"
    rows.append(value_row("peak with bf16 factors / PEFT LoRA r=4's", figure, share, "×", at_most=1))
    measurements |= {"seconds": parts.seconds, "alone": alone.seconds, "state bytes": state, "peak bytes": peak}
    title = f"compose: {adapter.num_subvectors:,} sub-vectors, h=2048, b=256, k=2"
    return Result(title, rows, measurements | {"ceilings": vars(ceilings(settings))}, bars(title, groups))
