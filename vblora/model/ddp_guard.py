"""Detects adapters whose gradients DistributedDataParallel does not reduce: it knows what required gradients when it was made."""

import functools
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import VBLoRAWarning

if TYPE_CHECKING:
    from .attached import AttachedAdapter

_reduced: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()  # identities of the parameters


def refuse_unreduced(active: Iterable["AttachedAdapter"]) -> None:
    """Refuses a training forward within DDP if it would not reduce the gradients of an active adapter. Warns once if this torch
    does not tell.

    Raises:
        ValueError: there is one. The message names it.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    try:
        ddp: Any = DistributedDataParallel._active_ddp_module
        if ddp is None:
            return
        if ddp not in _reduced:
            buckets = ddp.reducer._get_zeros_like_grad_buckets()
            _reduced[ddp] = {id(parameter) for bucket in buckets for parameter in bucket.parameters()}
    except AttributeError:  # private names, which a newer torch may lack
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            _warn_unchecked()
        return
    for attached in active:
        missing = {id(p) for p in attached.parameters.values() if p.requires_grad} - _reduced[ddp]
        if not missing:
            continue
        names = [name for name, parameter in ddp.module.named_parameters() if id(parameter) in missing]
        if not ddp.parameters_to_ignore.issuperset(names):
            raise ValueError(
                f"adapter {attached.name!r} trains, but became active or trainable after DistributedDataParallel wrapped the "
                "model, so DDP does not reduce its gradients and the processes would drift apart. Call vblora.set_adapter first, "
                "then wrap the model anew: DistributedDataParallel(model.module)."
            )


@functools.cache
def _warn_unchecked() -> None:
    warnings.warn(
        f"torch {torch.__version__} does not tell which gradients DistributedDataParallel reduces. If you use it, wrap the "
        "model after vblora.set_adapter and after you make an adapter trainable. Otherwise the processes drift apart.",
        VBLoRAWarning,
    )
