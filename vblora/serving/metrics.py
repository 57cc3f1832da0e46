"""What a store did so far, for people and for Prometheus."""

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import quantiles
from time import perf_counter

_LAST = 1000  # durations that percentiles are taken of


class Metrics:
    """Counts of events, and the last durations of each kind of work. Not thread-safe: its owner holds a lock."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._durations: dict[str, deque[float]] = {}

    def note_duration(self, name: str, seconds: float) -> None:
        self._durations.setdefault(name, deque(maxlen=_LAST)).append(seconds)

    def percentiles(self, name: str) -> dict[str, float]:
        """Median and 99th percentile, in seconds; zeros where nothing was timed."""
        found = self._durations.get(name, ())
        if len(found) < 2:
            return dict.fromkeys(("p50", "p99"), found[0] if found else 0.0)
        cuts = quantiles(found, n=100, method="inclusive")
        return {"p50": cuts[49], "p99": cuts[98]}


class Timer:
    """Seconds that a block took, once it is over."""

    seconds = 0.0


@contextmanager
def timed() -> Iterator[Timer]:
    timer, start = Timer(), perf_counter()
    yield timer
    timer.seconds = perf_counter() - start


def prometheus(stats: dict[str, float | dict[str, float]]) -> str:
    """The text exposition format: a gauge or counter a value, a label for each key of a nested dict."""
    lines = []
    for name, value in stats.items():
        metric = f"vblora_store_{name}"
        lines.append(f"# TYPE {metric} {'counter' if name.endswith('_total') else 'gauge'}")
        if isinstance(value, dict):
            lines += [f'{metric}{{kind="{key}"}} {number}' for key, number in value.items()]
        else:
            lines.append(f"{metric} {value}")
    return "\n".join(lines) + "\n"
