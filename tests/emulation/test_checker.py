"""The checker itself: every fault of faults.cuh is reported, at its line, and nothing else is."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from . import build, checker

SOURCE = Path(__file__).with_name("faults.cuh").read_text().splitlines()
CASES = re.findall(r"CASE\(([\w<>]+)", Path(__file__).with_name("faults.cpp").read_text())
CASES = [case for case in CASES if case != "kernel"] + ["count"]


def expectations(case: str) -> dict[str, set[str]]:
    """What the comments of a kernel expect: {"faults.cuh:12": {"race"}}."""
    start = next(i for i, line in enumerate(SOURCE) if f" {case.split('<')[0]}(" in line)
    end = next(i for i in range(start, len(SOURCE)) if SOURCE[i].startswith("}") or SOURCE[i].endswith("; }"))
    marked = {}
    for number in range(start, end + 1):
        if "// expect: " in SOURCE[number]:
            marked[f"faults.cuh:{number + 1}"] = set(SOURCE[number].split("// expect: ")[1].split(", "))
    return marked


def test_every_kernel_is_run():
    kernels = re.findall(r"__global__ void (\w+)\(", "\n".join(SOURCE))
    assert sorted(kernels) == sorted(case.split("<")[0] for case in CASES)


@pytest.mark.parametrize("case", CASES)
def test_trace(case):
    report = checker.run(build.build("faults_trace"), case)
    found: dict[str, set[str]] = {}
    for finding in report.findings:
        for place in finding.places:
            found.setdefault(place.line, set()).add(finding.kind)
    for (_, _, place, _), cost in report.costs.items():
        if cost.units != cost.ideal:
            found.setdefault(place.line, set()).add(
                f"units {cost.units // cost.instructions} of {cost.ideal // cost.instructions}"
            )
    expected = {line: kinds - {"asan"} for line, kinds in expectations(case).items() if kinds != {"asan"}}
    assert found == expected, "\n".join(map(str, report.findings)) + report.output


@pytest.mark.parametrize("case", CASES)
def test_asan(case):
    process = subprocess.run([build.build("faults_asan"), case], capture_output=True, text=True)
    stopped = re.search(r"AddressSanitizer: (\S+).*?#0 [^\n]*/(\S+:\d+)", process.stderr, re.DOTALL)
    expected = [line for line, kinds in expectations(case).items() if "asan" in kinds]
    assert [stopped[2]] == expected if stopped else not expected, process.stderr
