"""What ncu counts in six kernels, launched once each by the program without torch, at the size of Llama-2-7B's adapter."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess

from .build import PROGRAM
from .phase import Phase, last_line

SIZES = "rows=39040 vectors=2048 length=256 k=2 columns=128 candidates=i16 out=bf16"
# A problem, and the kernels that it launches and that are counted.
RUNS = {
    f"admixture {SIZES}": "admixture_kernel",
    f"admixture_backward {SIZES}": "backward_rows_kernel|backward_bank_kernel",
    "compose rows=39040 vectors=2048 length=256 k=2 indices=i16 out=bf16": "compose_kernel",
    f"admixture_backward {SIZES} popular=1 need_logits=0": "backward_popular_kernel|backward_split_kernel",
}
SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "MemoryWorkloadAnalysis_Chart",
    "MemoryWorkloadAnalysis_Tables",
    "ComputeWorkloadAnalysis",
    "InstructionStats",
    "SchedulerStats",
    "WarpStateStats",
    "Occupancy",
    "LaunchStats",
)
# What the table shows, by ncu's own names.
SHOWN = {
    "duration": "gpu__time_duration.sum",
    "DRAM read": "dram__bytes_read.sum",
    "written": "dram__bytes_write.sum",
    "L2": "lts__t_bytes.sum",
    "instructions": "smsp__inst_executed.sum",
    "ALU pipe": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "issue active": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "L1 hits": "l1tex__t_sector_hit_rate.pct",
    "L2 hits": "lts__t_sector_hit_rate.pct",
}
_BY_SECTION = [argument for section in SECTIONS for argument in ("--section", section)]
# What ncu is asked for. Where it does not know one of the names it counts nothing, and is asked for the next.
WISHES = ([*_BY_SECTION, "--metrics", ",".join(SHOWN.values())], _BY_SECTION, ["--set", "full"])
STALL = re.compile(r"smsp__average_warps?_(?:latency_)?issue_stalled_(\w+?)(?:_per_issue_active)?\.ratio$")


def run(phase: Phase) -> None:
    if not phase.on_gpu:
        phase.skip("ncu", "there is no GPU")
        return
    ncu = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if ncu is None:
        phase.skip("ncu", "it is not there")
        return
    program = phase.folder / PROGRAM
    if not program.exists():
        phase.row("program without torch", "the build phase left none", ok=False)
        return
    wishes = list(WISHES)
    for problem, kernels in RUNS.items():
        if phase.left() < 5:
            phase.skip(kernels, "no time left")
            continue
        with phase.attempt(kernels):
            found, printed = count(phase, ncu, wishes[0], kernels, [str(program), *problem.split()])
            while not found and len(wishes) > 1:
                del wishes[0]
                found, printed = count(phase, ncu, wishes[0], kernels, [str(program), *problem.split()])
            if not found:
                phase.row(kernels, last_line(printed) or "ncu printed nothing", ok=False)
            for kernel in found:
                report(phase, problem, kernel)


def count(phase: Phase, ncu: str, chosen: list[str], kernels: str, program: list[str]) -> tuple[list[dict], str]:
    """A dict of metrics for each kernel, and what ncu and the program printed."""
    command = [ncu, "--clock-control", "none", "--csv", "--page", "raw", "--kernel-name", f"regex:{kernels}", *chosen]
    process = subprocess.run(
        [*command, *program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=max(phase.left(), 1)
    )
    print(process.stdout, flush=True)
    lines = [line for line in process.stdout.splitlines() if line.startswith('"')]
    if not lines:
        return [], process.stdout
    units, *values = csv.DictReader(io.StringIO("\n".join(lines)))
    return [{name: f"{row[name]} {units[name]}".strip() for name in row if row[name]} for row in values], process.stdout


def report(phase: Phase, problem: str, metrics: dict[str, str]) -> None:
    name = re.sub(r"void |vblora::|cuda::|\(int\)", "", metrics["Kernel Name"]).split("(")[0]
    shown = [f"{title} {metrics[metric]}" for title, metric in SHOWN.items() if metric in metrics]
    stalls = {}
    for metric, value in metrics.items():
        number = value.split()[0].replace(",", "")
        if (match := STALL.search(metric)) and "not_issued" not in metric and re.fullmatch(r"[\d.]+", number):
            stalls[match[1]] = float(number)
    worst = sorted(stalls, key=stalls.get, reverse=True)[:3]
    if worst:
        shown.append("stalls " + ", ".join(f"{stall} {stalls[stall]:.2f}" for stall in worst))
    phase.row(name, ", ".join(shown) or "no metric that is known", ok=bool(shown), problem=problem, metrics=metrics)
