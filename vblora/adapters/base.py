"""What every method of adaptation shares: which layers it serves, and when their factors are composed.

The factors A and B of all layers depend on the adapter's parameters alone, never on a layer's input. So a forward of the
whole model composes them once, before its first layer runs, and hands them out through one :class:`Slot` a layer.
"""

import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import streams
from ..config import AdapterConfig
from ..errors import VBLoRAWarning


class Factors(NamedTuple):
    """The low-rank update of a layer is ``(((x Aᵀ) ∘ d) B) ∘ e``."""

    A: Tensor  # (r, in_features)
    B: Tensor  # (r, out_features): transposed, so that nothing ever has to be
    d: Tensor | None = None  # (r,); None: of ones
    e: Tensor | None = None  # (out_features,); None: of ones

    def to(self, device: torch.device, dtype: torch.dtype) -> "Factors":
        if all(factor is None or (factor.device, factor.dtype) == (device, dtype) for factor in self):
            return self  # as those of a whole forward mostly are
        return Factors(*(None if factor is None else factor.to(device, dtype) for factor in self))

    def folded(self) -> "Factors":
        """The same update by A and B alone."""
        A, B, d, e = self
        return Factors(A if d is None else A * d[:, None], B if e is None else B * e)


@dataclass(frozen=True)
class Target:
    """A layer, as an adapter and its files see it.

    Attributes:
        kind: ``"linear"``, ``"embedding"`` or ``"convolution"``.
        kernel: of a convolution, what ``in_features`` is the product of: ``(in_channels / groups, *kernel_size)``.
        unusual: of a convolution, which of ``groups``, ``dilation`` and ``padding_mode`` are not those of most.
    """

    name: str
    in_features: int
    out_features: int
    kind: str = "linear"
    kernel: tuple[int, ...] = ()
    unusual: tuple[str, ...] = ()


_optimizer_steps = 0
_step_was_captured = False  # in a CUDA graph, whose replays change parameters and are not counted


def _count_step(*_) -> None:
    global _optimizer_steps, _step_was_captured
    _optimizer_steps += 1
    if not torch.compiler.is_compiling():
        _step_was_captured = _step_was_captured or streams.capturing()


# An optimizer may write through `.data`, and FSDP2 gathers into it: neither moves a tensor's version counter.
register_optimizer_step_post_hook(_count_step)


class Moment(NamedTuple):
    """What tells a forward apart from one in another thread or on another stream, from one that is captured if it is not, and
    from one that a KeyboardInterrupt cut off before a step."""

    thread: int
    steps: int  # of optimizers, so far
    stream: torch.cuda.Stream | None
    capturing: bool


def _now(device: torch.device) -> Moment:
    return Moment(threading.get_ident(), _optimizer_steps, streams.current(device), streams.capturing(device))


class Handed(NamedTuple):
    """A layer's factors of the outermost forward that is under way, and by what to tell that it still is."""

    factors: Factors
    moment: Moment | None  # None in a graph

    @property
    def is_current(self) -> bool:
        """Whether that forward is the one that asks. Not for graphs."""
        return self.moment == _now(self.factors.A.device)


class Slot:
    """Where a layer finds its factors.

    A plain object and not a module: layers refer to the adapter through it without owning it, ``deepcopy`` and pickling keep
    that tie, and ``torch.compile`` reuses the graph of one block for the next.
    """

    def __init__(self, adapter: "Adapter", index: int) -> None:
        self.adapter = adapter
        self.index = index
        self.handed: Handed | None = None
        self.asked = False  # whether the layer ever was called for its factors
        self.read = False  # whether its weight was read past it by the model's code

    def factors(self, dtype: torch.dtype) -> Factors:
        """This layer's factors, in ``dtype`` if they are not those of a whole forward."""
        compiling = torch.compiler.is_compiling()
        if compiling:
            self._note_tracing()
        else:
            self.asked = True
        handed = self.handed
        if handed is not None and (compiling or handed.is_current):
            return handed.factors
        return self.adapter.factors_of(self.index, dtype)

    @torch.compiler.assume_constant_result  # so that it runs as a graph is made, and is not in it
    def _note_tracing(self) -> bool:
        self.adapter.traced = True
        return True

    @property
    def in_forward(self) -> bool:
        """Whether an outermost forward is under way that is not compiled."""
        return self.handed is not None and not torch.compiler.is_compiling() and self.handed.is_current

    def __getstate__(self) -> dict:
        return {**self.__dict__, "handed": None}  # a forward's own: it may have a history, which cannot be copied


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    # Detached: a graph that holds its own outputs through a hook is never freed.
    return tensor.detach(), tensor._version


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    tensor, version = packed
    if tensor._version != version:  # torch checks this only without hooks
        raise RuntimeError(
            "one of the adapter's tensors needed for gradient computation has been modified by an inplace operation "
            f"(of shape {tuple(tensor.shape)}, version {tensor._version}, expected {version}): run backward before an "
            "optimizer steps."
        )
    return tensor


PACKING = _pack, _unpack


class Adapter(nn.Module, ABC):
    """The trained tensors of one adapter for all the layers that it serves. A method subclasses it and writes ``compose``.

    When factors are composed:

    * With gradients, each outermost forward composes once (:meth:`begin_forward`), and shares with no other: several
      forwards may stand before their backwards. A layer that runs outside of one (recomputed by activation checkpointing, or
      called by itself) composes its own rows only.
    * Without, all layers' factors are kept from forward to forward until a parameter changes: its version counter moves, an
      optimizer steps, the module is cast, moved or switched between training and evaluation, a state dict is loaded, or
      :meth:`invalidate` is called. The last is for other writes through ``.data``, which nothing else can see. A stream that
      did not compose them waits for the one that did.
    * While compiling or exporting, always, so that the composition is part of the graph.
    * While a CUDA graph is captured, always, so that each replay composes from the parameters as they are then. Replays move
      no counter. So from a capture on that the adapter took part in, or after a step of any optimizer was captured, nothing is
      kept anymore: each outermost forward composes, each token of a ``generate()``, too. If you capture other writes to the
      parameters (a moving average, say), call :meth:`invalidate` after each replay.
    """

    def __init__(self, targets: list[Target]) -> None:
        super().__init__()
        self.targets = tuple(targets)
        self.slots = [Slot(self, index) for index in range(len(targets))]
        self.compute_dtype: torch.dtype | None = (
            None  # of the layers, until something is cast: whoever knows them notes it
        )
        self._kept: _Kept | None = None
        self._captured = False
        self.traced = False  # whether a graph was made of some layer, which is not seen to ask for factors
        # Of the forward under way: slots whose layer's weight was asked for, and whether its values were used.
        self.past: dict[Slot, bool] = {}
        self.register_load_state_dict_post_hook(_invalidate_after_load)

    takes_bank: ClassVar[bool] = False  # whether from_config has an argument `bank`

    @classmethod
    @abstractmethod
    def from_config(
        cls, config: AdapterConfig, targets: Sequence[Target], *, device: torch.device | str | None = None
    ) -> Self:
        """A new adapter for ``targets``, in float32 on ``device``."""

    @classmethod
    def check_targets(cls, config: AdapterConfig, targets: tuple[Target, ...]) -> None:
        """Refuses layers that the method cannot adapt.

        Raises:
            ValueError: a layer does not fit ``config``; named.
        """

    @classmethod
    def warn_if_untrainable(cls, config: AdapterConfig) -> None:
        """Warns of settings that keep a part of the adapter from learning. The warning points at the caller of the caller."""

    @abstractmethod
    def compose(self, dtype: torch.dtype, index: int | None = None) -> list[Factors]:
        """The factors of all targets in one go, or of target ``index`` alone, in ``dtype``."""

    @abstractmethod
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Its parameters by the groups that they train in (:func:`vblora.parameter_groups`)."""

    def stored_whole(self) -> list[Tensor]:
        """What is stored of it element by element once it is trained."""
        return list(self.parameters())

    def stored_mixtures(self) -> int:
        """What else is stored, such as indices and weights into a bank, in float32 values' worth."""
        return 0

    def begin_forward(self, dtype: torch.dtype) -> None:
        """Hands out this forward's factors."""
        all_factors = self._all_factors(dtype)
        moment = None if torch.compiler.is_compiling() else _now(all_factors[0].A.device)
        for slot, factors in zip(self.slots, all_factors, strict=True):
            slot.handed = Handed(factors, moment)

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
        if self._needs_composition():
            return self._compose(dtype, index)[0]
        return self._all_factors(dtype)[index]

    def _needs_composition(self) -> bool:
        if torch.compiler.is_compiling():
            return True
        if streams.capturing(next(self.parameters()).device):
            self._captured = True
        if self._captured or _step_was_captured:
            self._kept = None
            return True
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())

    def _all_factors(self, dtype: torch.dtype) -> list[Factors]:
        if self._needs_composition():
            return self._compose(dtype)
        kept = self._kept  # another thread may put another one there
        if kept is None or not kept.is_current(dtype, self._sources()):
            sources = self._sources()
            if not all(is_plain(source) for source in sources):
                return self._compose(dtype)
            # Outside of inference mode: its tensors could not be used where gradients are recorded.
            with torch.inference_mode(False), torch.no_grad():
                kept = self._kept = _Kept(dtype, sources, self.compose(dtype))
        return kept.factors()

    def _sources(self) -> list[Tensor]:
        return [*self.parameters(), *self.buffers()]

    def _compose(self, dtype: torch.dtype, index: int | None = None) -> list[Factors]:
        if torch.compiler.is_compiling():
            return self.compose(dtype, index)
        # Activation checkpointing and offloading see what a layer saves through hooks. Factors are composed in another
        # place when a layer is recomputed, so these tensors must be neither counted nor moved.
        with torch.autograd.graph.saved_tensors_hooks(*PACKING):
            return self.compose(dtype, index)

    def train(self, mode: bool = True) -> "Adapter":
        self._kept = None  # where weights are averaged or swapped through `.data`, the mode is mostly switched, too
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> "Adapter":
        self.compute_dtype = None
        self.invalidate()
        before = {name: parameter.dtype for name, parameter in self.named_parameters()}
        super()._apply(*args, **kwargs)
        after = {name: parameter.dtype for name, parameter in self.named_parameters()}
        warn_of_half_precision({name: dtype for name, dtype in after.items() if dtype != before[name]})
        return self

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": None, "_captured": False}  # composed anew by the copy, which no graph changes


class _Kept:
    """Factors, and the very tensors that they were composed from, as those were."""

    def __init__(self, dtype: torch.dtype, sources: list[Tensor], factors: list[Factors]) -> None:
        self._factors = factors
        self._device = factors[0].A.device
        stream = streams.current(self._device)
        self._composed = None if stream is None else stream.record_event()
        self._ready_on = {stream}
        self._made_from = dtype, _optimizer_steps, [(source.data_ptr(), source._version) for source in sources]
        # Held, so that no other tensor gets their identity or their memory.
        self._sources = [(source, source.detach()) for source in sources]

    def is_current(self, dtype: torch.dtype, sources: list[Tensor]) -> bool:
        return (
            len(sources) == len(self._sources)
            and all(now is then for now, (then, _) in zip(sources, self._sources, strict=True))
            and self._made_from == (dtype, _optimizer_steps, [(s.data_ptr(), s._version) for s in sources])
        )

    def factors(self) -> list[Factors]:
        """The factors, ready for what is queued on the current stream from now on."""
        stream = streams.current(self._device)
        if stream not in self._ready_on:
            stream.wait_event(self._composed)
            for factors in self._factors:
                for factor in factors:
                    if factor is not None:
                        streams.hold(factor, stream)
            self._ready_on.add(stream)
        return self._factors


def warn_of_half_precision(dtypes: dict[str, torch.dtype]) -> None:
    """``dtypes``: of an adapter's parameters by their names, as they are from now on."""
    rounded = [f"`{name}`" for name, dtype in dtypes.items() if dtype in (torch.bfloat16, torch.float16)]
    if rounded:
        choice = "Rounded logits choose other bank vectors. " if "`logits`" in rounded else ""
        warnings.warn(
            f"the adapter's {' and '.join(rounded)} {'are' if len(rounded) > 1 else 'is'} half precision now, in which small "
            f"steps of training are lost. {choice}Cast the base model before vblora.inject, which leaves the adapter in float32; "
            "its factors are computed in the dtype of each layer's input all the same.",
            VBLoRAWarning,
        )


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's changes can be told from the tensor itself."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference():
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:  # a wrapper of torch.func's
        return False
    return True


def _invalidate_after_load(adapter: Adapter, _incompatible_keys) -> None:
    adapter.invalidate()
