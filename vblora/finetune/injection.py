"""The adapter that the arguments of ``vblora finetune`` and ``vblora train-bank`` describe: checked at once, injected later."""

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import vblora

from ..adapters.subvectors import default_length
from ..errors import CommandError, in_options
from ..layers.kinds import target_of
from ..model.inject import Plan
from ..model.targets import find_targets
from .adapters import read_bank
from .outputs import refuse_same_folder

if TYPE_CHECKING:
    from torch import nn

_OPTIONS = ("bank", "num_candidates", "num_vectors", "r", "target_modules", "topk", "vector_length")


def check_adapter(arguments: argparse.Namespace) -> None:
    """Refuses what no model could take, before anything slow: a wrong bank, or sizes that contradict each other."""
    bank = _read_bank(arguments)
    config = _config(arguments, bank)
    length = arguments.vector_length
    if bank is not None and (bank.num_vectors != config.num_vectors or length not in (None, bank.vector_length)):
        raise CommandError(
            f"--bank: {arguments.bank} has {bank.num_vectors} vectors of length {bank.vector_length}, but --num-vectors or "
            "--vector-length is another number. Leave them out: the bank has its own."
        )


def check_fits(
    arguments: argparse.Namespace, model: "nn.Module | None", modules_to_save: list[str] | None = None
) -> None:
    """Refuses an adapter that does not fit a model on the meta device (:func:`models.skeleton`), before weights are read.

    Raises:
        CommandError: it does not. The message names the widths.
    """
    if model is None:
        return
    bank = _read_bank(arguments)
    config = _config(arguments, bank, modules_to_save)
    with warnings.catch_warnings(action="ignore"), _named_as_options(arguments, model):  # `inject` warns
        _set_length(arguments, config, model, bank)
        Plan(model, config)


def inject(
    arguments: argparse.Namespace,
    model: "nn.Module",
    modules_to_save: list[str] | None = None,
    bank: vblora.VectorBank | None = None,
) -> None:
    """Gives the model the adapter that the arguments describe.

    Args:
        bank: a bank that trains with other adapters; that of ``--bank`` is frozen.

    Raises:
        CommandError: it does not fit the model.
    """
    bank = _read_bank(arguments) or bank
    config = _config(arguments, bank, modules_to_save)
    with _named_as_options(arguments, model):
        _set_length(arguments, config, model, bank)
        vblora.inject(model, config, bank=bank, freeze_bank=arguments.bank is not None)


def _set_length(
    arguments: argparse.Namespace, config: vblora.VBLoRAConfig, model: "nn.Module", bank: vblora.VectorBank | None
) -> None:
    if arguments.vector_length is None and bank is None:
        layers = tuple(target_of(names[0], layer) for layer, names in find_targets(model, config).items())
        config.vector_length = default_length(layers, config.pad)


@contextmanager
def _named_as_options(arguments: argparse.Namespace, model: "nn.Module") -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        message = in_options(error, *_OPTIONS)
        if arguments.bank is not None:
            message = message.replace("--vector-length is", "the length of the vectors of --bank is")
        raise CommandError(f"the adapter does not fit {type(model).__name__}: {message}") from None


def _read_bank(arguments: argparse.Namespace) -> vblora.VectorBank | None:
    if arguments.bank is None:
        return None
    refuse_same_folder("--output", arguments.output, "--bank", arguments.bank)
    return read_bank(arguments.bank)


def _config(
    arguments: argparse.Namespace, bank: vblora.VectorBank | None, modules_to_save: list[str] | None = None
) -> vblora.VBLoRAConfig:
    targets = arguments.target_modules
    try:
        config = vblora.VBLoRAConfig(
            r=arguments.r,
            num_vectors=arguments.num_vectors if bank is None or arguments.num_vectors else bank.num_vectors,
            topk=arguments.topk,
            num_candidates=arguments.num_candidates,
            train_scales=arguments.bank is not None if arguments.train_scales is None else arguments.train_scales,
            pad=arguments.pad,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            modules_to_save=modules_to_save,
            seed=arguments.seed,
        )
    except (TypeError, ValueError) as error:
        raise CommandError(in_options(error, *_OPTIONS)) from None
    if arguments.vector_length is not None:
        config.vector_length = arguments.vector_length
    elif bank is not None:
        config.vector_length = bank.vector_length
    return config
