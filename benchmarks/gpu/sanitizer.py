"""The problems of tests/emulation on the GPU, by the program without torch: alone, then under compute-sanitizer's four tools."""

from __future__ import annotations

import re
import shutil
import subprocess
import time

from tests.emulation.problem_set import PROBLEMS

from .build import PROGRAM
from .phase import Phase, last_line

# A line of its report. The program's own, which says which problem comes next, may end in it.
FOUND = re.compile(
    r"^(?:(\S.*?): )?=+ ((?:Invalid|Uninitialized|Barrier error|Program hit|Error: Race|Warning: Race).*)$",
    re.MULTILINE,
)
TOOLS = ("memcheck", "initcheck", "racecheck", "synccheck")


def run(phase: Phase) -> None:
    if not phase.on_gpu:
        phase.skip("compute-sanitizer", "there is no GPU")
        return
    program = phase.folder / PROGRAM
    if not program.exists():
        phase.row("program without torch", "the build phase left none", ok=False)
        return
    problems = phase.folder / "problems.txt"
    problems.write_text("\n".join(PROBLEMS) + "\n")
    given = [str(program), f"@{problems}"]
    alone = Run(phase, "alone", given)
    alone.wait(30)
    phase.row(
        "program without torch", f"{alone.solved} of {len(PROBLEMS)} problems ran{alone.error}", ok=alone.complete
    )

    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        phase.skip("compute-sanitizer", "it is not there")
        return
    command = [sanitizer, "--print-limit", "20", "--error-exitcode", "9"]
    runs = {tool: Run(phase, tool, [*command, "--tool", tool, *given]) for tool in TOOLS}
    while runs and phase.left() > 0:  # all at once: each takes one core and little of the GPU
        time.sleep(0.1)
        for tool in [tool for tool, one in runs.items() if one.process.poll() is not None]:
            report(phase, tool, runs.pop(tool))
    for tool, one in runs.items():
        one.wait(0)
        if one.stopped and not FOUND.search(one.printed):
            phase.skip(
                f"compute-sanitizer {tool}",
                f"no time left; {one.solved} of {len(PROBLEMS)} problems ran, nothing found",
            )
        else:
            report(phase, tool, one)


class Run:
    """All problems in one process."""

    def __init__(self, phase: Phase, name: str, command: list[str]) -> None:
        self.log = phase.folder / f"{name}.txt"
        self.stopped = False
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def wait(self, seconds: float) -> None:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.stopped = True
            self.process.kill()
            self.process.wait()

    @property
    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def solved(self) -> int:
        return len(re.findall(r"\bran$", self.printed, re.MULTILINE))

    @property
    def complete(self) -> bool:
        return self.process.returncode == 0 and self.solved == len(PROBLEMS)

    @property
    def error(self) -> str:
        return (
            "" if self.process.returncode == 0 else f"; exit code {self.process.returncode}: {last_line(self.printed)}"
        )


def report(phase: Phase, tool: str, run: Run) -> None:
    print(f"--- {tool}\n{run.printed}", flush=True)
    summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", run.printed, re.MULTILINE)
    result = f"{summary[-1] if summary else 'no summary'}; {run.solved} of {len(PROBLEMS)} problems ran"
    phase.row(f"compute-sanitizer {tool}", result + ("" if summary else run.error), ok=run.complete and bool(summary))
    # Which problem, and what was found first.
    for problem, message in FOUND.findall(run.printed)[:5]:
        phase.row(f"{tool}: {problem or 'see log.txt'}", message, ok=False)
