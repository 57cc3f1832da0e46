"""Runs the benchmarks, prints their table, and writes a JSON file and a figure of each.

python -m benchmarks                       # all of them, in half an hour on 2 idle cores
python -m benchmarks compose               # one; the table holds what the others found before
python -m benchmarks compose --quick       # with small sizes: only to see that it runs
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import time
import warnings
from pathlib import Path

import torch

from . import models
from .harness import Result, Settings, machine, table

NAMES = ("overhead", "compose", "training", "inference", "injection", "serving", "growth", "launches", "determinism")
BEGIN, END = "<!-- make bench -->", "<!-- end of make bench -->"
# The rows of README's table: their benchmark, their case, and what README calls them.
HEADLINES = (
    (
        "training",
        "1 × 32, fp32, AdamW fused: vblora / PEFT LoRA r=4",
        "training step, 1 × 32 tokens: vblora / PEFT LoRA",
    ),
    (
        "training",
        "1 × 32, fp32, AdamW fused: PEFT VBLoRA / vblora",
        "training step, 1 × 32 tokens: PEFT VBLoRA / vblora",
    ),
    (
        "compose",
        "PEFT VBLoRA's step / vblora's, AdamW fused",
        "composing for Llama-2-7B's layers: PEFT VBLoRA / vblora",
    ),
    ("inference", "decoding a token, fp32: vblora / PEFT LoRA r=4", "decoding a token: vblora / PEFT LoRA"),
)


def run(name: str, settings: Settings, folder: Path) -> Result:
    start = time.perf_counter()
    result: Result = importlib.import_module(f"benchmarks.{name}").run(settings)
    result.seconds = time.perf_counter() - start
    (folder / f"{name}.json").write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
    result.figure.savefig(folder / f"{name}.png", dpi=120)
    return result


def earlier(name: str, folder: Path) -> Result | None:
    """The earlier results of a benchmark on this machine, with the same packages and threads."""
    path = folder / f"{name}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return Result.from_json(found) if found.get("machine") == machine() else None


def report(results: list[Result]) -> str:
    here = machine()
    minutes = sum(result.seconds for result in results) / 60
    told = ", ".join(f"{name} {here[name]}" for name in ("torch", "peft", "transformers"))
    head = f"{here['cpu']} ({here['capability']}), {here['threads']} threads; {told}; {minutes:.0f} minutes."
    return f"{head}\nMedians of ratios of runs in turn, with their quartiles.\n\n{table(results)}"


def headlines(results: dict[str, Result]) -> str:
    """README's table: the rows of ``HEADLINES`` that there are."""
    found = {(name, row.case): row.figure for name, result in results.items() for row in result.rows}
    rows = [f"| {label} | {found[name, case]} |" for name, case, label in HEADLINES if (name, case) in found]
    return "\n".join(["| benchmark | median (quartiles) |", "|---|---|", *rows])


def write_between(path: Path, text: str) -> None:
    """Replaces the report in a file."""
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path} has no lines {BEGIN} and {END} to write between.")
    temporary = path.with_suffix(".new")
    temporary.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(NAMES)} (all of them)")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds; the figures mean nothing")
    parser.add_argument(
        "--optimizers", action="store_true", help="time AdamW's other implementations, too, besides fused"
    )
    parser.add_argument("--output", type=Path, help="folder of the JSON files and figures (build/bench)")
    between = f"whose text between {BEGIN} and {END} becomes"
    parser.add_argument("--table", type=Path, help=f"a file {between} the table")
    parser.add_argument("--readme", type=Path, help=f"a file {between} a table of the most telling rows")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")

    if arguments.output is None:
        arguments.output = Path("build/bench-quick" if arguments.quick else "build/bench")
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", module="peft|transformers")
    arguments.output.mkdir(parents=True, exist_ok=True)
    settings = Settings(arguments.quick, tuple(models.ADAMW) if arguments.optimizers else ("fused",))
    results: dict[str, Result] = {}
    for name in NAMES:
        if arguments.names and name not in arguments.names:
            if (found := earlier(name, arguments.output)) is not None:
                results[name] = found
            continue
        print(f"{name} …", flush=True)
        results[name] = run(name, settings, arguments.output)
        print(f"{table([results[name]])}\n({results[name].seconds:.0f} s)\n", flush=True)
        gc.collect()
    text = report(list(results.values()))
    (arguments.output / "table.md").write_text(text + "\n", encoding="utf-8")
    if len(results) > 1:
        print(text)
    if arguments.table:
        write_between(arguments.table, text)
    if arguments.readme:
        write_between(arguments.readme, headlines(results))


if __name__ == "__main__":
    main()
