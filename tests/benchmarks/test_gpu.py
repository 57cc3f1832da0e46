"""`make gpu-check` without a GPU: the dry run, what becomes of phases that fail, and how other programs' output is read."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu import PHASES, ROOT, build, counters, sanitizer, suite
from benchmarks.gpu.__main__ import LIBRARY, environment, install, lay_out, run_phase
from benchmarks.gpu.build import PROGRAM
from benchmarks.gpu.phase import Phase
from benchmarks.gpu.report import Outcome, Report, outcome_of, shortened
from tests.emulation.problem_set import PROBLEMS


def phase(folder: Path, device: str = "cuda", seconds: float = 60) -> Phase:
    return Phase(device=device, quick=True, seconds=seconds, work=str(folder), results=str(folder / "rows.jsonl"))


def rows(folder: Path) -> dict[str, dict]:
    return {row["case"]: row for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines())}


@pytest.mark.slow
def test_dry_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick"]
    environ = os.environ | {"OUT": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr + (tmp_path / "log.txt").read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    found = {outcome["name"]: outcome for outcome in report["outcomes"]}
    assert {name: outcome["limit"] for name, outcome in found.items()} == PHASES
    skipped = {name: outcome["reason"] for name, outcome in found.items() if outcome["status"] != "passed"}
    assert skipped == {"sanitizer": "there is no GPU", "counters": "there is no GPU"}
    failed = [row for outcome in found.values() for row in outcome["rows"] if row["verdict"] == "failed"]
    assert not failed
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "report.json", "report.md"}
    printed = process.stdout.split("\n\n", 1)[1]
    assert all(line in (tmp_path / "report.md").read_text() for line in printed.splitlines())


# Phases that fail


def test_a_phase_that_hangs_is_stopped(tmp_path):
    lay_out(tmp_path / "site", None)
    outcome = run_phase("facts", phase(tmp_path, "cpu", seconds=0.05), tmp_path / "log.txt")
    assert outcome.status == "timed out"
    assert outcome.seconds < 10


def test_a_phase_that_crashes_says_why(tmp_path):
    lay_out(tmp_path / "site", None)
    outcome = run_phase("nothing", phase(tmp_path, "cpu"), tmp_path / "log.txt")
    assert outcome.status == "failed"
    assert outcome.reason == "exit code 1: ModuleNotFoundError: No module named 'benchmarks.gpu.nothing'"


def test_what_was_found_before_the_end_is_kept(tmp_path):
    given = phase(tmp_path)
    given.row("one", "1 s")
    with given.attempt("two"):
        raise ValueError("no\nsuch number")
    given.skip("three", "no time left")
    results = Path(given.results)
    with results.open("a") as file:
        file.write('{"case": "fo')  # stopped as it wrote
    stopped = outcome_of("times", 100, 100, None, results, "")
    assert [row["case"] for row in stopped.rows] == ["one", "two", "three"]
    assert stopped.status == "timed out"
    assert stopped.rows[1]["result"] == "such number"
    assert stopped.rows[1]["verdict"] == "failed"
    assert outcome_of("times", 100, 9, 0, results, "").reason == "1 of 3 failed"
    assert outcome_of("times", 100, 9, -11, results, "a\n\nlast words\n").reason == "signal 11: last words"
    assert outcome_of("times", 100, 9, 0, tmp_path / "none", "").reason == "it reported nothing"


def test_report_holds_details_but_prints_those_that_failed_only():
    def row(case: str, verdict: str, detail: bool) -> dict:
        return {"case": case, "result": "a | b", "verdict": verdict, "detail": detail, "data": {}}

    listed = [row("plain", "", False), row("detail", "ok", True), row("wrong", "failed", True)]
    report = Report("today", "make gpu-check", [Outcome("times", 100, 9.6, "failed", "1 of 3 failed", listed)])
    assert report.failed
    lines = report.markdown(details=False).splitlines()
    assert lines[4:] == [
        "| **times** | | 10 of 100 s: 1 of 3 failed | **failed** |",
        "| | plain | a \\| b |  |",
        "| | wrong | a \\| b | failed |",
    ]
    assert "detail" in report.markdown(details=True)


def test_a_long_log_keeps_both_ends():
    log = b"begin" + bytes(10_000) + b"end"
    short = shortened(log, 1000)
    assert short.startswith(b"begin")
    assert short.endswith(b"end")
    assert len(short) < 1100
    assert shortened(log, 20_000) == log


# Where nothing can be installed


def test_wheels_are_unpacked_and_torch_never(tmp_path):
    for name in ("torch", "carried"):
        with zipfile.ZipFile(tmp_path / f"{name}-9.9-py3-none-any.whl", "w") as wheel:
            info = f"{name}-9.9.dist-info"
            wheel.writestr(f"{name}.py", "VALUE = 9\n")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    work = tmp_path / "work"
    assert install(tmp_path, work / "wheels") == ""
    assert sorted(path.name for path in (work / "wheels").glob("*.py")) == ["carried.py"]
    program = [sys.executable, "-c", "import carried; print(carried.VALUE)"]
    assert subprocess.run(program, env=environment(work), capture_output=True, text=True).stdout == "9\n"
    assert "holds no wheels" in install(work, tmp_path / "other")


def test_the_package_that_phases_import_is_a_copy(tmp_path):
    lay_out(tmp_path / "site", None)
    program = [sys.executable, "-c", "import importlib.util; print(importlib.util.find_spec('vblora').origin)"]
    process = subprocess.run(program, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True)
    assert process.stdout.strip() == str(tmp_path / "site" / "vblora" / "__init__.py")


# Other programs


def test_pytest_output(tmp_path):
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('x', ['a b', '1'])\ndef test_good(x): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no')\ndef test_not(): pass\n"
    )
    (tests / "test_unlike.py").write_text("import a_package_that_is_missing\n")
    command = [sys.executable, "-m", "pytest", *suite.OPTIONS, "tests"]
    for more in ([], ["-n", "2"]):
        printed = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True).stdout
        found = {word: suite.tests_that(word, printed) for word in ("PASSED", "FAILED", "SKIPPED")}
        assert sorted(found["PASSED"]) == ["tests/test_some.py::test_good[1]", "tests/test_some.py::test_good[a b]"]
        assert found["FAILED"] == ["tests/test_some.py::test_bad"]
        assert found["SKIPPED"] == ["tests/test_some.py::test_not"]
        assert suite.why("tests/test_some.py::test_bad", printed) == "assert 1 == 2"
        assert suite.not_imported(printed) == ["tests/test_unlike.py"]


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


# As ncu prints it with --csv --page raw: names, units, and a line for each kernel.
NCU = """==PROF== Connected to process 7
admixture ...: ran
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","lts__t_sector_hit_rate.pct",STALLS
"","","us","Mbyte","%","inst","inst"
"0","void vblora::cuda::admixture_kernel<float, (int)2>(vblora::Admixture, int)","18.5","1,050.3","61.2","12.50","1.25"
==PROF== Disconnected from process 7"""


STALLS = ",".join(
    f'"smsp__average_warps_issue_stalled_{stall}_per_issue_active.ratio"' for stall in ("long_scoreboard", "wait")
)


def test_ncu_output(tmp_path, monkeypatch):
    program(tmp_path / PROGRAM, "")
    program(tmp_path / "ncu", f"cat <<'END'\n{NCU.replace('STALLS', STALLS)}\nEND")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    counters.run(phase(tmp_path))
    found = rows(tmp_path)["admixture_kernel<float, 2>"]
    assert (
        found["result"]
        == "duration 18.5 us, DRAM read 1,050.3 Mbyte, L2 hits 61.2 %, stalls long_scoreboard 12.50, wait 1.25"
    )
    assert found["verdict"] == "ok"


def test_ncu_that_may_not_count(tmp_path, monkeypatch):
    program(tmp_path / PROGRAM, "")
    program(tmp_path / "ncu", "echo '==ERROR== ERR_NVGPUCTRPERM - no permission'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    counters.run(phase(tmp_path))
    assert {(row["result"], row["verdict"]) for row in rows(tmp_path).values()} == {
        ("==ERROR== ERR_NVGPUCTRPERM - no permission", "failed")
    }


def test_sanitizer_output(tmp_path, monkeypatch):
    program(tmp_path / PROGRAM, "sed 's/$/: ran/' ${1#@}")
    program(
        tmp_path / "compute-sanitizer",
        """echo "========= COMPUTE-SANITIZER"; "${@: -2}"
if [[ "$*" == *racecheck* ]]; then echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
elif [[ "$*" == *memcheck* ]]; then
  echo "compose rows=1: ========= Invalid __global__ read of size 4 bytes"; echo "========= ERROR SUMMARY: 1 error"; exit 9
else echo "========= ERROR SUMMARY: 0 errors"; fi""",
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    sanitizer.run(phase(tmp_path))
    found = rows(tmp_path)
    all_ran = f"{len(PROBLEMS)} of {len(PROBLEMS)} problems ran"
    assert found["program without torch"]["result"] == all_ran
    assert found["compute-sanitizer initcheck"]["result"] == f"ERROR SUMMARY: 0 errors; {all_ran}"
    verdicts = {name.split()[-1]: row["verdict"] for name, row in found.items() if name.startswith("compute-san")}
    assert verdicts == {"memcheck": "failed", "initcheck": "ok", "racecheck": "ok", "synccheck": "ok"}
    assert found["memcheck: compose rows=1"]["result"] == "Invalid __global__ read of size 4 bytes"


def test_a_sanitizer_that_is_too_slow_has_not_failed(tmp_path, monkeypatch):
    program(tmp_path / PROGRAM, "sed 's/$/: ran/' ${1#@}")
    program(
        tmp_path / "compute-sanitizer",
        """[[ "$*" == *memcheck* ]] && echo "compose rows=1: ========= Invalid __global__ read of size 4 bytes"
echo "compose rows=2: ran"; exec sleep 60""",
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    sanitizer.run(phase(tmp_path, seconds=8))
    found = rows(tmp_path)
    verdicts = {name.split()[-1]: row["verdict"] for name, row in found.items() if name.startswith("compute-san")}
    assert verdicts == {"memcheck": "failed"} | dict.fromkeys(("initcheck", "racecheck", "synccheck"), "skipped")
    ran = f"no time left; 1 of {len(PROBLEMS)} problems ran, nothing found"
    assert found["compute-sanitizer racecheck"]["result"] == ran


# The build, by stand-ins for the compilers


def build_with(monkeypatch, library: list[list[str]], problems: list[list[str]]) -> None:
    monkeypatch.setattr(build, "capability", lambda: "9.0")
    monkeypatch.setattr(build, "build_library", lambda *_: library)
    monkeypatch.setattr(build, "build_program", lambda *_: problems)


def test_without_a_library_the_program_runs(tmp_path, monkeypatch):
    program(tmp_path / "made", "echo ran, 12.5 us $1")
    failing = ["bash", "-c", "echo 'kernels.cu(7): error: no such type'; echo; echo stopped; exit 2"]
    build_with(monkeypatch, [failing], [["cp", str(tmp_path / "made"), str(tmp_path / PROGRAM)]])
    build.run(phase(tmp_path))
    found = rows(tmp_path)
    assert found["libvblora.so builds"]["result"] == "kernels.cu(7): error: no such type"
    assert found["libvblora.so builds"]["verdict"] == "failed"
    assert found["program without torch builds"]["verdict"] == "ok"
    assert found["compose of Llama-2-7B without torch"]["result"] == "ran, 12.5 us compose"


def test_a_build_is_imported_from_where_phases_look(tmp_path, monkeypatch):
    site, native = tmp_path / "site", tmp_path / "native"
    lay_out(site, None)
    native.mkdir()
    (native / LIBRARY).symlink_to(ROOT / "vblora" / LIBRARY)
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    build_with(monkeypatch, [["true"]], [["true"]])
    build.run(phase(tmp_path))
    assert (site / "vblora" / LIBRARY).is_file()
    assert {row["verdict"] for row in rows(tmp_path).values()} == {"ok"}
    assert "libvblora.so that was built here" in rows(tmp_path)


def test_a_build_that_takes_too_long_says_so(tmp_path, monkeypatch):
    build_with(monkeypatch, [["sleep", "5"]], [["false"]])
    build.run(phase(tmp_path, seconds=3.5))
    found = rows(tmp_path)
    assert found["libvblora.so builds"]["result"] == "not done in time"
    assert found["program without torch builds"]["verdict"] == "failed"
