"""A training step of Llama-2-7B's shape, with random weights in bfloat16: by itself, with PEFT's adapters, with ours."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import vblora

from .. import models
from . import clock
from .phase import Phase

# Parts of the names of our kernels
OURS = (
    "admixture",
    "compose_kernel",
    "compose_any_k",
    "backward_rows",
    "backward_bank",
    "backward_popular",
    "backward_split",
)
STEPS = 5
QUICK = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}


def run(phase: Phase) -> None:
    start = time.monotonic()
    base = new_model(phase)
    clock.synchronize(phase.device)
    held = allocated(phase)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    phase.row(
        "model",
        f"{parameters / 1e9:.2f} G parameters, {held / 2**30:.2f} GiB, made in {time.monotonic() - start:.0f} s",
    )
    lengths = (8,) if phase.quick else (512, 2048)
    sides: dict[str, Callable[[nn.Module], tuple[nn.Module, Iterable]]] = {
        "base": lambda model: (model, []),
        "PEFT LoRA r=4": peft_lora,
        "ours": ours,
        "PEFT VBLoRA": peft_vblora,  # last: it takes the most time and memory
    }
    for name, adapt in sides.items():
        if phase.left() < 5:
            phase.skip(name, "no time left")
            continue
        with fitting(phase, name):
            side(phase, name, base, adapt, lengths, held)


@contextlib.contextmanager
def fitting(phase: Phase, case: str) -> Iterator[None]:
    """That something does not fit into memory is a result."""
    with phase.attempt(case):
        try:
            yield
        except torch.OutOfMemoryError as error:
            phase.row(case, f"out of memory: {str(error).splitlines()[0][:150]}", out_of_memory=True)


def new_model(phase: Phase) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(use_cache=False, **(QUICK if phase.quick else {}))  # the defaults are Llama-2-7B's
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(phase.device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).train()


def peft_lora(model: nn.Module) -> tuple[nn.Module, Iterable]:
    adapted = models.peft_lora(model)
    return adapted, [parameter for parameter in adapted.parameters() if parameter.requires_grad]


def peft_vblora(model: nn.Module) -> tuple[nn.Module, Iterable]:
    adapted = models.peft_vblora(model, models.LLAMA_ADAPTER)
    return adapted, [parameter for parameter in adapted.parameters() if parameter.requires_grad]


def ours(model: nn.Module) -> tuple[nn.Module, Iterable]:
    adapted = models.ours(model, models.LLAMA_ADAPTER, seed=0)
    return adapted, vblora.parameter_groups(adapted)


def side(phase: Phase, name: str, base: nn.Module, adapt: Callable, lengths: Iterable[int], held: int) -> None:
    model, trained = adapt(models.twin(base))
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
    for length in lengths:
        for checkpointing in (False, True):
            case = f"{name}, 1 × {length}" + (", checkpointing" if checkpointing else "")
            if phase.left() < 3:
                phase.skip(case, "no time left")
                continue
            with fitting(phase, case):
                measure(phase, case, model, optimizer, length, checkpointing, held)
            free(phase)
    del model, trained, optimizer
    free(phase)


def measure(
    phase: Phase,
    case: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    length: int,
    checkpointing: bool,
    held: int,
) -> None:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if checkpointing:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        inner.gradient_checkpointing_disable()
    ids = torch.randint(3, 60, (1, length), device=phase.device)
    embedding = inner.get_input_embeddings()

    def step() -> Tensor:
        if optimizer is None:  # a frozen model still takes its gradients back to where it begins
            embedded = embedding(ids).detach().requires_grad_()
            loss = model(inputs_embeds=embedded, labels=ids).loss
        else:
            optimizer.zero_grad(set_to_none=True)
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        return loss

    for _ in range(1 if phase.quick else 3):
        step()
    if phase.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    loss = float(step().detach())
    peak = torch.cuda.max_memory_allocated() if phase.on_gpu else 0
    whole = clock.awaited(step, phase.device, 1 if phase.quick else STEPS)
    host = clock.issued(step, phase.device, 1 if phase.quick else STEPS)
    result = f"{whole * 1e3:,.1f} ms a step (host {host * 1e3:,.1f} ms), peak {(peak - held) / 2**30:.2f} GiB above the weights"
    finite = loss == loss and abs(loss) != float("inf")
    phase.row(case, result, ok=finite, seconds=whole, host=host, peak_bytes=peak, weights_bytes=held, loss=loss)
    if not checkpointing and phase.left() > 5:
        with phase.attempt(f"profile of {case}"):
            profiled(phase, case, step)


def profiled(phase: Phase, case: str, step: Callable[[], object]) -> None:
    """One step by kernel."""
    activity = ProfilerActivity.CUDA if phase.on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        step()
        clock.synchronize(phase.device)
    name = "self_device_time_total" if phase.on_gpu else "self_cpu_time_total"
    spent = {event.key: [getattr(event, name), event.count] for event in profiler.key_averages()}
    kernels = {key: both for key, both in spent.items() if both[0] > 0}
    most = sorted(kernels, key=lambda key: kernels[key][0], reverse=True)
    total = sum(time for time, _ in kernels.values())
    own = sum(time for key, (time, _) in kernels.items() if any(part in key for part in OURS))
    count = sum(count for _, count in kernels.values())
    result = f"{total / 1e3:,.1f} ms in {count:,} launches, of which our kernels {own / 1e3:,.2f} ms"
    by_kernel = {key[:200]: kernels[key] for key in most[:25]}
    phase.row(f"profile of {case}", result, detail=True, microseconds_and_count=by_kernel)


def allocated(phase: Phase) -> int:
    return torch.cuda.memory_allocated() if phase.on_gpu else 0


def free(phase: Phase) -> None:
    gc.collect()
    if phase.on_gpu:
        torch.cuda.empty_cache()
