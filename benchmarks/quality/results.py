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
    """Runs by what they depend on, a line of the file each.

    Raises:
        OSError, ValueError: the file cannot be written, or is something else; named.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, dict] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read()

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]
        if complete != text:  # a process was killed while it wrote this line
            self.path.write_text(complete, encoding="utf-8")
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                entry = json.loads(line)
                self.runs[self._name(entry["key"])] = entry["result"]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"--output: line {number} of {self.path} is not a run of this benchmark. Give another file."
                ) from None

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
