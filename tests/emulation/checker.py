"""Runs a program of the trace build and tells its findings by file and line."""

from __future__ import annotations

import json
import subprocess
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

LAYER = {"cuda_emulation.h", "intrinsics.h", "block.cpp", "launch.cpp"}  # what stands between a kernel and the checker


@dataclass(frozen=True)
class Place:
    """Where in the kernels something happens: the line, and the lines that it was inlined into or called from."""

    lines: tuple[str, ...]  # "file.cuh:12"

    @property
    def line(self) -> str:
        return self.lines[0] if self.lines else "?"

    def __str__(self) -> str:
        return " < ".join(self.lines)


@dataclass(frozen=True)
class Finding:
    kind: str
    message: str
    count: int
    places: tuple[Place, ...]  # of a race, both

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}, {self.count} times, at " + " and ".join(map(str, self.places))


@dataclass
class Cost:
    """Of all accesses that one place makes to one buffer, or to shared memory."""

    instructions: int = 0
    bytes: int = 0
    units: int = 0  # 32-byte sectors; for shared memory, passes
    ideal: int = 0

    @property
    def ratio(self) -> float:
        return self.units / self.ideal


@dataclass(frozen=True)
class Use:
    """What a launch did with a buffer, in bytes."""

    read: int
    read_by_block: int  # the sum over the blocks of what each read, however often
    written: int


@dataclass
class Report:
    launches: list[str]
    findings: list[Finding]
    costs: dict[tuple[str, str, Place, str], Cost]  # launch, buffer or "shared", place, "read" | "write" | "atomic"
    uses: dict[tuple[str, str], Use]  # launch, buffer
    sizes: dict[str, int]  # of the buffers, in bytes
    writes: dict[str, dict[int, int]]  # buffer: how many of its bytes were written how often
    output: str = field(repr=False, default="")  # of the program, besides

    def bytes_moved(self, launch: str, buffer: str) -> int:
        """By all sectors that the launch's instructions asked for, as if there were no cache."""
        return sum(
            32 * cost.units for (name, place, _, _), cost in self.costs.items() if (name, place) == (launch, buffer)
        )


def _lines_at(program: Path, addresses: list[int]) -> dict[int, list[str]]:
    """The source lines of return addresses, innermost first where functions were inlined."""
    calls = [f"{address - 1:#x}" for address in addresses]  # the call itself may be the last thing of its line
    output = subprocess.run(
        ["addr2line", "-a", "-i", "-e", program], input="\n".join(calls), capture_output=True, text=True, check=True
    ).stdout
    found: list[list[str]] = []
    for line in output.splitlines():
        if line.startswith("0x"):
            found.append([])
        else:
            path, _, number = line.split(" (")[0].rpartition(":")
            name = Path(path).name
            if name not in LAYER and not path.startswith("/usr/include/c++") and name != "??":
                found[-1].append(f"{name}:{number}")
    return dict(zip(addresses, found, strict=True))


def run(program: Path, *arguments: str) -> Report:
    process = subprocess.run([program, *arguments], capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{program.name} {' '.join(arguments)}: exit code {process.returncode}\n{process.stderr}")
    raw = json.loads(process.stdout)
    lines = _lines_at(program, sorted({address for frames in raw["sites"] for address in frames}))
    places = [Place(tuple(line for address in frames for line in lines[address])) for frames in raw["sites"]]

    findings = []
    for finding in raw["findings"]:
        kind, first, second = finding["kind"], places[finding["site"]], places[finding["other"]]
        if kind.startswith("?"):  # two addresses that matter only if they are two lines
            if first.lines == second.lines:
                continue
            kind = kind[1:]
        both = (first, second) if finding["other"] else (first,)
        findings.append(Finding(kind, finding["message"], finding["count"], both))

    launches = [name.removeprefix("(").removesuffix(")") for name in raw["launches"]]
    costs: dict[tuple[str, str, Place, str], Cost] = defaultdict(Cost)
    for cost in raw["costs"]:
        total = costs[launches[cost["launch"]], cost["place"], places[cost["site"]], cost["kind"]]
        for name in ("instructions", "bytes", "units", "ideal"):
            setattr(total, name, getattr(total, name) + cost[name])
    return Report(
        launches=launches,
        findings=findings,
        costs=dict(costs),
        uses={
            (launches[use["launch"]], use["buffer"]): Use(use["read"], use["read_by_block"], use["written"])
            for use in raw["uses"]
        },
        sizes={buffer["name"]: buffer["bytes"] for buffer in raw["buffers"]},
        writes={buffer["name"]: {int(n): count for n, count in buffer["writes"].items()} for buffer in raw["buffers"]},
        output=process.stderr,
    )
