"""Which adapted layers and adapters change a module of a base model in place, so that no two models change the same one."""

import gc
import weakref
from collections.abc import Container

from torch import nn

_users: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[object]]" = weakref.WeakKeyDictionary()


def note_user(module: nn.Module, user: object) -> None:
    """Notes that ``user`` replaces tensors of a module, at the latest as it is merged."""
    _users.setdefault(module, weakref.WeakSet()).add(user)


def forget_user(module: nn.Module, user: object) -> None:
    _users.get(module, weakref.WeakSet()).discard(user)


def has_other_users(module: nn.Module, own: Container[object]) -> bool:
    """Whether a module has users that are not among ``own``."""
    if not _has_others(module, own):
        return False
    gc.collect()  # a deleted model may have stayed until now
    return _has_others(module, own)


def _has_others(module: nn.Module, own: Container[object]) -> bool:
    return any(user not in own for user in _users.get(module, ()))
