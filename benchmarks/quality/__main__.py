"""How well methods learn: tasks × methods × seeds, each run written to a file as it ends, a table, and a picture.

python -m benchmarks.quality --data GLUE            the table of README.md; interrupted, it goes on where it was
python -m benchmarks.quality --data GLUE --quick    a short form
python -m benchmarks.quality --data GLUE --methods VB-LoRA --set lr_logits=0.1 scaling=4    one recipe, changed
python -m benchmarks.quality --data GLUE --max-train 2000 --held-out --search 12    as many settings of each method
"""

import argparse
import ast
import hashlib
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from vblora.errors import CommandError
from vblora.files import write_file
from vblora.finetune.demo import find_model

from .methods import RECIPES, Recipe, draw
from .picture import draw_losses, draw_scores
from .tasks import WORD_ORDER, Task, read_tasks
from .training import STEPS_A_LOSS, Settings, run, steps_of

_QUICK = ("frozen encoder", "LoRA r=8", "VB-LoRA", "VB-LoRA, the paper's rates")
_QUICK_ROWS = 1000


class _Run(NamedTuple):
    task: Task
    name: str
    recipe: Recipe
    seed: int


def main() -> int:
    arguments = _arguments()
    try:
        tasks = read_tasks(arguments.data, arguments.tasks, arguments.max_train, arguments.held_out)
        recipes = _recipes(arguments)
        settings = Settings(arguments.model or find_model(), arguments.epochs, bfloat16=not arguments.float32)
    except (OSError, ValueError, CommandError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = _Results(arguments.output)
    if arguments.search:  # the worse half on the first task is not tried on the others
        _run_missing(tasks[:1], recipes, settings, arguments, results)
        recipes = _better_half(_summary(results, tasks[:1], recipes, settings, arguments.seeds), recipes)
    _run_missing(tasks, recipes, settings, arguments, results)
    rows = _summary(results, tasks, recipes, settings, arguments.seeds)
    if arguments.search:
        rows.sort(key=lambda row: (_method(row["name"]), -row["average"]))
    _print(rows, tasks, arguments.seeds)
    if not (arguments.set or arguments.search or arguments.held_out):
        write_file(arguments.output.with_suffix(".json"), json.dumps(rows, indent=1).encode())
        names = [task.name for task in tasks]
        draw_scores(rows, names, arguments.output.with_suffix(".png"))
        draw_losses(rows, names, arguments.output.with_name(f"{arguments.output.stem}-losses.png"))
    return 0


def _run_missing(
    tasks: list[Task],
    recipes: dict[str, Recipe],
    settings: Settings,
    arguments: argparse.Namespace,
    results: "_Results",
) -> None:
    todo = [
        _Run(task, name, recipe, seed)
        for seed in range(arguments.seeds)
        for task in tasks
        for name, recipe in recipes.items()
        if not results.has(_key(task, recipe, seed, settings))
    ]
    with tqdm(total=sum(steps_of(task, settings) for task, *_ in todo), unit="step") as bar:
        for (task, name, recipe, seed), result in _outcomes(todo, settings, arguments.processes):
            results.add(_key(task, recipe, seed, settings) | {"name": name}, result)
            bar.update(steps_of(task, settings))
            bar.set_description(f"{task.name}, {name}, seed {seed}: {result['score']:.1f}")


def _better_half(rows: list[dict], recipes: dict[str, Recipe]) -> dict[str, Recipe]:
    """Of each method's settings those that scored best, in half the number."""
    of_method: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: -row["average"]):
        of_method.setdefault(_method(row["name"]), []).append(row)
    return {row["name"]: recipes[row["name"]] for own in of_method.values() for row in own[: -(-len(own) // 2)]}


def _outcomes(todo: list[_Run], settings: Settings, processes: int) -> Iterator[tuple[_Run, dict]]:
    """What each run came to, as it ends. Small steps gain little from a second thread, so a processor has a run of its own."""
    if processes == 1:
        yield from ((one, run(one.task, one.recipe, one.seed, settings)) for one in todo)
        return
    threads = max(1, (os.cpu_count() or 1) // processes)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, torch.set_num_threads, (threads,))
    try:
        futures = {pool.submit(run, one.task, one.recipe, one.seed, settings): one for one in todo}
        yield from ((futures[future], future.result()) for future in as_completed(futures))
    finally:  # where one failed, those that wait are not run for nobody
        pool.shutdown(wait=False, cancel_futures=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.quality", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("GLUE"), help="folder of TASK/train.tsv, TASK/dev.tsv"
    )
    parser.add_argument("--model", type=Path, help="folder of an encoder (the demo's all-MiniLM-L6-v2)")
    parser.add_argument("--tasks", nargs="+", help=f"all in the folder; {WORD_ORDER} is made from the texts in it")
    parser.add_argument(
        "--methods", nargs="+", choices=list(RECIPES), metavar="METHOD", help=f"of {', '.join(RECIPES)}"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-train", type=int, help="training rows of each task (all)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="changes fields and rates of the methods"
    )
    parser.add_argument(
        "--search",
        type=int,
        metavar="N",
        help="instead of each method's recipe: N settings, its own and others drawn, of which the first task lets half pass",
    )
    parser.add_argument(
        "--held-out", action="store_true", help="score on the training rows beyond --max-train, not on dev.tsv"
    )
    parser.add_argument("--float32", action="store_true", help="instead of bfloat16 autocast")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 4), help="runs at once (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("build/quality.jsonl"), help="where runs are kept")
    parser.add_argument(
        "--quick", action="store_true", help=f"one seed, {_QUICK_ROWS} rows, the methods that matter most"
    )
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("give --data, or set GLUE, to a folder of GLUE's tasks")
    arguments.data = Path(arguments.data)
    if arguments.quick:
        arguments.seeds, arguments.max_train = 1, arguments.max_train or _QUICK_ROWS
        arguments.methods = arguments.methods or list(_QUICK)
    return arguments


def _recipes(arguments: argparse.Namespace) -> dict[str, Recipe]:
    settings = {}
    for pair in arguments.set:
        name, _, value = pair.partition("=")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
    return {
        _label(name, changes): RECIPES[name].changed(changes)
        for name in arguments.methods or list(RECIPES)
        for changes in [settings | drawn for drawn in draw(RECIPES[name].method, arguments.search or 1)]
    }


def _label(name: str, changes: dict[str, object]) -> str:
    return f"{name} [{' '.join(f'{key}={value}' for key, value in changes.items())}]" if changes else name


def _method(label: str) -> str:
    return label.split(" [")[0]


def _key(task: Task, recipe: Recipe, seed: int, settings: Settings) -> dict:
    """All that a run depends on."""
    about = {name: value for name, value in asdict(settings).items() if name != "model"}
    about |= {"model": str(settings.model.resolve()), "task": task.name, "data": _digest(task), "seed": seed}
    return about | {"recipe": recipe.to_dict()}


def _digest(task: Task) -> str:
    return hashlib.sha256(repr((task.train, task.dev)).encode()).hexdigest()[:16]


class _Results:
    """Runs by what they depend on, a line of the file each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, dict] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self.runs[self._name(entry["key"])] = entry["result"]

    @staticmethod
    def _name(key: dict) -> str:
        return json.dumps({name: value for name, value in key.items() if name != "name"}, sort_keys=True)

    def has(self, key: dict) -> bool:
        return self._name(key) in self.runs

    def get(self, key: dict) -> dict:
        return self.runs[self._name(key)]

    def add(self, key: dict, result: dict) -> None:
        self.runs[self._name(key)] = result
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "result": result}) + "\n")


def _summary(
    results: _Results, tasks: list[Task], recipes: dict[str, Recipe], settings: Settings, seeds: int
) -> list[dict]:
    rows = []
    for name, recipe in recipes.items():
        runs = {task.name: [results.get(_key(task, recipe, s, settings)) for s in range(seeds)] for task in tasks}
        scores = {task: [run["score"] for run in of_task] for task, of_task in runs.items()}
        every = [run for of_task in runs.values() for run in of_task]
        rows.append(
            {
                "name": name,
                "recipe": recipe.to_dict(),
                "stored": every[0]["stored"],
                "seconds": {
                    task: statistics.median(run["seconds"] for run in of_task) for task, of_task in runs.items()
                },
                "scores": scores,
                "mean": {task: statistics.mean(of_task) for task, of_task in scores.items()},
                "std": {task: statistics.stdev(s) if seeds > 1 else 0.0 for task, s in scores.items()},
                "average": statistics.mean(run["score"] for run in every),
                "losses": {task: _mean_losses(of_task) for task, of_task in runs.items()},
                "exhausted": max(run["exhausted"] for run in every),
            }
        )
    return rows


def _mean_losses(runs: list[dict]) -> list[tuple[int, float]]:
    """The training loss of all seeds, with the step in the middle of those that it is the mean of."""
    means = [statistics.mean(losses) for losses in zip(*(run["losses"] for run in runs), strict=True)]
    steps = [min((i + 1) * STEPS_A_LOSS, runs[0]["steps"]) for i in range(len(means))]
    return [((before + after) // 2, loss) for before, after, loss in zip([0, *steps], steps, means, strict=False)]


def _print(rows: list[dict], tasks: list[Task], seeds: int) -> None:
    columns = ["", "stored", *(f"{task.name}, {task.metric}" for task in tasks), "mean", "seconds"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        scores = [f"{row['mean'][task.name]:.1f} ± {row['std'][task.name]:.1f}" for task in tasks]
        seconds = f"{sum(row['seconds'].values()):.0f}"
        cells = [row["name"], f"{row['stored']:,}", *scores, f"{row['average']:.1f}", seconds]
        print(f"| {' | '.join(cells)} |")
    print(f"\nMean ± standard deviation of seeds 0 to {seeds - 1}. Stored: parameters beside the head.")
    print("Seconds: of training once on each task, the median of the seeds.")


if __name__ == "__main__":
    sys.exit(main())
