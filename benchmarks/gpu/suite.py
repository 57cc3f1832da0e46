"""Tests of the source tree as part of a phase: pytest in a process, of which one row per run and one per failure is left."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import subprocess
import sys

from . import ROOT
from .phase import Phase, last_line

# importlib: pytest then leaves the source tree behind the package that is to be tested, which may not be built. A
# file that cannot be imported, because it needs a package that is missing, must not keep the others from running.
OPTIONS = ["-v", "--tb=short", "--import-mode=importlib", "--continue-on-collection-errors"]
OPTIONS += ["-p", "no:cacheprovider", "-p", "no:benchmark"]


def run(phase: Phase, case: str, arguments: list[str], processes: int = 8) -> None:
    """`processes` share the device, if pytest-xdist is there."""
    command = [sys.executable, "-m", "pytest", *OPTIONS, *arguments]
    if phase.on_gpu and processes > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(processes)]
    log = phase.folder / "pytest.log"
    with log.open("wb") as output, contextlib.suppress(subprocess.TimeoutExpired):
        code = None
        code = subprocess.run(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=max(phase.left(), 1)
        ).returncode
    printed = log.read_text(encoding="utf-8", errors="replace")
    print(printed, flush=True)
    counts = {word: len(tests_that(word, printed)) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL")}
    result = ", ".join(f"{count} {word.lower()}" for word, count in counts.items() if count) or last_line(printed)
    if code is None:
        result += "; stopped, no time left"
    phase.row(case, result, ok=code == 0)
    for name in (not_imported(printed) + tests_that("FAILED", printed) + tests_that("ERROR", printed))[:20]:
        phase.row(name, why(name, printed), ok=False)


def tests_that(word: str, printed: str) -> list[str]:
    """`tests/a.py::test_b PASSED [ 1%]`, or of xdist `[gw0] [ 1%] PASSED tests/a.py::test_b`; not the summary's lines."""
    alone = re.findall(rf"^(tests/\S+::.+?) {word}(?: .*)?$", printed, re.MULTILINE)
    return alone + re.findall(rf"^\[gw\d+\] \[ *\d+%\] {word} (tests/\S+::.+?) *$", printed, re.MULTILINE)


def not_imported(printed: str) -> list[str]:
    """Files, as the summary has them."""
    return re.findall(r"^ERROR (tests/[^:\s]+\.py)(?: - .*)?$", printed, re.MULTILINE)


def why(name: str, printed: str) -> str:
    """The first line of the error, as the summary has it."""
    found = re.search(rf"^(?:FAILED|ERROR) {re.escape(name)} - (.*)$", printed, re.MULTILINE)
    return last_line(found[1]) if found else "see log.txt"
