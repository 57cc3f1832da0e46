"""How long each operator takes, beside the time that its bytes would take a copy; and a whole step of composing."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

import vblora

from . import clock, inputs
from .inputs import Inputs
from .phase import Phase

SETS = 4  # of inputs, in turn
ROWS = (inputs.LLAMA_ROWS, 9_000, 6_000, 32)  # the largest first: it matters most, should there be no time for all
DTYPES = (torch.bfloat16, torch.float32)


def run(phase: Phase) -> None:
    rate = clock.copy_rate(phase.device, phase.quick)
    phase.row("copy rate that floors are of", f"{rate / 1e12:.3g} TB/s", bytes_per_second=rate)
    # Before the kernels: a step is what counts in the end.
    for dense in (False, True):
        with phase.attempt(f"composing step, {form(dense)}"):
            composing_step(phase, rate, dense)
    for rows in (20,) if phase.quick else ROWS:
        for dense, dtype in itertools.product((False, True), DTYPES):
            for choice in inputs.CHOICES:
                if phase.left() < 5:
                    phase.skip(f"S={rows:,}, {form(dense)}, {choice}", "no time left")
                    continue
                with phase.attempt(f"S={rows:,}, {form(dense)}, {choice}"):
                    operators(phase, rate, rows, dense, dtype, choice)


def form(dense: bool) -> str:
    return f"M={inputs.VECTORS if dense else inputs.CANDIDATES}"


def operators(phase: Phase, rate: float, rows: int, dense: bool, dtype: torch.dtype, choice: str) -> None:
    """The backward with this choice of bank vectors; what does not depend on it, with the uniform one."""
    sets = [
        inputs.make(rows, dense=dense, dtype=dtype, choice=choice, device=phase.device, seed=seed)
        for seed in range(SETS)
    ]
    one = sets[0]
    name = f"S={rows:,}, {form(dense)}, {str(dtype).removeprefix('torch.')}"
    # Read and written at least, bank and vectors' candidates as if a cache held all but the first reading.
    logits, bank, factors = one.logits.nbytes, one.bank.nbytes, one.grad_subvectors.nbytes
    candidates = 0 if dense else one.candidates.nbytes
    entries = one.indices.nbytes + one.weights.nbytes
    chosen = 0 if dense else 2 * one.indices.numel()

    def time(operator: str, call: Callable[[Inputs], object], least: int, detail: bool) -> None:
        calls = [lambda given=given: call(given) for given in sets]
        warm = clock.replayed(calls, phase.device, rounds=3 if phase.quick else 40)
        cold = clock.flushed(calls, phase.device, rounds=3 if phase.quick else 60)
        floor = least / rate
        result = f"{clock.microseconds(warm)}, flushed {clock.microseconds(cold)}; {least / 1e6:,.1f} MB: floor "
        result += f"{clock.microseconds(floor)} ({warm / floor:.2f} ×, flushed {cold / floor:.2f} ×)"
        data = {"warm": warm, "flushed": cold, "floor": floor, "bytes": least, "rows": rows, "dense": dense}
        phase.row(f"{operator}, {name}", result, detail=detail, choice=choice, dtype=str(dtype), **data)

    main = rows == ROWS[0] and dtype == torch.bfloat16
    if choice == inputs.CHOICES[0]:
        time("admixture", Inputs.admixture, logits + candidates + bank + factors + entries, not main)
        time(
            "backward, logits alone",
            lambda given: given.admixture_backward(True, False),
            logits + bank + factors + entries + chosen,
            True,
        )
        if not dense:
            time("compose", Inputs.compose, one.vectors.nbytes + one.weights.nbytes + bank + factors, not main)
    least = logits + 2 * bank + factors + entries + chosen
    time(f"backward, {choice}", Inputs.admixture_backward, least, not main)


def composing_step(phase: Phase, rate: float, dense: bool) -> None:
    """Factors of all layers of Llama-2-7B in bfloat16, from their gradients back, and AdamW: what an adapter costs a step besides
    the layers' own products."""
    from vblora.adapters import VBLoRAAdapter

    from ..models import llama_targets

    bank = vblora.VectorBank(inputs.VECTORS, inputs.LENGTH, device=phase.device)
    targets = llama_targets(1 if phase.quick else 32)
    adapter = VBLoRAAdapter(
        targets, bank, num_candidates=None if dense else inputs.CANDIDATES, seed=0, device=phase.device
    )
    parameters = list(adapter.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True, capturable=phase.on_gpu)

    def factors() -> list[Tensor]:
        return [factor for pair in adapter.compose(torch.bfloat16) for factor in (pair.A, pair.B)]

    grads = [torch.randn_like(factor) for factor in factors()]

    def step() -> None:
        torch.autograd.backward(factors(), grads)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # last: what a capture frees is then its own

    def forward() -> None:
        with torch.no_grad():
            factors()

    for _ in range(3):
        step()
    rounds = 3 if phase.quick else 20
    eager = clock.awaited(step, phase.device, rounds)
    host = clock.issued(step, phase.device, rounds)
    composed = clock.replayed([forward], phase.device, rounds)
    whole = clock.replayed([step], phase.device, rounds, repeats=1)
    # Forward: logits, candidates -> sub-vectors. Backward: their gradient -> that of the logits. AdamW reads a parameter, its
    # gradient and two moments, and writes all but the gradient.
    subvectors = sum(grad.nbytes for grad in grads)
    trained = sum(parameter.nbytes for parameter in parameters)
    candidates = 0 if dense else adapter.candidates.nbytes
    least = adapter.logits.nbytes + candidates + subvectors + subvectors + adapter.logits.nbytes + 7 * trained
    floor = least / rate
    result = (
        f"{clock.microseconds(whole)} as a graph, {clock.microseconds(eager)} eager, host {clock.microseconds(host)}; "
    )
    result += f"floor {clock.microseconds(floor)} ({whole / floor:.2f} ×); forward alone {clock.microseconds(composed)}"
    phase.row(
        f"composing step with AdamW, S={adapter.num_subvectors:,}, {form(dense)}",
        result, graph=whole, eager=eager, host=host, forward=composed, floor=floor, bytes=least,
    )  # fmt: skip
