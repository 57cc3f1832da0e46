"""Finds layers whose weight a model's code reads without calling the layer, which would leave out the layer's update."""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# Attributes of a tensor, and functions, that do not read its values.
_METADATA = {
    *("device", "dim", "dtype", "element_size", "is_contiguous", "is_cpu", "is_cuda", "is_floating_point", "is_meta"),
    *("is_quantized", "is_sparse", "itemsize", "layout", "ndim", "numel", "requires_grad", "shape", "size", "stride"),
}
_METADATA_FUNCTIONS = {
    "getattr",
    "hasattr",
    "id",
    "is_floating_point",
    "is_tensor",
    "isinstance",
    "to",
    "type",
    "type_as",
}
# Layers by class that the class's code does not reveal, or reads on the usual side of an `if`.
_KNOWN = {
    "Gemma3nTextAltUp": ("correction_coefs", "prediction_coefs"),
    "JambaMambaMixer": ("dt_proj",),  # called only in a quantised model
    # RwkvModel divides these weights in evaluation.
    "RwkvFeedForward": ("value",),
    "RwkvSelfAttention": ("output",),
}

# torch's encoder calls these layers, but reads their weights in its fast path in inference. It does not take that path if a layer
# of it has a hook (model/parts.py).
_CALLED_WITH_HOOKS = "linear1", "linear2"

_Path = tuple[str, ...]  # from a module to a submodule; "*" stands for any child
_Arms = dict[ast.AST, bool]  # the `if`s around some code: whether it runs if their condition holds


def readers(modules: dict[str, nn.Module]) -> dict[nn.Module, str]:
    """The layers whose weight some module's code reads without calling the layer, with the name of that module's class.

    Code that reads the weight on one side of an ``if`` and calls the layer on the other counts as calling it; a forward shows
    which one happens.
    """
    found: dict[nn.Module, str] = {}
    for name, module in modules.items():
        cls: type = type(module)
        known = [(child,) for base in cls.__mro__ for child in _KNOWN.get(base.__name__, ())]
        for path in (*_read_by(cls), *known):
            if path[-1] in _CALLED_WITH_HOOKS and has_fast_path(module):
                continue
            for layer in _at(modules, [name, *path] if name else list(path)):
                found[layer] = cls.__name__  # the innermost such module
    return found


def has_fast_path(module: nn.Module) -> bool:
    """Whether a module is torch's transformer encoder or a layer of it."""
    encoders = nn.TransformerEncoder, nn.TransformerEncoderLayer
    return any(type(module).forward is encoder.forward for encoder in encoders)


def _at(modules: dict[str, nn.Module], parts: list[str]) -> list[nn.Module]:
    """The modules that a dotted name matches; "*" stands for any part."""
    if "*" not in parts:
        return [modules[name] for name in [".".join(parts)] if name in modules]
    pattern = re.compile(r"\.".join("[^.]+" if part == "*" else re.escape(part) for part in parts))
    return [module for name, module in modules.items() if pattern.fullmatch(name)]


@functools.cache
def _read_by(cls: type) -> tuple[_Path, ...]:
    """The layers whose weight ``forward`` of this class reads, directly or in the methods that it calls."""
    uses: list[_Use] = []
    seen: set[str] = set()
    pending: list[tuple[str, _Arms]] = [("forward", {})]
    while pending:
        name, outer = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        for code in _definitions(cls, name):
            for use in _uses(code):
                uses.append(use._replace(arms=outer | use.arms))
                if len(use.path) == 1 and inspect.isfunction(getattr(cls, use.path[0], None)):
                    pending.append((use.path[0], uses[-1].arms))
    reads = [use for use in uses if use.kind == "read" and use.path]
    calls = [use for use in uses if use.kind == "called"]
    uncalled = [r for r in reads if not any(c.path == r.path and _exclude(r.arms, c.arms) for c in calls)]
    return tuple(dict.fromkeys(read.path for read in uncalled))


def _definitions(cls: type, name: str) -> Iterator[ast.Module]:
    """The code of a method, and of the methods that it overrides and calls."""
    for base in cls.__mro__:
        function = inspect.unwrap(vars(base)[name]) if inspect.isfunction(vars(base).get(name)) else None
        if base is nn.Module or function is None:
            continue
        try:
            source = textwrap.dedent(inspect.getsource(function))
            yield ast.parse(source)
        except (OSError, SyntaxError, TypeError):  # no source, or none that parses alone
            return
        if "super()" not in source:
            return


class _Use(NamedTuple):
    kind: str  # "read": of the weight's values; "called": of the layer, or of a function that gets the layer
    path: _Path
    arms: _Arms


def _uses(tree: ast.Module) -> Iterator[_Use]:
    paths = _local_names(tree)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        path = _path(node, paths)
        outer = parents.get(node)
        if path is None or not isinstance(getattr(node, "ctx", None), ast.Load):
            continue
        if path[-1:] == ("weight",):
            if not _reads_metadata(node, outer, parents):
                yield _Use("read", path[:-1], _arms(node, parents))
        elif not (isinstance(outer, (ast.Attribute, ast.Subscript, ast.Assign)) and node is outer.value):
            yield _Use("called", path, _arms(node, parents))


def _local_names(tree: ast.Module) -> dict[str, _Path]:
    """The local names of a method for its module (``self``) and for submodules."""
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


def _iterated(node: ast.expr) -> list[ast.expr]:
    """What each target of a loop iterates over."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("enumerate", "zip"):
        return [node.func, *node.args] if node.func.id == "enumerate" else node.args
    return [node]


def _path(node: ast.AST, paths: dict[str, _Path]) -> _Path | None:
    """The path of ``self.a.b[i]`` is a, b, "*"; ``paths`` holds those of local names."""
    if isinstance(node, ast.Name):
        return paths.get(node.id)
    if isinstance(node, ast.Attribute):
        path = _path(node.value, paths)
        return None if path is None else (*path, node.attr)
    if isinstance(node, ast.Subscript):
        path = _path(node.value, paths)
        return (*path, "*") if path and path[-1] != "weight" else None
    return None


def _reads_metadata(node: ast.AST, outer: ast.AST | None, parents: dict[ast.AST, ast.AST]) -> bool:
    if isinstance(outer, ast.Attribute):
        return outer.attr in _METADATA
    if isinstance(outer, ast.Compare):
        return all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in outer.ops)
    if isinstance(outer, ast.keyword):
        outer = parents[outer]
    if isinstance(outer, ast.Call):
        function = outer.func
        return getattr(function, "attr", getattr(function, "id", None)) in _METADATA_FUNCTIONS
    return False


def _arms(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> _Arms:
    arms: _Arms = {}
    while (outer := parents.get(node)) is not None:
        if isinstance(outer, (ast.If, ast.IfExp)) and node is not outer.test:
            body = outer.body if isinstance(outer, ast.If) else [outer.body]
            arms[outer] = any(node is statement for statement in body)
        node = outer
    return arms


def _exclude(one: _Arms, other: _Arms) -> bool:
    """Whether two uses are on different sides of an ``if``."""
    return any(branch in other and other[branch] != arm for branch, arm in one.items())


class Watched(Tensor):
    """A frozen weight that calls ``notice`` when its values are used."""

    _notice: Callable[[], None]

    @classmethod
    def of(cls, weight: nn.Parameter, notice: Callable[[], None]) -> "Watched":
        watched = weight.as_subclass(cls)
        watched._notice = notice
        return watched

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        _types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, cls)]
        name = getattr(function, "__name__", "")
        if name == "__get__":  # of an attribute
            name = getattr(getattr(function, "__self__", None), "__name__", "")
        if name not in _METADATA and not (name in _METADATA_FUNCTIONS and not isinstance(args[0], cls)):
            for weight in read:
                weight._notice()
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)
