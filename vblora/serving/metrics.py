"""Counts and durations of a store, as numbers and in the text format of Prometheus."""

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import quantiles
from time import perf_counter

_LAST = 1000  # percentiles are of this many durations


class Metrics:
    """Counts of events, and the last durations of each kind of work. Not thread-safe: the caller holds a lock."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._durations: dict[str, deque[float]] = {}

    def note_duration(self, name: str, seconds: float) -> None:
        self._durations.setdefault(name, deque(maxlen=_LAST)).append(seconds)

    def percentiles(self, name: str) -> dict[str, float]:
        """The median and the 99th percentile in seconds; zeros if nothing was timed."""
        found = self._durations.get(name, ())
        if len(found) < 2:
            return dict.fromkeys(("p50", "p99"), found[0] if found else 0.0)
        cuts = quantiles(found, n=100, method="inclusive")
        return {"p50": cuts[49], "p99": cuts[98]}


class Timer:
    """The duration of a block in seconds, once the block has ended."""

    seconds = 0.0


@contextmanager
def timed() -> Iterator[Timer]:
    timer, start = Timer(), perf_counter()
    yield timer
    timer.seconds = perf_counter() - start


def prometheus(stats: dict[str, float | dict[str, float]]) -> str:
    """The text exposition format: one gauge or counter per value, with a label for each key of a nested dict."""
    lines = []
    for name, value in stats.items():
        metric = f"vblora_store_{name}"
        lines.append(f"# TYPE {metric} {'counter' if name.endswith('_total') else 'gauge'}")
        if isinstance(value, dict):
            lines += [f'{metric}{{kind="{key}"}} {number}' for key, number in value.items()]
        else:
            lines.append(f"{metric} {value}")
    return "\n".join(lines) + "\n"
