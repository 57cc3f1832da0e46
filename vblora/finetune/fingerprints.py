"""A few hashes of a base model's weights, by which an adapter notices another base model of the same shape."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ..layers.weights import is_quantised
from ..model.targets import base_modules
from .adapters import AdapterRun
from .notices import print_warning

_LAYERS = 8
_NUMBERS = 4096  # of each weight

Fingerprint = dict[str, str]


def fingerprint(model: nn.Module) -> Fingerprint:
    """Hashes by the names of weights: of the embeddings and of some linear layers, evenly spaced.

    They are the same for weights that were loaded as bfloat16 and as float32. Heads, which may be new, are left out.
    """
    encoder = getattr(model, "base_model", model)
    weights = {
        name: module.weight
        for name, module in base_modules(encoder).items()
        if isinstance(module, (nn.Embedding, nn.Linear)) and not is_quantised(module.weight)
    }
    names = [name for name, weight in weights.items() if weight.is_floating_point() and not weight.is_meta]
    step = max(1, len(names) // _LAYERS)
    return {name: hash_of(weights[name]) for name in names[::step]}


def warn_of_another_base(run: AdapterRun, model: nn.Module, given: str, command: str) -> None:
    """Says so if the model's weights are not those that an adapter was trained with, or if not known, its name is another.

    Args:
        given: what the user calls the model.
    """
    trained, name = run.report.get("fingerprint"), run.base_model
    if not isinstance(trained, dict) or not trained:
        if isinstance(name, str) and Path(name).name != Path(given).name:
            print_warning(
                f"--model: the adapter in {run.folder} was trained with {name}. If {given} is another model, what it gives may "
                "be nonsense.",
                command,
            )
        return
    if names := differing(trained, fingerprint(model)):
        print_warning(
            f"--model: the weights of {given} are not those that the adapter in {run.folder} was trained with (among others "
            f"{names[0]} differs), so what it gives may be nonsense.",
            command,
        )


def differing(trained: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names in both fingerprints whose weights differ."""
    return [name for name, value in trained.items() if now.get(name, value) != value]


def hash_of(weight: torch.Tensor) -> str:
    flat = weight.detach().flatten()
    some = flat[:: max(1, len(flat) // _NUMBERS)].float().to("cpu", torch.bfloat16)
    return hashlib.sha256(some.view(torch.int16).numpy().tobytes()).hexdigest()[:16]
