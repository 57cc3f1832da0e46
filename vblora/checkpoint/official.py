"""Checkpoints of the paper's own repository (github.com/leo-yangli/VB-LoRA), whose logits are ``(blocks, r, h)``.

Its part on language understanding saves the whole model with the base weights. A layer has ``logits_A``
``(in_features / b, r, h)``, ``logits_B`` ``(out_features / b, r, h)`` and ``vector_bank`` ``(h, b)``, which is the same in all
layers. Everything outside the encoder was trained. ``topk`` is in ``config.json``. The part on instruction tuning writes with a
fork of PEFT, whose files :mod:`.peft.vblora` reads.
"""

from pathlib import Path

import torch
from torch import Tensor

from ..adapters import Target
from ..adapters.vblora_rows import Trained
from ..config import VBLoRAConfig
from ..files import read_tensors
from .json_objects import field, read_object
from .vblora import VBLoRAContents

_FILE = "model.safetensors"
_PARTS = ("logits_A", "logits_B", "vector_bank")


def read(path: Path, topk: int | None = None) -> VBLoRAContents:
    """The checked contents of such a checkpoint.

    Args:
        path: its folder, or a file with at least the adapter's tensors.
        topk: k, required if there is no ``config.json`` in the same folder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is a pickle, damaged or invalid. The message names it.
    """
    file = path / _FILE if path.is_dir() else path
    _refuse_pickles(path)
    tensors, _ = read_tensors(file)
    try:
        _refuse_other_models(tensors)
        contents = _decode(tensors, _topk(file.with_name("config.json"), topk))
        contents.check()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None
    return contents


def _refuse_pickles(path: Path) -> None:
    pickles = [path] if path.is_file() and path.suffix != ".safetensors" else []
    if path.is_dir() and not (path / _FILE).exists():
        pickles = sorted(path.glob("*.bin")) + sorted(path.glob("*.pt"))
    if pickles:
        raise ValueError(
            f"{pickles[0]} is not a safetensors file. vblora does not read pickles, which can run any code. If you trust it: "
            "state = torch.load(file, weights_only=True); safetensors.torch.save_file({name: tensor.clone() for name, tensor in "
            f'state.items()}}, "{_FILE}")'
        )


def _refuse_other_models(tensors: dict[str, Tensor]) -> None:
    parts = {name.rpartition(".")[2] for name in tensors}
    for part in ("logits_A", "vector_bank"):
        if part not in parts:
            raise ValueError(
                f"it holds no tensor `<layer>.{part}`, so it is neither an adapter nor a checkpoint of the paper's repository."
            )


def _topk(config: Path, topk: int | None) -> int:
    if topk is not None:
        return topk
    if not config.is_file():
        raise ValueError(f"{config} is missing, which holds k. Give that as `topk`.")
    try:
        return field(read_object(config), "topk", int)
    except ValueError as error:
        raise ValueError(f"{config} does not say what `topk` is: {error} Give it as `topk`.") from None


def _decode(tensors: dict[str, Tensor], topk: int) -> VBLoRAContents:
    layers: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part in _PARTS:
            layers.setdefault(layer, {})[part] = tensor
        else:
            others[name] = tensor
    banks = {layer: parts.pop("vector_bank") for layer, parts in layers.items() if "vector_bank" in parts}
    layers = {layer: parts for layer, parts in layers.items() if parts}
    bank = next(iter(banks.values())).float()
    for layer, other in banks.items():
        if not torch.equal(other.float(), bank):
            raise ValueError(f"`{layer}.vector_bank` differs from the first layer's, but all layers share one bank.")
    if bank.dim() != 2:
        raise ValueError(f"`vector_bank` is {tuple(bank.shape)}, but must be (h, b).")
    num_vectors, vector_length = bank.shape
    r: int = next(iter(next(iter(layers.values())).values())).shape[1:2].numel()
    rows, targets = [], []
    for layer, parts in layers.items():
        widths = []
        for part in _PARTS[:2]:
            logits = parts.get(part)
            if logits is None:
                raise ValueError(f"it lacks tensor `{layer}.{part}`.")
            if logits.dim() != 3 or tuple(logits.shape[1:]) != (r, num_vectors):
                must = f"(blocks, {r}, {num_vectors})"
                raise ValueError(f"`{layer}.{part}` is {tuple(logits.shape)}, but must be {must}.")
            widths.append(logits.shape[0] * vector_length)
            rows.append(logits.float().transpose(0, 1).flatten(0, 1))
        in_features, out_features = widths
        targets.append(Target(layer, in_features, out_features))
    encoders = {layer.partition(".")[0] for layer in layers}
    extra_parameters = {name: tensor for name, tensor in others.items() if name.partition(".")[0] not in encoders}
    config = VBLoRAConfig(
        r=r,
        num_vectors=num_vectors,
        vector_length=vector_length,
        topk=topk,
        target_modules=list(layers),
        modules_to_save=sorted({name.partition(".")[0] for name in extra_parameters}) or None,
        num_candidates=None,
    )
    return VBLoRAContents(config, tuple(targets), bank, Trained(torch.cat(rows)), extra_parameters=extra_parameters)
