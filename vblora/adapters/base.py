"""What every method of adaptation shares: which layers it serves, and when their factors are composed.

The factors A and B of all layers depend on the adapter's parameters alone, never on a layer's input. So a forward of the
whole model composes them once, before its first layer runs, and hands them out through one :class:`Slot` a layer.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class Factors(NamedTuple):
    """The low-rank update of a layer is ``x Aᵀ B``."""

    A: Tensor  # (r, in_features)
    B: Tensor  # (r, out_features): transposed, so that nothing ever has to be


@dataclass(frozen=True)
class Target:
    """A layer, as an adapter sees it."""

    name: str
    in_features: int
    out_features: int


class Slot:
    """Where a layer finds its factors.

    A plain object and not a module: layers refer to the adapter through it without owning it, ``deepcopy`` and pickling keep
    that tie, and ``torch.compile`` reuses the graph of one block for the next.
    """

    def __init__(self, adapter: "Adapter", index: int) -> None:
        self.adapter = adapter
        self.index = index
        self.handed: Factors | None = None  # by the outermost forward that is under way

    def factors(self, dtype: torch.dtype) -> Factors:
        """This layer's factors, in ``dtype`` if they have to be composed for it alone."""
        if self.handed is not None:
            return self.handed
        return self.adapter.factors_of(self.index, dtype)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "handed": None}  # a forward's own: it may have a history, which cannot be copied


_optimizer_steps = 0


def _count_step(*_) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# An optimizer may write through `.data`, and FSDP2 gathers into it: neither moves a tensor's version counter.
register_optimizer_step_post_hook(_count_step)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class Adapter(nn.Module):
    """The trained tensors of one adapter for all the layers that it serves. A method subclasses it and writes ``compose``.

    When factors are composed:

    * With gradients, each outermost forward composes once (:meth:`begin_forward`), and shares with no other: several
      forwards may stand before their backwards. A layer that runs outside of one (recomputed by activation checkpointing, or
      called by itself) composes its own rows only.
    * Without, factors are kept from forward to forward until a parameter changes: its version counter moves, an optimizer
      steps, a state dict is loaded, or :meth:`invalidate` is called. The last is for writes through ``.data``, which nothing
      else can see.
    * While compiling or exporting, always, so that the composition is part of the graph.
    """

    def __init__(self, targets: list[Target]) -> None:
        super().__init__()
        self.targets = tuple(targets)
        self.slots = [Slot(self, index) for index in range(len(targets))]
        self._kept: tuple[tuple, list[Factors]] | None = None
        self.register_load_state_dict_post_hook(_invalidate_after_load)

    @abstractmethod
    def compose(self, dtype: torch.dtype, index: int | None = None) -> list[Factors]:
        """The factors of all targets in one go, or of target ``index`` alone, in ``dtype``."""

    def forward(self, x: object, *_args, **_kwargs) -> object:
        """``x``: an ``nn.Sequential`` that was injected calls the adapter, one of its modules now, as its last layer."""
        return x

    def begin_forward(self, dtype: torch.dtype) -> None:
        """Hands out this forward's factors."""
        for slot, factors in zip(self.slots, self._all_factors(dtype), strict=True):
            slot.handed = factors

    def end_forward(self) -> None:
        """Takes back what ``begin_forward`` handed out."""
        for slot in self.slots:
            slot.handed = None

    def invalidate(self) -> None:
        """Forgets factors composed so far. Call it after writing to a parameter through ``.data``."""
        self._kept = None
        self.end_forward()

    def factors_of(self, index: int, dtype: torch.dtype) -> Factors:
        """The factors of one layer that runs outside of an outermost forward."""
        if len(self.targets) == 1:
            return self._all_factors(dtype)[0]
        if not self._needs_composition() and self._kept is not None and self._kept[0] == self._key(dtype):
            return self._kept[1][index]
        return self._compose(dtype, index)[0]

    def _needs_composition(self) -> bool:
        if torch.compiler.is_compiling():
            return True
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())

    def _all_factors(self, dtype: torch.dtype) -> list[Factors]:
        if self._needs_composition():
            return self._compose(dtype)
        key = self._key(dtype)
        if key is None:
            return self._compose(dtype)
        if self._kept is None or self._kept[0] != key:
            # Outside of inference mode: its tensors could not be used where gradients are recorded.
            with torch.inference_mode(False), torch.no_grad():
                self._kept = key, self.compose(dtype)
        return self._kept[1]

    def _compose(self, dtype: torch.dtype, index: int | None = None) -> list[Factors]:
        if torch.compiler.is_compiling():
            return self.compose(dtype, index)
        # Activation checkpointing and offloading see what a layer saves through hooks. Factors are composed in another
        # place when a layer is recomputed, so these tensors must be neither counted nor moved.
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            return self.compose(dtype, index)

    def _key(self, dtype: torch.dtype) -> tuple | None:
        """What kept factors were composed from, or None if that cannot be told from the tensors."""
        sources = [*self.parameters(), *self.buffers()]
        if any(type(source) not in (Tensor, nn.Parameter) or source.is_inference() for source in sources):
            return None
        return dtype, _optimizer_steps, *((id(source), source.data_ptr(), source._version) for source in sources)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": None}  # composed anew by the copy


def _invalidate_after_load(adapter: Adapter, _incompatible_keys) -> None:
    adapter.invalidate()
