"""How long work takes on the device: replayed as a CUDA graph, or call by call with the caches flushed. Medians of seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
FLUSHED_BYTES = 512 << 20  # written before each call: well beyond any L2, and long enough for the host to get ahead


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def replayed(calls: Sequence[Call], device: str, rounds: int = 20, repeats: int = 5) -> float:
    """Of one call, where all of them run in turn, without the host: `repeats` times in a graph, replayed for `rounds`."""
    if device == "cpu":
        return statistics.median(_on_host(call) for call in calls)
    graph = captured(calls, repeats)
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in times) / 1e3 / (repeats * len(calls))


def captured(calls: Sequence[Call], repeats: int = 1) -> torch.cuda.CUDAGraph:
    """A graph of those calls, which has been replayed once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made at a first call must not be made in a capture
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def flushed(calls: Sequence[Call], device: str, rounds: int = 20) -> float:
    """Of one call, each after the caches were overwritten. Events alone are about a microsecond of it."""
    if device == "cpu":
        return statistics.median(_on_host(call) for call in calls)
    rest = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
    times = []
    for i in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        rest.zero_()
        begin.record()
        calls[i % len(calls)]()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in times) / 1e3


def issued(call: Call, device: str, rounds: int = 20) -> float:
    """What the host needs for one call, which it does not wait for."""
    times = []
    for _ in range(rounds):
        synchronize(device)
        times.append(_on_host(call))
    synchronize(device)
    return statistics.median(times)


def awaited(call: Call, device: str, rounds: int = 20) -> float:
    """Of one call, by the clock on the wall, until the device is done."""
    times = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _on_host(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def copy_rate(device: str, quick: bool) -> float:
    """Bytes a second that a large copy on the device reads and writes."""
    size = (1 << 20) if quick else (2 << 30)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / replayed([lambda: target.copy_(source)], device, rounds=10, repeats=2)


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} µs"
