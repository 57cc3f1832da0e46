"""How well methods learn: tasks × methods × seeds, each run written to a file as it ends, a table, and a picture.

python -m benchmarks.quality --data GLUE            the table of README.md; interrupted, it goes on where it was
python -m benchmarks.quality --data GLUE --quick    a short form
python -m benchmarks.quality --data GLUE --methods VB-LoRA --set lr_logits=0.1 scaling=4    one recipe, changed
python -m benchmarks.quality --data GLUE --max-train 2000 --held-out --search 12    as many settings for each method
python -m benchmarks.quality --suite e2e --data E2E    a language model that describes restaurants: loss, BLEU, chrF, ROUGE-L
python -m benchmarks.quality --suite chat              a language model that is tuned on chats: loss
"""

import argparse
import ast
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

import torch
from tqdm import tqdm

from vblora.errors import CommandError
from vblora.files import write_file

from .adapting import STEPS_A_LOSS
from .arguments import parse
from .methods import Recipe, draw
from .picture import draw_losses, draw_scores
from .results import Results, key_of
from .suites import SUITES, AnyTask, Settings, Suite


class _Run(NamedTuple):
    task: AnyTask
    name: str
    recipe: Recipe
    seed: int


def main() -> int:
    arguments = parse(__doc__.split("\n")[0])
    suite = SUITES[arguments.suite]
    try:
        tasks = suite.read(arguments)
        recipes = _recipes(arguments, suite)
        settings = suite.settings(arguments)
        results = Results(arguments.output)
    except (OSError, ValueError, CommandError) as error:
        print(f"python -m benchmarks.quality: error: {error}", file=sys.stderr)
        return 2
    try:
        return _compare(tasks, recipes, settings, arguments, results)
    except KeyboardInterrupt:
        print(
            f"interrupted. The runs that ended are in {arguments.output}; the same command continues with the others.",
            file=sys.stderr,
        )
        return 130


def _compare(
    tasks: list[AnyTask],
    recipes: dict[str, Recipe],
    settings: Settings,
    arguments: argparse.Namespace,
    results: Results,
) -> int:
    print(f"Computing in {_precision(settings)}.", file=sys.stderr)
    if arguments.search and len(tasks) > 1:  # the worse half on the first task is not tried on the others
        _run_missing(tasks[:1], recipes, settings, arguments, results)
        recipes = _better_half(_summary(results, tasks[:1], recipes, settings, arguments.seeds), recipes)
    _run_missing(tasks, recipes, settings, arguments, results)
    rows = _summary(results, tasks, recipes, settings, arguments.seeds)
    if arguments.search:
        rows.sort(key=lambda row: (_method(row["name"]), *_best_first(row)))
    _print(rows, tasks, settings)
    if not (arguments.set or arguments.search or arguments.held_out):
        write_file(arguments.output.with_suffix(".json"), json.dumps(rows, indent=1).encode())
        draw_scores(rows, list(rows[0]["scores"]), arguments.output.with_suffix(".png"))
        names = [task.name for task in tasks]
        draw_losses(rows, names, arguments.output.with_name(f"{arguments.output.stem}-losses.png"))
    return 0


def _precision(settings: Settings) -> str:
    return "bfloat16 autocast" if settings.bfloat16 else "float32"


def _run_missing(
    tasks: list[AnyTask],
    recipes: dict[str, Recipe],
    settings: Settings,
    arguments: argparse.Namespace,
    results: Results,
) -> None:
    suite = SUITES[arguments.suite]
    todo = [
        _Run(task, name, recipe, seed)
        for seed in range(arguments.seeds)
        for task in tasks
        for name, recipe in recipes.items()
        if seed == 0 or recipe.has_seeds
        if not results.has(key_of(task, recipe, seed, settings))
    ]
    with tqdm(total=sum(suite.steps_of(task, settings) for task, *_ in todo), unit="step") as bar:
        for (task, name, recipe, seed), result in _outcomes(todo, suite, settings, arguments.processes):
            results.add(key_of(task, recipe, seed, settings) | {"name": name}, result)
            bar.update(suite.steps_of(task, settings))
            bar.set_description(f"{task.name}, {name}, seed {seed}: {result['score']:.3f}")


def _better_half(rows: list[dict], recipes: dict[str, Recipe]) -> dict[str, Recipe]:
    """Of each method's settings those that scored best, in half the number."""
    of_method: dict[str, list[dict]] = {}
    for row in sorted(rows, key=_best_first):
        of_method.setdefault(_method(row["name"]), []).append(row)
    return {row["name"]: recipes[row["name"]] for own in of_method.values() for row in own[: -(-len(own) // 2)]}


def _best_first(row: dict) -> tuple[bool, float]:
    """A key to sort by. Runs that diverged come last."""
    return math.isnan(row["score"]), -row["score"]


def _outcomes(todo: list[_Run], suite: Suite, settings: Settings, processes: int) -> Iterator[tuple[_Run, dict]]:
    """What each run came to, as it ends. Small steps gain little from a second thread, so a processor has a run of its own."""
    if processes == 1:
        yield from ((one, suite.run(one.task, one.recipe, one.seed, settings)) for one in todo)
        return
    threads = max(1, (os.cpu_count() or 1) // processes)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, torch.set_num_threads, (threads,))
    # Ctrl-C reaches all processes. Workers, which start with the first `submit`, inherit that they ignore it.
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        futures = {pool.submit(suite.run, one.task, one.recipe, one.seed, settings): one for one in todo}
        signal.signal(signal.SIGINT, on_interrupt)
        yield from ((futures[future], future.result()) for future in as_completed(futures))
    except BaseException:  # Ctrl-C, or a run that failed: nobody waits for the others
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
        pool.shutdown(wait=False, cancel_futures=True)


def _recipes(arguments: argparse.Namespace, suite: Suite) -> dict[str, Recipe]:
    """The recipes to run, by their names in the table.

    Raises:
        ValueError: no method has a setting of ``--set``, or one refuses its value.
    """
    chosen = {name: suite.recipes[name] for name in arguments.methods or suite.recipes}
    settings = dict(map(_setting, arguments.set))
    known = set().union(*(recipe.settings for recipe in chosen.values()))
    for name in settings.keys() - known:
        raise ValueError(f"--set: the methods that run have no {name!r}. They have {', '.join(sorted(known))}.")
    recipes = {}
    for name, recipe in chosen.items():
        given = {key: value for key, value in settings.items() if key in recipe.settings}
        try:
            changed = recipe.changed(given)
        except ValueError as error:
            raise ValueError(f"--set: {name}: {error}") from None
        space = {key: values for key, values in suite.spaces[recipe.tuned_as].items() if key not in given}
        for drawn in draw(changed, space, arguments.search or 1):
            recipes[_label(name, given | drawn)] = changed.changed(drawn)
    return recipes


def _setting(pair: str) -> tuple[str, object]:
    name, equals, value = pair.partition("=")
    if not (name and equals and value):
        raise ValueError(f"--set: is {pair!r}, but must be NAME=VALUE, such as lr_bank=2e-3.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _label(name: str, changes: dict[str, object]) -> str:
    return f"{name} [{' '.join(f'{key}={value}' for key, value in changes.items())}]" if changes else name


def _method(label: str) -> str:
    return label.split(" [")[0]


def _summary(
    results: Results, tasks: list[AnyTask], recipes: dict[str, Recipe], settings: Settings, seeds: int
) -> list[dict]:
    """A row a recipe. Scores are by their column of the table: a task and a metric."""
    rows = []
    for name, recipe in recipes.items():
        own_seeds = range(seeds if recipe.has_seeds else 1)
        runs = {task.name: [results.get(key_of(task, recipe, s, settings)) for s in own_seeds] for task in tasks}
        scores = {
            f"{task}, {metric}": [run["scores"][metric] for run in of_task]
            for task, of_task in runs.items()
            for metric in of_task[0]["scores"]
        }
        every = [run for of_task in runs.values() for run in of_task]
        rows.append(
            {
                "name": name,
                "recipe": recipe.to_dict(),
                "stored": every[0]["stored"],
                "bytes": every[0]["bytes"],
                "seeds": len(own_seeds),
                "steps": {task: of_task[0]["steps"] for task, of_task in runs.items()},
                "seconds": {
                    task: statistics.median(run["seconds"] for run in of_task) for task, of_task in runs.items()
                },
                "scores": scores,
                "mean": {column: statistics.mean(of_column) for column, of_column in scores.items()},
                "std": {column: statistics.stdev(s) if len(s) > 1 else 0.0 for column, s in scores.items()},
                "score": statistics.mean(run["score"] for run in every),
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


def _print(rows: list[dict], tasks: list[AnyTask], settings: Settings) -> None:
    columns = list(rows[0]["scores"])
    has_mean = 1 < len(columns) == len(tasks)  # a metric a task
    titles = [column.removeprefix(f"{tasks[0].name}, ") if len(tasks) == 1 else column for column in columns]
    heads = ["", "stored", "bytes", "seeds", *titles, *(["mean"] if has_mean else []), "seconds"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        scores = [_score(row, column) for column in columns]
        mean = [f"{statistics.mean(row['mean'].values()):.1f}"] if has_mean else []
        seconds = f"{sum(row['seconds'].values()):.0f}" if any(row["steps"].values()) else "–"
        cells = [row["name"], f"{row['stored']:,}", f"{row['bytes']:,}", str(row["seeds"]), *scores, *mean, seconds]
        print(f"| {' | '.join(cells)} |")
    print(f"\nOn {', '.join(task.name for task in tasks)}. Mean ± standard deviation of the seeds from 0 on.")
    print(
        "Stored: values, without a classifier's head and a frozen bank. Bytes: of the deploy form's file, without the same."
    )
    print("Seconds: of one training run on each task, the median of the seeds.")
    longest = max((row["steps"] for row in rows), key=lambda steps: sum(steps.values()))
    steps = ", ".join(f"{count:,} on {task}" for task, count in longest.items())
    print(f"Steps of {settings.batch_size} rows: {steps}. Computed in {_precision(settings)}.")


def _score(row: dict, column: str) -> str:
    digits = 4 if column.endswith("loss") else 1
    deviation = f" ± {row['std'][column]:.{digits}f}" if row["seeds"] > 1 else ""
    return f"{row['mean'][column]:.{digits}f}{deviation}"


if __name__ == "__main__":
    sys.exit(main())
