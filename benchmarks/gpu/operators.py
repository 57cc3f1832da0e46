"""Whether results are right: bits against the CPU kernels at Llama-2-7B's size, repeats, and the tests that take a device."""

from __future__ import annotations

import importlib.util
import itertools

import torch
from torch import Tensor

import vblora  # noqa: F401  # its operators

from . import inputs, suite
from .phase import Phase

DTYPES = (torch.float32, torch.bfloat16)
REPEATS = 20
TESTS = [f"tests/{name}" for name in ("ops", "adapters", "layers", "model", "checkpoint")]


def run(phase: Phase) -> None:
    results(phase, 100 if phase.quick else inputs.LLAMA_ROWS)
    where = "cuda" if phase.on_gpu else "cpu"
    selected = f"{where} and not emulated"
    if importlib.util.find_spec("expecttest") is None:
        phase.skip("opcheck", "it needs expecttest, which is not there: bring it with --wheels")
        selected += " and not opcheck"
    quick = phase.quick and not phase.on_gpu
    paths = ["tests/ops/test_compose.py"] if quick else TESTS
    suite.run(phase, f"tests on {where}", [*paths, "-k", selected])


def results(phase: Phase, rows: int) -> None:
    held = []
    for dense, dtype in itertools.product((False, True), DTYPES):
        name = f"{'dense' if dense else 'candidates'}, {str(dtype).removeprefix('torch.')}"
        with phase.attempt(f"bits, {name}"):
            held.append(forward_bits(phase, rows, dense, dtype, name))
            for choice in inputs.CHOICES:
                held += backward_bits(phase, rows, dense, dtype, choice, name)
    with phase.attempt("draws"):
        held.append(draws(phase, rows))
    phase.row(f"against the CPU and float64, S={rows:,}", f"{sum(held)} of {len(held)} comparisons hold", ok=all(held))
    for dense in (False, True):
        name = f"{REPEATS} repeats, {'dense' if dense else 'candidates'}"
        with phase.attempt(name):
            repeats(phase, rows, dense, name)


def differing(result: Tensor, expected: Tensor) -> int:
    """Elements whose bits differ."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[result.itemsize]
    return int((result.contiguous().view(integer).cpu() != expected.contiguous().view(integer).cpu()).sum())


def same(phase: Phase, case: str, results: dict[str, tuple[Tensor, Tensor]]) -> bool:
    found = {name: differing(*pair) for name, pair in results.items()}
    wrong = {name: count for name, count in found.items() if count}
    result = "differ: " + ", ".join(f"{n} of {name}" for name, n in wrong.items()) if wrong else "all bits equal"
    return phase.row(case, f"{result} ({', '.join(found)})", ok=not wrong, detail=True)


def forward_bits(phase: Phase, rows: int, dense: bool, dtype: torch.dtype, name: str) -> bool:
    there = inputs.make(rows, dense=dense, dtype=dtype, choice="uniform", device=phase.device, seed=0)
    here = there.to("cpu")
    results = dict(
        zip(("sub-vectors", "indices", "weights"), zip(there.admixture(), here.admixture(), strict=True), strict=True)
    )
    results["compose"] = there.compose(), here.compose()
    return same(phase, f"forward against the CPU, {name}", results)


def backward_bits(phase: Phase, rows: int, dense: bool, dtype: torch.dtype, choice: str, name: str) -> list[bool]:
    there = inputs.make(rows, dense=dense, dtype=dtype, choice=choice, device=phase.device, seed=1)
    here = there.to("cpu")
    grad_logits, grad_bank = there.admixture_backward()
    want_logits, want_bank = here.admixture_backward()
    few = here.vectors.flatten().long().bincount(minlength=inputs.VECTORS) <= inputs.popular_from(rows)
    results = {
        "grad_logits": (grad_logits, want_logits),
        f"grad_bank of {int(few.sum())} vectors": (grad_bank.cpu()[few], want_bank[few]),
    }
    held = same(phase, f"backward against the CPU, {name}, {choice}", results)
    exact = torch.zeros_like(grad_bank, dtype=torch.float64)
    terms = there.weights.double()[:, :, None] * there.grad_subvectors.double()[:, None]
    exact.index_add_(0, there.vectors.flatten().long(), terms.flatten(0, 1))
    error = float((grad_bank.double() - exact).norm() / exact.norm())
    case = f"grad_bank against float64, {name}, {choice}"
    return [held, phase.row(case, f"relative error {error:.1e}", ok=error < 1e-5, detail=True)]


def draws(phase: Phase, rows: int) -> bool:
    results = {}
    for name, columns in (("candidates", inputs.CANDIDATES), ("dense", None)):
        drawn = []
        for device in (phase.device, "cpu"):
            logits = torch.empty(rows, columns or inputs.VECTORS, device=device)
            candidates = None if columns is None else torch.empty(logits.shape, dtype=torch.int16, device=device)
            torch.ops.vblora.draw_logits_(logits, candidates, inputs.VECTORS, 2405, 0.1)
            drawn.append((logits, candidates))
        results[f"logits, {name}"] = drawn[0][0], drawn[1][0]
        if columns is not None:
            results["their candidates"] = drawn[0][1], drawn[1][1]
    return same(phase, "draws against the CPU", results)


def repeats(phase: Phase, rows: int, dense: bool, name: str) -> None:
    given = inputs.make(rows, dense=dense, dtype=torch.bfloat16, choice="Zipf", device=phase.device, seed=2)

    def everything() -> list[Tensor]:
        return [*given.admixture(), given.compose(), *given.admixture_backward()]

    first = everything()
    differ = sum(
        any(not torch.equal(bits(x), bits(y)) for x, y in zip(everything(), first, strict=True)) for _ in range(REPEATS)
    )
    phase.row(name, f"{differ} differ" if differ else "bitwise equal", ok=not differ)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize])
