"""An adapter merged into a base model's files, without the model: tensor by tensor, so that memory holds one of them."""

import functools
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Set
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..adapters import Target
from ..files import read_json, refuse_lfs_pointer, replacing, sync
from .contents import Contents

# Models of transformers that are made of Conv1D, which stores its weight (in, out). Only a square weight leaves that open.
_CONV1D_MODELS = ("clvp", "clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")
# Models whose embeddings have no head to be tied to, whatever their config says.
_WITHOUT_WORD_HEAD = ("Classification", "QuestionAnswering", "MultipleChoice")
# Weights in other formats, which would still be the base model's.
_OTHER_WEIGHTS = (".gguf", ".h5", ".mlmodel", ".msgpack", ".onnx", ".onnx_data", ".ot", ".pth")
_OTHER_WEIGHTS_AT_TOP = (*_OTHER_WEIGHTS, ".bin", ".bin.index.json", ".pt", ".safetensors")


class Merged(NamedTuple):
    """What was done.

    ``updated`` and ``replaced`` name tensors; ``left_out`` names files of the base model that hold its weights in another format.
    """

    shards: int
    updated: list[str]
    replaced: list[str]
    left_out: list[str]


class _Stored(NamedTuple):
    shard: str
    shape: tuple[int, ...]
    dtype: str


def merge_into_shards(contents: Contents, base: Path, out: Path) -> Merged:
    """Writes ``base`` with an adapter's update in it to ``out``: what :func:`vblora.merge` does to the model loaded from it.

    Each target's update is added to its weight in float32 (float64 for a float64 weight) and rounded to the weight's dtype.
    Tensors that trained beside replace those of their names, in their dtype. Everything else of the folder is copied but for
    weights in other formats. ``out`` appears when it is complete.

    Args:
        contents: the adapter.
        base: folder with ``model.safetensors``, or with shards and their ``model.safetensors.index.json``.
        out: a folder that is not there, or empty.

    Raises:
        FileNotFoundError: the base model's files are not there.
        ValueError: they are damaged, a name is not found in them or found twice, or a tensor does not fit.
    """
    contents.check_widths_known()
    stored = _read_headers(base)
    config = _read_config(base)
    _refuse_tied(contents, config)
    updates = _find_updates(
        contents, stored, contents.config.fan_in_fan_out or config.get("model_type") in _CONV1D_MODELS
    )
    replacements = _find_replacements(contents, stored)
    for name in updates.keys() & replacements.keys():
        raise ValueError(f"`{name}` would be both updated and replaced.")
    out = out.absolute()  # "." has no name
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(8)}.tmp")
    shards = sorted({entry.shard for entry in stored.values()})
    factors = functools.cache(lambda dtype: {target.name: pair for target, pair in contents.factors(dtype)})

    def changed(name: str, tensor: Tensor) -> Tensor:
        if name in replacements:
            return replacements[name].to(tensor.dtype)
        target, transposed = updates[name]
        A, B, *_ = factors(torch.promote_types(tensor.dtype, torch.float32))[target.name]
        merged = (A.T @ B if transposed else B.T @ A).view_as(tensor).add_(tensor).to(tensor.dtype)
        if not merged.isfinite().all():
            raise ValueError(f"merged, `{name}` would not be finite in {tensor.dtype}.")
        return merged

    try:
        temporary.mkdir(parents=True)
        left_out = _copy_others(base, temporary, shards)
        for shard in shards:
            with replacing(temporary / shard) as path:
                _write_shard(base / shard, path, updates.keys() | replacements.keys(), changed)
        os.replace(temporary, out)  # an empty folder gives way
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(out.parent)
    return Merged(len(shards), list(updates), list(replacements), left_out)


def _read_headers(base: Path) -> dict[str, _Stored]:
    """All tensors of the base model by their names, without their values."""
    index = base / "model.safetensors.index.json"
    if index.is_file():
        refuse_lfs_pointer(index)
        try:
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index} is damaged: it holds no `weight_map` from tensors to files.") from None
        for shard in shards:
            if Path(shard).name != shard:
                raise ValueError(f"{index} names {shard!r}, which is no file of that folder.")
    elif (base / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    else:
        pickles = " It holds pickles, which are not read: load the model and save it again." * any(base.glob("*.bin"))
        raise FileNotFoundError(f"{base} holds no model.safetensors and no model.safetensors.index.json.{pickles}")
    stored = {}
    for shard in shards:
        if not (base / shard).is_file():
            raise FileNotFoundError(f"{base / shard} is missing.")
        refuse_lfs_pointer(base / shard)
        try:
            with safe_open(base / shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    view = file.get_slice(name)
                    stored[name] = _Stored(shard, tuple(view.get_shape()), view.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{base / shard} is damaged: {error}.") from None
    return stored


def _write_shard(source: Path, path: Path, names: Set[str], changed: Callable[[str, Tensor], Tensor]) -> None:
    """A copy of a safetensors file in which the tensors ``names`` are ``changed``, in neither shape nor dtype.

    So its header is the same (8 bytes of its length, then JSON), and whatever else it holds is copied as bytes.
    """
    with safe_open(source, framework="pt") as tensors, open(source, "rb") as old, open(path, "xb") as new:
        length = old.read(8)
        header = old.read(int.from_bytes(length, "little"))
        new.write(length + header)
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            if name in names:
                tensor = changed(name, tensors.get_tensor(name)).contiguous()
                new.write(tensor.view(-1).view(torch.uint8).numpy())
            else:
                old.seek(len(length) + len(header) + begin)
                new.write(old.read(end - begin))


def _find(name: str, stored: Iterable[str]) -> str | None:
    """The tensor called ``name``, or the only one of which that is an ending, or that is an ending of it, after a dot.

    Checkpoints of a model without its head have no prefix, those of a model within a larger one have more of it.
    """
    if name in stored:
        return name
    near = [other for other in stored if other.endswith("." + name) or name.endswith("." + other)]
    if len(near) > 1:
        raise ValueError(
            f"the adapter's `{name}` may be any of the base model's {', '.join(f'`{other}`' for other in near[:5])}."
        )
    return near[0] if near else None


def _find_updates(contents: Contents, stored: dict[str, _Stored], is_of_conv1d: bool) -> dict[str, tuple[Target, bool]]:
    """The targets by their weights' names, and whether that is stored ``(in, out)``, as a square one ``is_of_conv1d``."""
    updates: dict[str, tuple[Target, bool]] = {}
    for target in contents.targets:
        name = _find(f"{target.name}.weight", stored)
        if name is None:
            raise ValueError(f"the base model has no tensor `{target.name}.weight`, which the adapter updates.")
        if name in updates:
            raise ValueError(f"`{name}` is the weight of both `{updates[name][0].name}` and `{target.name}`.")
        shape, size = stored[name].shape, (target.out_features, target.in_features)
        if stored[name].dtype not in ("F64", "F32", "BF16", "F16"):
            raise ValueError(
                f"`{name}` is {stored[name].dtype}, which nothing can be added to. Take a model that is not quantised."
            )
        if target.kind == "convolution":
            fits, transposed = shape == (target.out_features, *target.kernel), False
        elif target.kind == "embedding":
            fits, transposed = shape == size[::-1], True
        else:
            fits, transposed = shape in (size, size[::-1]), is_of_conv1d if size == size[::-1] else shape != size
        if not fits:
            raise ValueError(
                f"`{name}` is {shape}, but the adapter is for a {target.kind} {target.in_features} -> {target.out_features}."
            )
        updates[name] = target, transposed
    return updates


def _find_replacements(contents: Contents, stored: dict[str, _Stored]) -> dict[str, Tensor]:
    """What trained beside by its name in the base model."""
    replacements, missing = {}, {}
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
        # What is tied has one name in the base model's files.
        if not any(tensor.shape == other.shape and torch.equal(tensor, other) for other in replacements.values()):
            raise ValueError(
                f"the base model has no tensor `{own}`, which trained beside the adapter. If it is a head that the base model "
                "lacks, load the model with it instead, then: vblora.load(model, adapter); vblora.merge(model, release=True); "
                "vblora.eject(model); model.save_pretrained(out)."
            )
    return replacements


def _read_config(base: Path) -> dict:
    path = base / "config.json"
    config = read_json(path) if path.is_file() else {}
    return config if isinstance(config, dict) else {}


def _refuse_tied(contents: Contents, config: dict) -> None:
    """An update of a head or of embeddings, whose weights are made to be one again when the model is loaded."""
    if config.get("tie_word_embeddings") is not True:
        return
    architectures = config.get("architectures") or [""]
    for target in contents.targets:
        if target.kind == "embedding" and all(str(name).endswith(_WITHOUT_WORD_HEAD) for name in architectures):
            continue
        of_vocabulary = target.in_features if target.kind == "embedding" else target.out_features
        if of_vocabulary == config.get("vocab_size"):
            other = "head" if target.kind == "embedding" else "embeddings"
            raise ValueError(
                f"`{target.name}.weight` is that of the {other}, too (`tie_word_embeddings` in the base model's config.json), to "
                "which the update does not belong. Load the model, then: vblora.load(model, adapter); vblora.merge(model)."
            )


def _copy_others(base: Path, out: Path, shards: list[str]) -> list[str]:
    """Copies everything but weights and hidden files; returns the weights that were left out."""
    left_out = []
    for path in sorted(base.rglob("*")):
        inner = path.relative_to(base)
        if any(part.startswith(".") for part in inner.parts) or not path.is_file() or str(inner) in shards:
            continue
        if path.name.endswith(_OTHER_WEIGHTS if len(inner.parts) > 1 else _OTHER_WEIGHTS_AT_TOP):
            left_out.append(str(inner))
            continue
        (out / inner).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / inner)
    return left_out
