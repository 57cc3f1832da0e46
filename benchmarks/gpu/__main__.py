"""Runs the phases of `make gpu-check`, each in a process and under a time limit of its own, and prints what they found.

    python -m benchmarks.gpu                            # all of them, on a GPU
    python -m benchmarks.gpu --phases facts times       # some
    python -m benchmarks.gpu --device cpu --quick       # a dry run: to see that it runs; its figures mean nothing

It needs no network. Where nothing can be installed, bring what is missing along: --wheels DIR, --prebuilt FILE.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from . import PHASES, ROOT
from .phase import Phase
from .report import Outcome, Report, outcome_of, shortened

LIBRARY = "libvblora.so"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(PHASES)
    parser.add_argument("--phases", nargs="+", metavar="NAME", choices=PHASES, help=f"which: {names} (all of them)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: what can be done without a GPU")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds; the figures mean nothing")
    parser.add_argument("--output", type=Path, help="folder of the report and the log ($OUT, or else build/gpu)")
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="folder of wheels to use, of packages that are missing"
    )
    parser.add_argument(
        "--prebuilt", type=Path, metavar="FILE", help=f"a {LIBRARY} to use; the build is then only tried"
    )
    parser.add_argument(
        "--patience", type=float, default=1.0, metavar="FACTOR", help="of the time limits, on a slow machine"
    )
    arguments = parser.parse_args()
    for name, exists in (("wheels", Path.is_dir), ("prebuilt", Path.is_file)):
        path = getattr(arguments, name)
        if path is not None and not exists(path):
            parser.error(f"--{name} {path}: there is no such {'folder' if name == 'wheels' else 'file'}.")
    if arguments.prebuilt and arguments.prebuilt.name != LIBRARY:
        parser.error(f"--prebuilt {arguments.prebuilt}: the file must be named {LIBRARY}.")
    return arguments


def install(wheels: Path, target: Path) -> str:
    """Unpacks wheels for the phases to import. Returns what went wrong, or nothing."""
    files = [str(path) for path in sorted(wheels.glob("*.whl")) if not path.name.lower().startswith("torch-")]
    if not files:
        return f"{wheels} holds no wheels (one of torch is never used)"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    process = subprocess.run(
        [*pip, "--target", str(target), *files], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return process.stdout.strip() if process.returncode else ""


def lay_out(site: Path, library: Path | None) -> None:
    """The package as phases import it: its Python files, and a library that need not be the one in the source tree."""
    shutil.copytree(ROOT / "vblora", site / "vblora", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if library is not None:
        shutil.copy2(library, site / "vblora" / LIBRARY)


def environment(work: Path) -> dict[str, str]:
    paths = [work / "wheels", work / "site", ROOT]
    inherited = os.environ.get("PYTHONPATH")
    programs = str(Path(sys.executable).parent)  # cmake and ninja of this Python
    return os.environ | {
        "PATH": os.pathsep.join([programs, os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *([inherited] if inherited else [])]),
        "PYTHONSAFEPATH": "1",  # or the package in the working folder would come first
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_phase(name: str, phase: Phase, log: Path) -> Outcome:
    """Whatever becomes of its process, and of those that it started, this returns soon after the limit."""
    start = time.monotonic()
    settings = {key: value for key, value in asdict(phase).items() if key != "start"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.phase", name, json.dumps(settings)],
            cwd=ROOT,
            env=environment(phase.folder),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(phase.seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the driver cannot even be killed
        process.wait(5)
    printed = log.read_text(encoding="utf-8", errors="replace")
    return outcome_of(name, phase.seconds, time.monotonic() - start, code, Path(phase.results), printed)


def main() -> int:
    arguments = parse_arguments()
    output = arguments.output or Path(os.environ.get("OUT") or ROOT / "build" / "gpu")
    output.mkdir(parents=True, exist_ok=True)
    names = [name for name in PHASES if arguments.phases is None or name in arguments.phases]
    date = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    report = Report(date, shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]))
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        (output / "log.txt").write_bytes(b"")
        if arguments.wheels and (wrong := install(arguments.wheels, work / "wheels")):
            report.outcomes.append(Outcome("wheels", 0, status="failed", reason=wrong))
        library = arguments.prebuilt
        in_tree = ROOT / "vblora" / LIBRARY
        if library is None and in_tree.exists() and (arguments.device == "cpu" or "build" not in names):
            library = in_tree
        lay_out(work / "site", library)
        if arguments.device == "cuda":  # on a fresh machine the first import reads gigabytes, which is no phase's fault
            warm_up = [sys.executable, "-c", "import torch; torch.zeros(1, device='cuda')"]
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(warm_up, env=environment(work), capture_output=True, timeout=60)
        for name in names:
            print(f"{name} …", end=" ", flush=True)
            phase = Phase(
                device=arguments.device,
                quick=arguments.quick,
                seconds=PHASES[name] * arguments.patience,
                work=str(work),
                results=str(work / f"{name}.jsonl"),
            )
            outcome = run_phase(name, phase, work / f"{name}.log")
            print(f"{outcome.status} after {outcome.seconds:.0f} s {outcome.reason}".rstrip(), flush=True)
            report.outcomes.append(outcome)
            report.write(output)
            with (output / "log.txt").open("ab") as log:
                log.write(f"\n===== {name}\n".encode() + shortened((work / f"{name}.log").read_bytes()))
    print("\n" + report.markdown(details=False), flush=True)
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
