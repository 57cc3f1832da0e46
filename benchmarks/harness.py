"""What every benchmark shares: settings, runs in turn, peak memory, the machine's ceilings, rows with targets, figures."""

import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import vblora


@dataclass(frozen=True)
class Settings:
    """What ``python -m benchmarks`` was asked for.

    quick: small sizes and few rounds, to check that everything runs. The numbers mean nothing.
    optimizers: the implementations of AdamW to time, of ``models.ADAMW``.
    """

    quick: bool = False
    optimizers: tuple[str, ...] = ("fused",)

    def seconds(self, full: float) -> float:
        """How many seconds to repeat something for: `full`, or less if quick."""
        return 0.0 if self.quick else full


# Runs in turn


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of the ratios of runs in the same round."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} × ({self.low:.2f} to {self.high:.2f})"


@dataclass
class Times:
    """Seconds by name; the i-th of each name are of the same round."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, of: str) -> Ratio:
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[of], strict=True)]
        return Ratio(*statistics.quantiles(ratios, n=4)) if len(ratios) > 1 else Ratio(*ratios * 3)


def in_turn(
    work: Mapping[str, Callable[[], object]], seconds: float, *, least: int = 3, most: int = 200, warm_up: int = 3
) -> Times:
    """Runs all of ``work`` round by round, each time in another order, for about ``seconds``.

    A function that returns a dict of seconds has timed its own parts, which go into the table as ``"name, part"``.
    """
    names = list(work)
    times: dict[str, list[float]] = {}
    start = time.perf_counter()
    least, warm_up = (1, 1) if seconds == 0 else (least, warm_up)
    gc.collect()
    gc.disable()  # it would hit the one or the other
    try:
        for round_ in range(-warm_up, most):
            if round_ == 0:
                start = time.perf_counter()
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                begin = time.perf_counter()
                parts = work[name]()
                parts = {f"{name}, {key}": s for key, s in parts.items()} if isinstance(parts, dict) else {}
                for key, value in (parts or {name: time.perf_counter() - begin}).items():
                    if round_ >= 0:
                        times.setdefault(key, []).append(value)
            if round_ + 1 >= least and time.perf_counter() - start >= seconds:
                break
    finally:
        gc.enable()
    return Times(times)


# Memory


def peak_bytes(function: Callable[[], object]) -> int:
    """Peak bytes of the tensors that ``function`` allocates, by torch's own allocator: exact, without sampling."""
    gc.collect()
    vblora.empty_cache()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0))


def held_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


# The machine


@dataclass(frozen=True)
class Ceilings:
    """The machine's ceilings: bytes read and written by a large copy, and multiply-adds of large matrices, per second."""

    bytes_per_second: float
    flops: float  # float32
    flops_bf16: float


COPIED = 1 << 29


def copying() -> Callable[[], object]:
    """A copy that reads and writes ``COPIED`` bytes in all."""
    source, target = torch.ones(COPIED // 8), torch.ones(COPIED // 8)
    return lambda: target.copy_(source)


def ceilings(settings: Settings) -> Ceilings:
    width = 64 if settings.quick else 1536

    def fastest(function: Callable[[], object]) -> float:
        times = in_turn({"": function}, settings.seconds(1.0), least=7)
        return min(times.seconds[""])

    matrices = {dtype: torch.randn(width, width).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    flops = {dtype: 2 * width**3 / fastest(lambda m=m: torch.mm(m, m)) for dtype, m in matrices.items()}
    return Ceilings(
        COPIED / fastest(copying()),
        flops[torch.float32],
        flops[torch.bfloat16],
    )


def machine() -> dict[str, object]:
    import peft
    import transformers

    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "vblora": vblora.__version__,
    }


# What is reported


@dataclass(frozen=True)
class Row:
    """A row of the table. ``holds`` is None without a target."""

    case: str
    figure: str
    target: str = ""
    holds: bool | None = None

    @property
    def verdict(self) -> str:
        return {True: "holds", False: "**missed**", None: ""}[self.holds]


def ratio_row(case: str, ratio: Ratio, *, at_most: float | None = None, at_least: float | None = None) -> Row:
    return value_row(case, str(ratio), ratio.middle, "×", at_most=at_most, at_least=at_least)


def value_row(
    case: str, figure: str, value: float, unit: str, *, at_most: float | None = None, at_least: float | None = None
) -> Row:
    if at_most is not None:
        return Row(
            case, figure, f"≤ {at_most:.3g} {unit}" if at_most < 1 else f"≤ {at_most:g} {unit}", value <= at_most
        )
    if at_least is not None:
        return Row(case, figure, f"≥ {at_least:g} {unit}", value >= at_least)
    return Row(case, figure)


@dataclass
class Result:
    """The results of a benchmark: rows for the table, all measurements for the JSON file, and a figure."""

    title: str
    rows: list[Row]
    measurements: dict[str, object]
    figure: Figure
    seconds: float = field(default=0.0)

    def as_json(self) -> dict[str, object]:
        return {
            "title": self.title,
            "machine": machine(),
            "seconds": round(self.seconds, 1),
            "rows": [asdict(row) for row in self.rows],
            "measurements": self.measurements,
        }

    @classmethod
    def from_json(cls, found: dict) -> "Result":
        """The result that :meth:`as_json` was called on, without its figure."""
        rows = [Row(**row) for row in found["rows"]]
        return cls(found["title"], rows, found["measurements"], Figure(), found["seconds"])


def table(results: list[Result]) -> str:
    lines = ["| benchmark | | figure | target | |", "|---|---|---|---|---|"]
    for result in results:
        for i, row in enumerate(result.rows):
            title = f"**{result.title}**" if i == 0 else ""
            lines.append(f"| {title} | {row.case} | {row.figure} | {row.target} | {row.verdict} |")
    return "\n".join(lines)


def bars(title: str, groups: Mapping[str, Times]) -> Figure:
    """Medians in milliseconds as bars with quartiles, one panel for each group."""
    count = max(len(times.seconds) for times in groups.values())
    figure = Figure(figsize=(9, len(groups) * (0.35 * count + 0.9)), layout="constrained")
    figure.suptitle(title)
    for axes, (name, times) in zip(figure.subplots(len(groups), squeeze=False)[:, 0], groups.items(), strict=True):
        for place, (label, seconds) in enumerate(times.seconds.items()):
            quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
            low, middle, high = (1e3 * quartile for quartile in quartiles)
            color = "tab:blue" if label.startswith("vblora") else "tab:gray"
            axes.barh(place, middle, xerr=[[middle - low], [high - middle]], color=color)
            axes.text(high, place, f" {middle:.3g}", va="center")
        axes.set_yticks(range(len(times.seconds)), list(times.seconds))
        axes.invert_yaxis()
        axes.set_title(name, loc="left", fontsize="medium")
        axes.set_xlabel("ms")
        axes.margins(x=0.12)
    return figure
