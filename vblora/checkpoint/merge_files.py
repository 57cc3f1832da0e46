"""Merges an adapter into a base model's files without loading the model: one tensor at a time."""

import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters import Target
from ..errors import listed
from ..files import atomic_folder, atomic_replacement, open_tensors, refuse_lfs_pointer, write_file
from .base_config import stores_in_out, tied_vocabularies
from .contents import Contents
from .json_objects import Json, JsonObject, as_type, field, optional_field, read_object

# Models without a head that their embeddings could be tied to, whatever their config says.
_WITHOUT_WORD_HEAD = ("Classification", "QuestionAnswering", "MultipleChoice")
# Weights in other formats, which are not merged and so are left out.
_OTHER_WEIGHTS = (".gguf", ".h5", ".mlmodel", ".msgpack", ".onnx", ".onnx_data", ".ot", ".pth")
_OTHER_WEIGHTS_AT_TOP = (*_OTHER_WEIGHTS, ".bin", ".bin.index.json", ".pt", ".safetensors")
# Sub-folders that have the whole model in another format. In others, such weights are modules of their own.
_OTHER_FORMATS = ("coreml", "metal", "onnx", "openvino", "original")
_CHECKPOINT = re.compile(r"checkpoint-\d+")  # a Trainer's, each with a model of its own
_CONFIG = "config.json"
_ADAPTER = "adapter_config.json"  # with it, transformers loads the model and the adapter that it names


class Merged(NamedTuple):
    """The result of a merge.

    Attributes:
        shards: number of files with tensors.
        updated: names of the weights that an update was added to.
        replaced: names of the tensors that were replaced by extra parameters.
        left_out: files and folders that were not copied: the base model's weights in other formats, a Trainer's checkpoints, and
            another adapter.
    """

    shards: int
    updated: list[str]
    replaced: list[str]
    left_out: list[str]


class _Stored(NamedTuple):
    shard: str
    shape: tuple[int, ...]
    dtype: str


def merge_into_shards(
    contents: Contents,
    base: Path,
    out: Path,
    config_changes: Mapping[str, Json] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Merged:
    """Writes the files of ``base`` with an adapter merged into them to ``out``, as :func:`vblora.merge` merges it into a model.

    Extra parameters replace the tensors of their names and are rounded to the dtype of those. Each target's update is added to
    its weight in float32 (float64 for a float64 weight) and rounded to the weight's dtype. All other files of the folder are
    copied, except weights in other formats, a Trainer's checkpoints, an adapter, and hidden files. ``out`` appears only once it
    is complete.

    Args:
        contents: the adapter.
        base: a folder with ``model.safetensors``, or with shards and their ``model.safetensors.index.json``.
        out: a folder that does not exist or is empty.
        config_changes: fields to set in ``config.json``.
        texts: files to write, by name, instead of those of ``base``.

    Raises:
        FileNotFoundError: a file of the base model is missing.
        ValueError: a file is damaged, a name is missing or ambiguous, or a tensor does not fit.
    """
    contents.check_widths_known()
    stored = _read_headers(base)
    config = _read_config(base)
    _refuse_tied(contents, config)
    updates = _find_updates(contents, stored, config)
    replacements = _find_replacements(contents, stored)
    others = list(_files(base))
    of_base = {id(tensor) for tensor in contents.base_tensors.values()}
    for name in updates.keys() & replacements.keys():
        if id(replacements[name]) not in of_base:
            raise ValueError(f"`{name}` would be both updated and replaced.")
    shards = sorted({entry.shard for entry in stored.values()})
    factors = functools.cache(lambda dtype: {target.name: pair for target, pair in contents.factors(dtype)})

    def changed(name: str, tensor: Tensor) -> Tensor:
        if name in replacements:
            tensor = replacements[name].to(tensor.dtype)
        if name not in updates:
            return tensor
        target, transposed = updates[name]
        A, B, *_ = factors(torch.promote_types(tensor.dtype, torch.float32))[target.name]
        merged = (A.T @ B if transposed else B.T @ A).view_as(tensor).add_(tensor).to(tensor.dtype)
        if not merged.isfinite().all():
            raise ValueError(f"`{name}` would not be finite in {tensor.dtype} once merged.")
        return merged

    with atomic_folder(out) as temporary:
        left_out = _copy_others(base, others, temporary, shards)
        if config_changes:
            write_file(temporary / _CONFIG, json.dumps(config | dict(config_changes), indent=2).encode() + b"\n")
        for name, text in (texts or {}).items():
            write_file(temporary / name, text.encode())
        for shard in shards:
            with atomic_replacement(temporary / shard) as path:
                _write_shard(base / shard, path, updates.keys() | replacements.keys(), changed)
    return Merged(len(shards), list(updates), list(replacements), left_out)


def read_weights(base: Path, modules: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The weights of those of the modules that the base model's files have, by the module's name. They are maps of the files.

    Raises:
        FileNotFoundError: a file of the base model is missing.
        ValueError: a file is damaged.
    """
    stored = _read_headers(base)
    for module in modules:
        try:
            name = _find(f"{module}.weight", stored)
        except ValueError:  # there are several
            continue
        if name is not None:
            with open_tensors(base / stored[name].shard) as file:
                yield module, file.get_tensor(name)


def _read_headers(base: Path) -> dict[str, _Stored]:
    """Shape, dtype and file of each of the base model's tensors."""
    index = base / "model.safetensors.index.json"
    if (base / "model.safetensors").is_file():  # transformers, too, reads this one if both are there
        shards = ["model.safetensors"]
    elif index.is_file():
        refuse_lfs_pointer(index)
        try:
            names = field(read_object(index), "weight_map", dict).values()
            shards = sorted({as_type("a file's name", name, str) for name in names})
        except ValueError as error:
            raise ValueError(f"{index} is damaged: it holds no `weight_map` from tensors to files: {error}") from None
        for shard in shards:
            if Path(shard).name != shard:
                raise ValueError(f"{index} names {shard!r}, which is not a file of the same folder.")
    else:
        advice = ""
        if (base / _ADAPTER).is_file():
            advice = " It is the folder of an adapter: give the base model's first, then the adapter's."
        elif gguf := sorted(base.glob("*.gguf")):
            advice = f" Give a .gguf file in it: {', '.join(map(str, gguf))}."
        elif any(base.glob("*.bin")):
            advice = " vblora does not read the pickles in it: load the model and save it again."
        raise FileNotFoundError(f"{base} holds no model.safetensors and no model.safetensors.index.json.{advice}")
    stored = {}
    for shard in shards:
        with open_tensors(base / shard) as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                view = file.get_slice(name)
                stored[name] = _Stored(shard, tuple(view.get_shape()), view.get_dtype())
    return stored


def _write_shard(source: Path, path: Path, names: Set[str], changed: Callable[[str, Tensor], Tensor]) -> None:
    """Copies a safetensors file with ``changed`` applied to the tensors ``names``. Shapes and dtypes must stay the same.

    The header (its length in 8 bytes, then JSON) then stays the same, and all other tensors are copied as bytes.
    """
    with open_tensors(source) as tensors, open(source, "rb") as old, open(path, "xb") as new:
        length = old.read(8)
        header = old.read(int.from_bytes(length, "little"))
        new.write(length + header)
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            if name in names:
                tensor = changed(name, tensors.get_tensor(name)).contiguous()
                new.write(tensor.view(-1).view(torch.uint8).numpy().data)
            else:
                old.seek(len(length) + len(header) + begin)
                new.write(old.read(end - begin))


def _find(name: str, stored: Iterable[str]) -> str | None:
    """The tensor ``name``, or the only one whose name ends with a dot and ``name`` or the other way round, or None.

    The checkpoint of a model without its head lacks a prefix, that of a larger model around it has one more.

    Raises:
        ValueError: there are several.
    """
    if name in stored:
        return name
    near = [other for other in stored if other.endswith("." + name) or name.endswith("." + other)]
    if len(near) > 1:
        raise ValueError(f"the adapter's `{name}` may be any of the base model's {listed(near)}.")
    return near[0] if near else None


def _find_updates(contents: Contents, stored: dict[str, _Stored], config: JsonObject) -> dict[str, tuple[Target, bool]]:
    """By the name of each weight to update, its target and whether it is stored as ``(in, out)``."""
    updates: dict[str, tuple[Target, bool]] = {}
    square: list[str] = []
    for target in contents.targets:
        name = _find(f"{target.name}.weight", stored)
        if name is None:
            raise ValueError(
                f"the base model has no tensor `{target.name}.weight`, which the adapter updates. If transformers gives it "
                "another name when it loads the model, merge the loaded model: vblora.load(model, adapter); vblora.merge(model); "
                "model.save_pretrained(out)."
            )
        if name in updates:
            raise ValueError(f"`{name}` is the weight of both `{updates[name][0].name}` and `{target.name}`.")
        shape, size = stored[name].shape, (target.out_features, target.in_features)
        if stored[name].dtype not in ("F64", "F32", "BF16", "F16"):
            raise ValueError(
                f"`{name}` is {stored[name].dtype}, which no update can be added to. Use a base model that is not quantised."
            )
        if target.kind == "convolution":
            fits, transposed = shape == (target.out_features, *target.kernel), False
        elif target.kind == "embedding":
            fits, transposed = shape == size[::-1], True
        else:
            fits, transposed = shape in (size, size[::-1]), shape != size
            square += [name] * (size == size[::-1])
        if not fits:
            raise ValueError(
                f"`{name}` is {shape}, but the adapter is for a {target.kind} {target.in_features} -> {target.out_features}."
            )
        updates[name] = target, transposed
    others = {
        transposed for name, (target, transposed) in updates.items() if target.kind == "linear" and name not in square
    }
    for name in square:
        found = stores_in_out(config, name)
        if found is None and len(others) > 1:
            raise ValueError(
                f"the adapter is for layers of both layouts, nn.Linear's and Conv1D's, and `{name}` is square, so vblora cannot "
                "tell its layout. Load the model, then: vblora.load(model, adapter); vblora.merge(model)."
            )
        updates[name] = updates[name][0], contents.config.fan_in_fan_out if found is None else found
    return updates


def _find_replacements(contents: Contents, stored: dict[str, _Stored]) -> dict[str, Tensor]:
    """The extra parameters by their names in the base model."""
    replacements: dict[str, Tensor] = {}
    missing = {}
    for own, tensor in contents.extra_parameters.items():
        name = _find(own, stored)
        if name is None:
            missing[own] = tensor
            continue
        if name in replacements:
            raise ValueError(f"`{name}` would be replaced twice, by `{own}` and by another of the adapter's tensors.")
        if stored[name].shape != tuple(tensor.shape):
            raise ValueError(f"`{name}` is {stored[name].shape}, but the adapter's `{own}` is {tuple(tensor.shape)}.")
        replacements[name] = tensor
    for own, tensor in missing.items():
        # Tied tensors have only one name in the base model's files.
        if not any(tensor.shape == other.shape and torch.equal(tensor, other) for other in replacements.values()):
            raise ValueError(
                f"the base model has no tensor `{own}`, which the adapter holds. If it is a head that the base model lacks, "
                "load the model with that head instead, then: vblora.load(model, adapter); vblora.merge(model, release=True); "
                "vblora.eject(model); model.save_pretrained(out)."
            )
    return replacements


def _read_config(base: Path) -> JsonObject:
    try:
        return read_object(base / _CONFIG)
    except FileNotFoundError:
        return {}


def _refuse_tied(contents: Contents, config: JsonObject) -> None:
    """Checks that neither an update nor a trained copy is of a weight that is tied to another when the model is loaded.

    Raises:
        ValueError: one is of a tied head or of tied embeddings.
    """
    tied = tied_vocabularies(config)
    architectures = optional_field(config, "architectures", list, []) or [""]
    without_head = all(str(name).endswith(_WITHOUT_WORD_HEAD) for name in architectures)
    extra, of_base = contents.extra_parameters, contents.base_tensors
    trained = [name for name, tensor in extra.items() if tensor.dim() == 2 and tensor.shape[0] in tied]
    if len(trained) == 1 and trained[0] not in of_base and not without_head:  # two are both of the tied ones
        raise ValueError(
            f"`{trained[0]}` was trained alone, but embeddings and head are one tensor when the base model is loaded "
            "(`tie_word_embeddings` in its config.json). Load the model, then: vblora.load(model, adapter); "
            "vblora.merge(model); model.save_pretrained(out)."
        )
    for target in contents.targets:
        if target.kind == "embedding" and without_head:
            continue
        of_vocabulary = target.in_features if target.kind == "embedding" else target.out_features
        if of_vocabulary in tied:
            other = "head" if target.kind == "embedding" else "embeddings"
            raise ValueError(
                f"`{target.name}.weight` is also that of the {other} (`tie_word_embeddings` in the base model's config.json), "
                "which must not get the update. Load the model, then: vblora.load(model, adapter); vblora.merge(model)."
            )


def _files(folder: Path, within: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All files of a folder and of its sub-folders, also of those that are links. Hidden ones are left out.

    Raises:
        FileNotFoundError: a link leads nowhere.
        ValueError: a link leads to a folder that it is in.
    """
    within = (*within, folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.exists():
            raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which is missing.")
        if path.is_file():
            yield path
        elif path.is_dir():
            if path.resolve() in within:
                raise ValueError(f"{path} is a link to a folder that it is in. Remove it.")
            yield from _files(path, within)


def _copy_others(base: Path, files: list[Path], out: Path, shards: list[str]) -> list[str]:
    """Copies all files except weights, checkpoints and another adapter. Returns the names of what it left out."""
    left_out = []
    for path in files:
        inner = path.relative_to(base)
        if str(inner) in shards:
            continue
        if len(inner.parts) > 1 and _CHECKPOINT.fullmatch(inner.parts[0]):
            if inner.parts[0] not in left_out:
                left_out.append(inner.parts[0])
            continue
        everything = len(inner.parts) == 1 or inner.parts[0] in _OTHER_FORMATS
        if path.name.endswith(_OTHER_WEIGHTS_AT_TOP if everything else _OTHER_WEIGHTS) or str(inner) == _ADAPTER:
            left_out.append(str(inner))
            continue
        (out / inner).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / inner)
    return left_out
