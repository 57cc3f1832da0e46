"""What was found, as JSON and as Markdown; and the log, which is cut where it is too long."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

LOG_BYTES = 1 << 20  # of a phase at most: its beginning and its end


@dataclass
class Outcome:
    """What came of a phase."""

    name: str
    limit: float
    seconds: float = 0.0
    status: str = "passed"  # or "failed", "timed out", "skipped"
    reason: str = ""
    rows: list[dict] = field(default_factory=list)


@dataclass
class Report:
    date: str
    command: str
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(outcome.status in ("failed", "timed out") for outcome in self.outcomes)

    def write(self, folder: Path) -> None:
        (folder / "report.json").write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(self.markdown(details=True), encoding="utf-8")

    def markdown(self, details: bool) -> str:
        machine = next((row["result"] for o in self.outcomes for row in o.rows if row["case"] == "machine"), "unknown")
        lines = [
            f"{self.date}, {cell(machine)}, `{self.command}`",
            "",
            "| phase | what | result | |",
            "|---|---|---|---|",
        ]
        for outcome in self.outcomes:
            spent = f"{outcome.seconds:.0f} of {outcome.limit:.0f} s"
            spent += f": {cell(outcome.reason)}" if outcome.reason else ""
            lines.append(f"| **{outcome.name}** | | {spent} | **{outcome.status}** |")
            for row in outcome.rows:
                if details or not row["detail"] or row["verdict"] == "failed":
                    lines.append(f"| | {cell(row['case'])} | {cell(row['result'])} | {row['verdict']} |")
        return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def outcome_of(name: str, limit: float, seconds: float, code: int | None, results: Path, log: str) -> Outcome:
    """Of a phase's process: its exit code (None if it was stopped at its limit), the rows that it wrote, and what it printed."""
    rows = []
    for line in results.read_text(encoding="utf-8").splitlines() if results.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the process was stopped as it wrote this one
            break
    outcome = Outcome(name, limit, seconds, rows=rows)
    failed = sum(row["verdict"] == "failed" for row in rows)
    if code is None:
        outcome.status, outcome.reason = "timed out", f"stopped after {limit:.0f} s; what it found until then is below"
    elif code:
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        printed = [line.strip() for line in log.splitlines() if line.strip()]
        outcome.status, outcome.reason = "failed", f"{ended}: {printed[-1][:200] if printed else 'nothing was printed'}"
    elif failed:
        outcome.status, outcome.reason = "failed", f"{failed} of {len(rows)} failed"
    elif not rows:
        outcome.status, outcome.reason = "failed", "it reported nothing"
    elif all(row["verdict"] == "skipped" for row in rows):
        outcome.status, outcome.reason = "skipped", rows[0]["result"]
    return outcome


def shortened(log: bytes, most: int = LOG_BYTES) -> bytes:
    if len(log) <= most:
        return log
    left_out = f"\n… {len(log) - most:,} bytes left out …\n".encode()
    return log[: most // 4] + left_out + log[-(most - most // 4) :]
