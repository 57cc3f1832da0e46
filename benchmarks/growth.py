"""How the time to compose grows with S, h, M, k and b."""

from __future__ import annotations

import statistics
import time

import torch
from matplotlib.figure import Figure

import vblora
from vblora.adapters import Target
from vblora.adapters.vblora import VBLoRAAdapter

from .harness import Result, Settings, in_turn, value_row

# Llama-2-7B's layout.
START = {"S": 39040, "h": 2048, "M": 128, "k": 2, "b": 256}
GROWING = {
    "S": [9760, 19520, 39040, 78080],
    "h": [256, 512, 1024, 2048, 4096],
    "M": [32, 64, 128, 256, 512, 1024, 2048],  # the last is the dense form
    "k": [1, 2, 3, 4, 6, 8],
    "b": [32, 64, 128, 256, 512],
}


class Step:
    def __init__(self, S: int, h: int, M: int, k: int, b: int) -> None:
        target = Target("layer", b * (S // 2), b * (S - S // 2))  # one layer as wide as it takes, of rank 1
        self.adapter = VBLoRAAdapter([target], vblora.VectorBank(h, b), r=1, topk=k, num_candidates=M, seed=0)
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        self.grads = [torch.randn_like(factor) for factor in self.factors()]

    def factors(self) -> list[torch.Tensor]:
        return list(self.adapter.compose(torch.bfloat16)[0][:2])

    def __call__(self) -> dict[str, float]:
        start = time.perf_counter()
        torch.autograd.backward(self.factors(), self.grads)
        middle = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"composing": middle - start, "AdamW": time.perf_counter() - middle}


def run(settings: Settings) -> Result:
    found: dict[str, dict[str, list[list[float]]]] = {}
    for axis, values in GROWING.items():
        values = values[:2] if settings.quick else values
        start = START | ({"S": 64} if settings.quick else {})
        work = {}
        for value in values:
            sizes = start | {axis: value // 100 if settings.quick and axis == "S" else value}
            sizes["M"] = min(sizes["M"], sizes["h"])
            work[str(value)] = Step(**sizes)
        times = in_turn(work, settings.seconds(12), least=7)
        found[axis] = {part: [times.seconds[f"{value}, {part}"] for value in work] for part in ("composing", "AdamW")}
    medians = {
        axis: {part: [statistics.median(seconds) for seconds in lists] for part, lists in parts.items()}
        for axis, parts in found.items()
    }

    def grown(axis: str) -> tuple[float, str]:
        whole = [sum(parts) for parts in zip(*medians[axis].values(), strict=True)]
        return whole[-1] / whole[0], f"({whole[0] * 1e3:.1f} to {whole[-1] * 1e3:.1f} ms)"

    rows = []
    growth, text = grown("S")
    times = GROWING["S"][len(medians["S"]["AdamW"]) - 1] / GROWING["S"][0]
    growth /= times
    rows.append(value_row(f"S × {times:g}: a sub-vector's time", f"{growth:.2f} × {text}", growth, "×", at_most=1.1))
    growth, text = grown("h")
    rows.append(value_row("h × 16 with M=128: time", f"{growth:.2f} × {text}", growth, "×", at_most=1.1))
    for axis, case in (("M", "M × 64, to dense: time"), ("k", "k × 8: time"), ("b", "b × 16: time")):
        growth, text = grown(axis)
        rows.append(value_row(case, f"{growth:.2f} × {text}", growth, "×"))
    title = f"growth: a step of composing from S={START['S']:,}, h=2048, M=128, k=2, b=256, bf16 factors, AdamW fused"
    return Result(title, rows, {"seconds": found, "sizes": GROWING}, draw(title, medians))


def draw(title: str, medians: dict[str, dict[str, list[float]]]) -> Figure:
    figure = Figure(figsize=(14, 3.6), layout="constrained")
    figure.suptitle(title)
    for axes, (axis, parts) in zip(figure.subplots(1, len(medians)), medians.items(), strict=True):
        sizes = GROWING[axis][: len(parts["AdamW"])]
        bottom = [0.0] * len(sizes)
        for part, color in (("composing", "tab:blue"), ("AdamW", "tab:gray")):
            heights = [seconds * 1e3 for seconds in parts[part]]
            axes.bar(range(len(sizes)), heights, bottom=bottom, label=part, color=color)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        axes.set_xticks(range(len(sizes)), sizes, rotation=60)
        axes.set_xlabel(axis)
        axes.set_ylabel("ms")
    axes.legend()
    return figure
