"""The drawing in docs/architecture.md matches the imports of vblora/."""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def room(module: list[str]) -> str:
    """The part of ``vblora`` that a module belongs to."""
    return module[1] if len(module) > 1 else "vblora"


@functools.cache
def imports() -> set[tuple[str, str]]:
    found = set()
    for path in (ROOT / "vblora").rglob("*.py"):
        module = path.relative_to(ROOT).with_suffix("").parts
        package = list(module[:-1])
        source = room(package if path.name == "__init__.py" else list(module))
        if path.name == "__main__.py":  # a command, wherever it lies
            source = "cli"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) + 1 - node.level] + (node.module or "").split(".") * bool(node.module)
                # `from . import ops` imports a room, `from .ops import empty_cache` a name in one.
                found |= {(source, room([*base, alias.name] if len(base) == 1 else base)) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vblora":
                found.add((source, room(node.module.split("."))))
            elif isinstance(node, ast.Import):
                found |= {(source, room(a.name.split("."))) for a in node.names if a.name.split(".")[0] == "vblora"}
    return {(source, target) for source, target in found if source != target}


def drawn() -> set[tuple[str, str]]:
    text = (ROOT / "docs" / "architecture.md").read_text()
    arrows = re.findall(r"^    (\w+)(?:\[[^\]]*\])? --> (\w+)", text.split("```")[1], re.MULTILINE)
    assert len(arrows) > 10
    return set(arrows)


def below(start: str, arrows: set[tuple[str, str]]) -> set[str]:
    found: set[str] = set()
    left = [start]
    while left:
        here = left.pop()
        new = {target for source, target in arrows if source == here} - found
        found |= new
        left += new
    return found


def test_each_arrow_is_an_import():
    assert drawn() <= imports()


def test_each_import_follows_the_arrows():
    arrows = drawn()
    assert not {(source, target) for source, target in imports() if target not in below(source, arrows)}


def test_there_is_no_cycle():
    arrows = drawn()
    assert not [source for source, _ in arrows if source in below(source, arrows)]
