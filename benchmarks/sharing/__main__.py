"""What a frozen bank that tasks share costs each of them, on tasks that took no part in it: tasks × variants × seeds.

python -m benchmarks.sharing --glue GLUE --e2e E2E             scores of training rows that are held out
python -m benchmarks.sharing --glue GLUE --e2e E2E --report    scores of the development and test sets

Each run is a line of --output as it ends; the same command goes on where it stopped.
"""

import argparse
import ast
import json
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from vblora.files import read_tensors, write_tensors
from vblora.finetune.demo import find_model
from vblora.finetune.models import computes_in_bfloat16

from ..quality.training import Settings
from . import tasks
from .training import run, train_bank
from .variants import VARIANTS, Variant


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    changes = {name: ast.literal_eval(value) for name, _, value in (pair.partition("=") for pair in arguments.set)}
    variants = {_label(name, arguments.set): replace(VARIANTS[name], **changes) for name in arguments.variants}
    settings = Settings(
        arguments.model or find_model(), computes_in_bfloat16(arguments.precision), epochs=arguments.epochs
    )
    rows = tasks.Rows(arguments.max_train, arguments.max_eval, 2 * arguments.max_eval)
    done = _read(arguments.output)
    todo = [
        (seed, task, name)
        for seed in range(arguments.seeds)
        for task in arguments.tasks
        for name, variant in variants.items()
        if _key(arguments, rows, settings, task, variant, seed) not in done
    ]
    for seed, task_name, name in tqdm(todo, unit="run"):
        task = tasks.read(task_name, arguments.glue, arguments.e2e, rows, report=arguments.report)
        variant = variants[name]
        shared = _shared(arguments, task_name, rows, settings) if variant.bank == "shared" else None
        key = _key(arguments, rows, settings, task_name, variant, seed)
        done[key] = run(task, variant, seed, settings, shared)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with open(arguments.output, "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": json.loads(key), "name": name, "result": done[key]}) + "\n")
    _print(arguments, rows, settings, variants, done)
    return 0


def _shared(arguments: argparse.Namespace, left_out: str, rows: tasks.Rows, settings: Settings) -> torch.Tensor:
    """The bank of all tasks but this one and its relatives, trained now if it is not in its file."""
    names = [name for name in tasks.others(left_out) if name in arguments.bank_tasks]
    path = arguments.output.parent / f"bank-{'+'.join(names)}-{rows.train}x{settings.epochs}.safetensors".replace(
        " ", "-"
    )
    if not path.exists():
        read = [tasks.read(name, arguments.glue, arguments.e2e, rows) for name in names]
        bank, about = train_bank(read, VARIANTS["own"], 0, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"bank": bank})
        print(f"{path.name}: {about['scores']}", file=sys.stderr)
    return read_tensors(path)[0]["bank"]


def _label(name: str, changes: list[str]) -> str:
    return f"{name} [{' '.join(changes)}]" if changes else name


def _key(
    arguments: argparse.Namespace, rows: tasks.Rows, settings: Settings, task: str, variant: Variant, seed: int
) -> str:
    """All that a run depends on."""
    about = asdict(settings) | {"model": Path(settings.model).name, "rows": rows, "report": arguments.report}
    about |= {"task": task, "variant": variant.to_dict(), "seed": seed}
    if variant.bank == "shared":
        about["bank of"] = [other for other in tasks.others(task) if other in arguments.bank_tasks]
    return json.dumps(about, sort_keys=True)


def _read(path: Path) -> dict[str, dict]:
    if not path.exists():
        return {}
    entries = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {json.dumps(entry["key"], sort_keys=True): entry["result"] for entry in entries}


def _print(
    arguments: argparse.Namespace,
    rows: tasks.Rows,
    settings: Settings,
    variants: dict[str, Variant],
    done: dict[str, dict],
) -> None:
    """Each score, and in brackets what it is above the first variant's."""
    columns = ["", "bytes a user", *arguments.tasks, "mean difference"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    first: dict[str, float] = {}
    own = 0
    for name, variant in variants.items():
        cells, differences = [], []
        for task in arguments.tasks:
            runs = [done[_key(arguments, rows, settings, task, variant, seed)] for seed in range(arguments.seeds)]
            score = statistics.mean(run["score"] for run in runs)
            difference = score - first.setdefault(task, score)
            differences.append(difference)
            cells.append(f"{score:.1f} ({difference:+.1f})")
            size = runs[0]["bytes"]
        own = own or size
        print(f"| {name} | {size:,} ({size / own:.0%}) | {' | '.join(cells)} | {statistics.mean(differences):+.1f} |")
    print(f"\nMeans of seeds 0 to {arguments.seeds - 1}.")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.sharing", description=__doc__.split("\n")[0])
    parser.add_argument("--glue", type=Path, required=True, help="folder of TASK/train.tsv, TASK/dev.tsv")
    parser.add_argument("--e2e", type=Path, required=True, help="folder of devset.csv and testset_w_refs.csv")
    parser.add_argument("--model", type=Path, help="folder of an encoder (the demo's all-MiniLM-L6-v2)")
    parser.add_argument("--tasks", nargs="+", choices=tasks.NAMES, default=list(tasks.NAMES), metavar="TASK")
    parser.add_argument("--bank-tasks", nargs="+", choices=tasks.NAMES, default=list(tasks.NAMES), metavar="TASK",
                        help="that shared banks are trained on, but for the one left out and its relatives")  # fmt: skip
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT",
                        help=f"the first is what the others are compared with: {', '.join(VARIANTS)}")  # fmt: skip
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="changes fields of the variants, such as lr_scales=0.1",
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--max-train", type=int, default=1500, help="rows to train on (%(default)s)")
    parser.add_argument(
        "--max-eval", type=int, default=1000, help="rows to choose by; twice as many to report (%(default)s)"
    )
    parser.add_argument(
        "--report", action="store_true", help="score on the development and test sets: once, at the end"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="what layers compute in; auto: bfloat16 where the processor is fast at it",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("build/sharing/runs.jsonl"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
