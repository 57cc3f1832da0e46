"""Dispatcher calls of a training step, and CUDA launches of our operators, by the number of layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from tests.emulation import build

from . import models
from .harness import Result, Row, Settings

ADAPTER = {"r": 4, "num_vectors": 256, "vector_length": 32, "topk": 2, "target_modules": "all-linear"}


class Calls(TorchDispatchMode):
    """Counts the calls that reach a device: operators below autograd, except those that only create a view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def llama(layers: int) -> nn.Module:
    """The target layers of a Llama of this depth, 7 for each of its layers, but narrow."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, use_cache=False, **sizes)).train()


def calls_of_a_step(model: nn.Module) -> int:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    ids = torch.randint(0, 64, (1, 8))
    with Calls() as calls:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return calls.count


def calls_of_the_base(model: nn.Module) -> int:
    embedded = model.requires_grad_(False).get_input_embeddings()(torch.randint(0, 64, (1, 8))).requires_grad_()
    with Calls() as calls:
        model(inputs_embeds=embedded, labels=torch.randint(0, 64, (1, 8))).loss.backward()
    return calls.count


def calls_of_composing(model: nn.Module) -> int:
    """Calls of composing all factors, their backward and the optimizer's step, without the layers."""
    adapter = next(iter(model.vblora.values())) if hasattr(model.vblora, "values") else model.vblora
    optimizer = torch.optim.AdamW(adapter.parameters(), fused=True)
    grads: list[torch.Tensor] = []
    with Calls() as calls:
        factors = [factor for pair in adapter.compose(torch.float32) for factor in pair[:2]]
        grads += [factor.detach() for factor in factors]
        torch.autograd.backward(factors, grads)
        optimizer.step()
    return calls.count


def cuda_launches(layers: int) -> int:
    """Launches of our operators in a training step, forward and backward."""
    adapter = models.ours(llama(layers), ADAPTER).vblora.default
    with build.in_place_of_the_cpu_kernels():
        build.launches()
        factors = [factor for pair in adapter.compose(torch.float32) for factor in pair[:2]]
        torch.autograd.backward(factors, [torch.ones_like(factor) for factor in factors])
        return len(build.launches())


def run(settings: Settings) -> Result:
    sizes = [1, 2] if settings.quick else [8, 16, 32]
    makers: dict[str, Callable[[nn.Module], nn.Module]] = {
        "vblora": lambda model: models.ours(model, ADAPTER),
        "PEFT LoRA": models.peft_lora,
        "PEFT VBLoRA": lambda model: models.peft_vblora(model, ADAPTER),
    }
    counts = {name: [calls_of_a_step(make(llama(size))) for size in sizes] for name, make in makers.items()}
    base = [calls_of_the_base(llama(size)) for size in sizes]
    composing = [calls_of_composing(models.ours(llama(size), ADAPTER)) for size in sizes]
    targets = [7 * size for size in sizes]

    constant = composing[0] == composing[-1]
    text = f"{composing[-1]} calls for {targets[0]} as for {targets[-1]} layers" if constant else str(composing)
    rows = [
        Row("composing, its backward and AdamW fused: constant in the number of layers", text, "constant", constant)
    ]
    per_layer = {
        name: (of_all[-1] - base[-1] - (composing[-1] if name == "vblora" else 0)) / targets[-1]
        for name, of_all in counts.items()
    }
    for name, of_all in counts.items():
        text = f"{of_all[-1]:,}, of which {base[-1]:,} the base model's; {per_layer[name]:.1f} more a layer"
        rows.append(Row(f"dispatcher calls of a step, {targets[-1]} layers: {name}", text))
    launches = [cuda_launches(size) for size in sizes]
    case = f"CUDA launches to compose and back, {', '.join(map(str, targets))} layers (emulation)"
    rows.append(Row(case, ", ".join(map(str, launches)), "≤ 4", max(launches) <= 4))
    title = "launches: a training step of a Llama of narrow layers"
    found = {"targets": targets, "base": base, "composing": composing, "calls": counts, "CUDA launches": launches}
    return Result(title, rows, found, draw(title, targets, {"base model": base, **counts}))


def draw(title: str, targets: list[int], counts: dict[str, list[int]]) -> Figure:
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots()
    for name, of_all in counts.items():
        axes.plot(targets, of_all, marker="o", label=name)
    axes.set_xlabel("target layers")
    axes.set_ylabel("dispatcher calls")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure
