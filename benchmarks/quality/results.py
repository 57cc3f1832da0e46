"""Runs that are done, kept in a file."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from .methods import Recipe
from .suites import AnyTask, Settings


def key_of(task: AnyTask, recipe: Recipe, seed: int, settings: Settings) -> dict:
    """All that a run depends on."""
    about = {name: value for name, value in asdict(settings).items() if name != "model"}
    about |= {"model": str(settings.model.resolve()), "task": task.name, "data": _digest(task), "seed": seed}
    return about | {"recipe": recipe.to_dict()}


def _digest(task: AnyTask) -> str:
    return hashlib.sha256(repr(task.data).encode()).hexdigest()[:16]


class Results:
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
