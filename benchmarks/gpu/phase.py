"""A phase, as its own file sees it: what it is given, and where it writes each result at once.

The process of one phase starts here: `python -m benchmarks.gpu.phase NAME SETTINGS`, with the fields of `Phase` as JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Phase:
    device: str  # "cuda" or "cpu"
    quick: bool  # small sizes, to see that all runs; the figures mean nothing
    seconds: float  # after which the process is stopped
    work: str  # folder of what phases leave each other
    results: str  # file of this phase's rows, a JSON object a line
    start: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        return Path(self.work)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def left(self) -> float:
        """Seconds that may still be spent, with some to spare for the end."""
        return self.seconds - 3 - (time.monotonic() - self.start)

    def row(self, case: str, result: str, *, ok: bool | None = None, detail: bool = False, **data: object) -> bool:
        """Reports a result, and returns `ok`, which is None where nothing can fail. A detail is printed at the end only if it
        failed."""
        verdict = {True: "ok", False: "failed", None: ""}[ok]
        self._write({"case": case, "result": result, "verdict": verdict, "detail": detail, "data": data})
        return ok is not False

    def skip(self, case: str, reason: str) -> None:
        self._write({"case": case, "result": reason, "verdict": "skipped", "detail": False, "data": {}})

    @contextlib.contextmanager
    def attempt(self, case: str) -> Iterator[None]:
        """What fails inside becomes a row, and the phase goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.row(case, last_line(f"{type(error).__name__}: {error}"), ok=False)

    def _write(self, row: dict) -> None:
        print(f"{row['case']}: {row['result']} {row['verdict']}", flush=True)
        with open(self.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def last_line(text: str, most: int = 200) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:most] if lines else ""


def main() -> None:
    name, settings = sys.argv[1:]
    phase = Phase(**json.loads(settings))  # first: what is imported now counts, too
    run: Callable[[Phase], None] = importlib.import_module(f"benchmarks.gpu.{name}").run
    run(phase)
    sys.stdout.flush()
    os._exit(0)  # a GPU in a bad state may hang or abort on the way out, after all has been written


if __name__ == "__main__":
    main()
