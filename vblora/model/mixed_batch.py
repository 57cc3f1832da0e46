"""``model(..., adapter_names=[...])`` and ``model.generate(..., adapter_names=[...])``: a different adapter per batch row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import streams
from ..adapters import Factors
from ..adapters.base import keeping_factors
from ..layers import rows as layer_rows
from ..layers.adapted import AdaptedLayer
from ..layers.rows import RowAdapters, Stacked

if TYPE_CHECKING:
    from .record import AdaptedModel

ARGUMENT = "adapter_names"
_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")  # arguments of `generate`
_WITH_PASSES = "generate_with_fallback"  # Whisper's `generate` runs it for one segment of the audio after the other
_EXPANDING = ("num_beams", "num_return_sequences")  # `generate` repeats each row this many times


class AttachedRows(RowAdapters):
    """Rows that use adapters of an injected model."""

    def __init__(self, record: AdaptedModel, names: Sequence[str | None]) -> None:
        super().__init__(names, record.names)
        self._factors = {name: record.adapters[name].composed() for name in dict.fromkeys(names) if name is not None}

    def factors(self, layer: AdaptedLayer, name: str) -> Factors | None:
        update = layer.updates.get(name)
        return None if update is None else self._factors[name][update.slot.index]

    def stacked(self, layer: AdaptedLayer) -> Stacked | None:
        found = {name: self.factors(layer, name) for name in self._factors}
        folded = {name: factors.folded() for name, factors in found.items() if factors is not None}
        if not folded:
            return None
        rank = max(factors.A.shape[0] for factors in folded.values())
        A, B = (
            torch.stack([_of_rank(rank, factor) for factor in pair])
            for pair in zip(*(factors[:2] for factors in folded.values()), strict=True)
        )
        index: dict[str | None, int] = {name: number for number, name in enumerate(folded)}
        return Stacked.of(A, B, [index.get(name, -1) for name in self.names])


def _of_rank(rank: int, factor: Tensor) -> Tensor:
    return factor if factor.shape[0] == rank else F.pad(factor, (0, 0, 0, rank - factor.shape[0]))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
def begin_forward(record: AdaptedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Removes ``adapter_names`` from a forward's arguments, and returns whether its rows use different adapters.

    Raises:
        TypeError: as :func:`rows_for`.
        ValueError: as :func:`rows_for`, or the forward records gradients.
    """
    names = kwargs.pop(ARGUMENT, None)
    if isinstance(names, (list, tuple)) and len(names) == 0 == _count_rows(record.model, args, kwargs):
        names = None  # an empty batch
    running = layer_rows.current()
    if names is None:
        if running is None or running.layers is not record.names:  # set by a model that contains this one
            return False
        if not running.outlasts_forwards:
            layer_rows.set_current(None)  # from a forward that an interrupt ended
        return running.outlasts_forwards
    if torch.is_grad_enabled():
        raise ValueError("`adapter_names` is for inference, but gradients are recorded. Call it under torch.no_grad().")
    rows = rows_for(record, names, _count_rows(record.model, args, kwargs))
    rows.outer = running
    layer_rows.set_current(rows)
    return True


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
def end_forward(record: AdaptedModel) -> bool:
    """Ends a forward, and returns whether its rows used different adapters."""
    rows = layer_rows.current()
    if rows is None or rows.layers is not record.names:
        return False
    if not rows.outlasts_forwards:
        layer_rows.set_current(rows.outer)
    return True


def rows_for(record: AdaptedModel, names: Sequence[str | None], count: int | None) -> RowAdapters:
    """The adapters of a batch's rows.

    Args:
        count: the number of rows; None if it is unknown.

    Raises:
        TypeError: ``names`` is not a list of names and None.
        ValueError: the number of names differs from that of rows, a name is unknown, the model is merged or disabled, an adapter
            cannot run for only some rows, the rows are not the first dimension, or a CUDA graph is being captured.
    """
    if not isinstance(names, (list, tuple)) or not all(name is None or isinstance(name, str) for name in names):
        raise TypeError(
            f"`{ARGUMENT}` is {names!r}, but must be a list: the name of an adapter, or None for the base model, for each row."
        )
    if not names or (count is not None and len(names) != count):
        has = "an unknown number of" if count is None else count
        raise ValueError(f"`{ARGUMENT}` has {len(names)} names, but the batch has {has} rows. Give one for each row.")
    if name := record.sequence_first:
        raise ValueError(
            f"`{ARGUMENT}` is given, but the first dimension of what the layers in `{name}` get is the positions, not the rows. "
            "Run one adapter at a time with vblora.set_adapter; or, for one of torch's layers, set batch_first=True."
        )
    if streams.capturing():
        raise ValueError(
            f"`{ARGUMENT}` is given while a CUDA graph is captured, which would replay the adapters of this batch for "
            "every other one. Run mixed batches without CUDA graphs."
        )
    record.let_rows_differ()
    return record.rows(names)


def attached_rows(record: AdaptedModel, names: Sequence[str | None]) -> AttachedRows:
    """:func:`rows_for`, for the adapters of an injected model."""
    for name in names:
        if name is not None and name not in record.adapters:
            raise ValueError(f"`{ARGUMENT}` names {name!r}; the model's adapters are {', '.join(record.adapters)}.")
    named = [adapter for name, adapter in record.adapters.items() if name in names]
    for adapter in named:
        if adapter.extra:
            raise ValueError(
                f"`{ARGUMENT}` names {adapter.name!r}, which trained `{next(iter(adapter.extra))}`: biases and "
                "`modules_to_save` cannot differ between rows. Run it alone, with vblora.set_adapter."
            )
        if adapter.model.training and adapter.config.dropout:
            raise ValueError(f"`{ARGUMENT}` names {adapter.name!r}, which has dropout. Call model.eval() first.")
    for name in record.active:
        if record.adapters[name].extra:
            raise ValueError(
                f"adapter {name!r} is active, whose biases or `modules_to_save` all rows would use. Deactivate it first: "
                "vblora.set_adapter(model, [])."
            )
    return AttachedRows(record, names)


def install_generate(record: AdaptedModel) -> None:
    """Makes the model's ``generate``, if it has one, accept ``adapter_names`` and compose once."""
    if callable(getattr(type(record.model), "generate", None)) and "generate" not in vars(record.model):
        # A partial, not a closure, so that copies and pickles of the model refer to their own record.
        vars(record.model)["generate"] = partial(_generate, record)


def remove_generate(model: nn.Module) -> None:
    installed = vars(model).get("generate")
    if isinstance(installed, partial) and installed.func is _generate:
        del vars(model)["generate"]


def _generate(
    record: AdaptedModel, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any
) -> Any:
    """The model's own ``generate``. It composes the factors once, and takes an adapter for each row of its batch."""
    model = record.model
    own_generate = getattr(type(model), "generate", None)
    assert own_generate is not None  # install_generate checked
    if adapter_names is None:
        with keeping_factors():
            return own_generate(model, *args, **kwargs)
    configs = [
        kwargs,
        _values_of(kwargs.get("generation_config")),
        _values_of(getattr(model, "generation_config", None)),
    ]
    for name in _ASSISTED:
        if any(config.get(name) for config in configs):
            raise ValueError(
                f"`{ARGUMENT}` cannot be used with assisted generation (`{name}`). Leave one of the two out."
            )
    beams, sequences = (next((config[name] for config in configs if config.get(name)), 1) for name in _EXPANDING)
    if callable(getattr(model, _WITH_PASSES, None)):
        _refuse_passes(model, [*args, *kwargs.values()], configs)
        repeats = {1, sequences, sequences * beams}  # it repeats the rows before it generates
    else:
        repeats = {1, max(beams, sequences)}
    with torch.no_grad():
        rows = rows_for(record, adapter_names, _count_rows(model, args, kwargs))
        rows.repeats = repeats
        rows.outlasts_forwards = True
        with rows.running():
            return own_generate(model, *args, **kwargs)


def _refuse_passes(model: Any, given: list[Any], configs: list[Mapping[str, Any]]) -> None:
    """Refuses calls in which Whisper's ``generate`` may run again for some of the rows, which then lie in other places."""
    encoder = model.get_encoder()
    segment = encoder.conv1.stride[0] * encoder.conv2.stride[0] * model.config.max_source_positions
    frames = next((value.shape[-1] for value in given if isinstance(value, Tensor) and value.dim() == 3), 0)
    timed = [config.get(name) for config in configs for name in ("return_timestamps", "return_token_timestamps")]
    refused = {
        f"input_features` of {frames} frames, more than {segment},": frames > segment,
        "return_timestamps`": any(timed),
        "temperature` with several values": isinstance(configs[0].get("temperature"), (list, tuple)),
    }
    for what, holds in refused.items():
        if holds:
            raise ValueError(
                f"`{what} makes {type(model).__name__} generate again for some of the rows, which `{ARGUMENT}` cannot follow. "
                "Leave it out, or run one adapter at a time with vblora.set_adapter."
            )


def _values_of(config: object) -> Mapping[str, Any]:
    return {} if config is None else vars(config)


def _count_rows(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The number of rows of a call's main input, which transformers names; otherwise of its first tensor."""
    main = getattr(model, "main_input_name", None) or ""
    for value in (*args, kwargs.get(main), kwargs.get("inputs_embeds"), *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    return None
