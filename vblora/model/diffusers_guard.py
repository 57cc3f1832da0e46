"""What diffusers' models offer that would leave out the updates without a word: fused projections and a scale for LoRA."""

from functools import partial
from typing import Any

from torch import nn

from .record import AdaptedModel
from .whole import is_plain

_FUSE = "fuse_projections"
_ARGUMENTS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


def guard_diffusers(record: AdaptedModel) -> None:
    """Has ``fuse_qkv_projections`` and ``scale``, the strength that a call gives to LoRA, refuse adapters that are not merged.

    The former makes new layers from the weights of the adapted ones. The latter changes only PEFT's layers.
    """
    attentions = [module for module in record.model.modules() if callable(getattr(type(module), _FUSE, None))]
    if not attentions:
        return
    for module in attentions:
        vars(module)[_FUSE] = partial(_fuse, record, module)  # a partial object follows its model when that is copied
    hook = record.model.register_forward_pre_hook(partial(_refuse_scale, record), with_kwargs=True)
    record.undo.append(partial(_remove, attentions, hook))


def _remove(attentions: list[nn.Module], hook: Any) -> None:
    hook.remove()
    for module in attentions:
        vars(module).pop(_FUSE, None)


def _fuse(record: AdaptedModel, module: Any, *args: Any, **kwargs: Any) -> Any:
    if not is_plain(record):
        raise ValueError(
            "fusing projections makes new layers from the base model's weights, without the adapter. "
            "Call vblora.merge(model) first."
        )
    return getattr(type(module), _FUSE)(module, *args, **kwargs)


def _refuse_scale(record: AdaptedModel, _model: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for name in _ARGUMENTS:
        scale = (kwargs.get(name) or {}).get("scale", 1.0)
        if scale != 1.0 and not is_plain(record):
            raise ValueError(
                f'`{name}` has a "scale" of {scale}, which changes PEFT\'s LoRA layers only. Leave it out: the strength of an '
                "adapter is `scaling` in its config; vblora.disabled(model) runs the base model."
            )
