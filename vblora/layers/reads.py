"""Which layers a model's code does not call, reading their weight instead: an update of such a layer is left out."""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# What a tensor tells of itself, and functions that ask for no more: neither looks at its values.
_FACTS = {
    *("device", "dim", "dtype", "element_size", "is_contiguous", "is_cpu", "is_cuda", "is_floating_point", "is_meta"),
    *("is_quantized", "is_sparse", "itemsize", "layout", "ndim", "numel", "requires_grad", "shape", "size", "stride"),
}
_ASK_FOR_FACTS = {"getattr", "hasattr", "id", "is_floating_point", "is_tensor", "isinstance", "to", "type", "type_as"}
# What its own class does not show, or an `if` with the way that nearly all models take.
_KNOWN = {
    "Gemma3nTextAltUp": ("correction_coefs", "prediction_coefs"),
    "JambaMambaMixer": ("dt_proj",),  # calls it if the model is quantised
    # RwkvModel divides these weights as it is evaluated.
    "RwkvFeedForward": ("value",),
    "RwkvSelfAttention": ("output",),
}

_Path = tuple[str, ...]  # from a module to one within it; "*" for any child


def readers(modules: dict[str, nn.Module]) -> dict[nn.Module, str]:
    """The layers whose weight some module's code reads past the layer, with the name of that module's class.

    Code that reads it on one side of an ``if`` and calls the layer on the other counts as calling: a forward shows which it is.
    """
    found: dict[nn.Module, str] = {}
    for name, module in modules.items():
        known = [(child,) for cls in type(module).__mro__ for child in _KNOWN.get(cls.__name__, ())]
        for path in (*_read_by(type(module)), *known):
            for layer in _at(modules, [name, *path] if name else list(path)):
                found[layer] = type(module).__name__  # of several, the one nearest to it
    return found


def _at(modules: dict[str, nn.Module], parts: list[str]) -> list[nn.Module]:
    """The modules of a name, in which "*" stands for any part."""
    if "*" not in parts:
        return [modules[name] for name in [".".join(parts)] if name in modules]
    pattern = re.compile(r"\.".join("[^.]+" if part == "*" else re.escape(part) for part in parts))
    return [module for name, module in modules.items() if pattern.fullmatch(name)]


def listed(names: list[str]) -> str:
    """Layers by their names, for a message."""
    first = ", ".join(f"`{name}`" for name in names[:4])
    return f"{first} and {len(names) - 4} more layers" if len(names) > 4 else first


@functools.cache
def _read_by(cls: type[nn.Module]) -> tuple[_Path, ...]:
    """From a module of this class to the layers whose weight its ``forward`` reads, or what that calls of the module."""
    uses: list[_Use] = []
    seen, left = set(), [("forward", {})]
    while left:
        name, outer = left.pop()
        if name in seen:
            continue
        seen.add(name)
        for code in _definitions(cls, name):
            for use in _uses(code):
                uses.append(use._replace(arms=outer | use.arms))
                if len(use.path) == 1 and inspect.isfunction(getattr(cls, use.path[0], None)):
                    left.append((use.path[0], uses[-1].arms))
    reads = [use for use in uses if use.kind == "read" and use.path]
    calls = [use for use in uses if use.kind == "called"]
    past = [r for r in reads if not any(c.path == r.path and _exclude(r.arms, c.arms) for c in calls)]
    return tuple(dict.fromkeys(read.path for read in past))


def _definitions(cls: type, name: str) -> Iterator[ast.AST]:
    """A method's code, and that of those that it overrides and calls."""
    for base in cls.__mro__:
        function = inspect.unwrap(vars(base)[name]) if inspect.isfunction(vars(base).get(name)) else None
        if base is nn.Module or function is None:
            continue
        try:
            source = textwrap.dedent(inspect.getsource(function))
            yield ast.parse(source)
        except (OSError, SyntaxError, TypeError):  # no source, or not by itself: nothing is known
            return
        if "super()" not in source:
            return


class _Use(NamedTuple):
    kind: str  # "read": the weight's values; "called": the layer, or it is handed to somebody who may
    path: _Path
    arms: dict[ast.AST, bool]  # of the conditions that it stands under: whether it runs if they hold


def _uses(tree: ast.Module) -> Iterator[_Use]:
    paths = _local_names(tree)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        path = _path(node, paths)
        outer = parents.get(node)
        if path is None or not isinstance(node.ctx, ast.Load):
            continue
        if path[-1:] == ("weight",):
            if not _asks_for_a_fact(node, outer, parents):
                yield _Use("read", path[:-1], _arms(node, parents))
        elif not (isinstance(outer, (ast.Attribute, ast.Subscript, ast.Assign)) and node is outer.value):
            yield _Use("called", path, _arms(node, parents))


def _local_names(tree: ast.Module) -> dict[str, _Path]:
    """What a method calls itself, and the modules within."""
    arguments = getattr(tree.body[0], "args", None)
    paths: dict[str, _Path] = {argument.arg: () for argument in arguments.args[:1]} if arguments else {}
    for node in ast.walk(tree):
        pairs = []
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            pairs = [(node.targets[0], _path(node.value, paths))]
        elif isinstance(node, (ast.For, ast.comprehension)):
            targets = node.target.elts if isinstance(node.target, ast.Tuple) else [node.target]
            within = _iterated(node.iter)
            found = [_path(each, paths) for each in within]
            pairs = [(target, path and (*path, "*")) for target, path in zip(targets, found, strict=False)]
        paths |= {
            target.id: path for target, path in pairs if isinstance(target, ast.Name) and path and path[-1] != "weight"
        }
    return paths


def _iterated(node: ast.AST) -> list[ast.AST]:
    """What a loop's targets run through, each."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("enumerate", "zip"):
        return [node.func, *node.args] if node.func.id == "enumerate" else node.args
    return [node]


def _path(node: ast.AST, paths: dict[str, _Path]) -> _Path | None:
    """Of ``self.a.b[i]``: a, b, "*"; ``paths``: of local names."""
    if isinstance(node, ast.Name):
        return paths.get(node.id)
    if isinstance(node, ast.Attribute):
        path = _path(node.value, paths)
        return None if path is None else (*path, node.attr)
    if isinstance(node, ast.Subscript):
        path = _path(node.value, paths)
        return (*path, "*") if path and path[-1] != "weight" else None
    return None


def _asks_for_a_fact(node: ast.AST, outer: ast.AST | None, parents: dict[ast.AST, ast.AST]) -> bool:
    if isinstance(outer, ast.Attribute):
        return outer.attr in _FACTS
    if isinstance(outer, ast.Compare):
        return all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in outer.ops)
    if isinstance(outer, ast.keyword):
        outer = parents[outer]
    if isinstance(outer, ast.Call):
        function = outer.func
        return getattr(function, "attr", getattr(function, "id", None)) in _ASK_FOR_FACTS
    return False


def _arms(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> dict[ast.AST, bool]:
    arms = {}
    while (outer := parents.get(node)) is not None:
        if isinstance(outer, (ast.If, ast.IfExp)) and node is not outer.test:
            body = outer.body if isinstance(outer.body, list) else [outer.body]
            arms[outer] = node in body
        node = outer
    return arms


def _exclude(one: dict[ast.AST, bool], other: dict[ast.AST, bool]) -> bool:
    return any(branch in other and other[branch] != arm for branch, arm in one.items())


class Watched(Tensor):
    """A frozen weight as a forward hands it to whoever reads it past its layer: tells of the first use of its values."""

    _notice: Callable[[], None]

    @classmethod
    def of(cls, weight: nn.Parameter, notice: Callable[[], None]) -> "Watched":
        watched = weight.as_subclass(cls)
        watched._notice = notice
        return watched

    @classmethod
    def __torch_function__(cls, function, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, cls)]
        name = getattr(function, "__name__", "")
        if name == "__get__":  # of an attribute
            name = getattr(function.__self__, "__name__", "")
        if name not in _FACTS and not (name in _ASK_FOR_FACTS and not isinstance(args[0], cls)):
            for weight in read:
                weight._notice()
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)
