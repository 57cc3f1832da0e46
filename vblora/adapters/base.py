"""The base class of all methods: which layers an adapter serves, and when it composes their factors.

The factors A and B depend only on the adapter's parameters, never on a layer's input. So a forward of the whole model composes
them once, before its first layer runs, and passes them to the layers through one :class:`Slot` per layer.
"""

import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import ops, streams
from ..errors import VBLoRAWarning
from .rows import in_backward
from .state import layout_hash


class Factors(NamedTuple):
    """The low-rank update of one layer, ``(((x Aᵀ) ∘ d) B) ∘ e``."""

    A: Tensor  # (r, in_features)
    B: Tensor  # (r, out_features): stored transposed, so that no forward transposes it
    d: Tensor | None = None  # (r,); None means ones
    e: Tensor | None = None  # (out_features,); None means ones

    def to(self, device: torch.device, dtype: torch.dtype) -> "Factors":
        A, B, d, e = self
        if A.dtype == dtype and A.device == device:  # a layer's factors have the same of both
            return self
        return Factors(
            A.to(device, dtype),
            B.to(device, dtype),
            None if d is None else d.to(device, dtype),
            None if e is None else e.to(device, dtype),
        )

    def folded(self) -> "Factors":
        """The same update as A and B only: d and e are multiplied into them."""
        A, B, d, e = self
        return Factors(A if d is None else A * d[:, None], B if e is None else B * e)


@dataclass(frozen=True)
class Target:
    """What adapters and files know of a layer to adapt.

    Attributes:
        kind: ``"linear"``, ``"embedding"`` or ``"convolution"``.
        kernel: for a convolution, ``(in_channels / groups, *kernel_size)``, whose product is ``in_features``.
        unusual: for a convolution, which of ``groups``, ``dilation`` and ``padding_mode`` differ from their defaults.
    """

    name: str
    in_features: int
    out_features: int
    kind: str = "linear"
    kernel: tuple[int, ...] = ()
    unusual: tuple[str, ...] = ()


_optimizer_steps = 0
_step_was_captured = False  # in a CUDA graph: replays change parameters without being counted


def _count_step(*_: object) -> None:
    global _optimizer_steps, _step_was_captured
    _optimizer_steps += 1
    if not torch.compiler.is_compiling():
        _step_was_captured = _step_was_captured or streams.capturing()


def optimizer_steps() -> int:
    """How many steps optimizers have taken."""
    return _optimizer_steps


# Optimizers that write through `.data`, and FSDP2's all-gather, change parameters without moving their version counters.
register_optimizer_step_post_hook(_count_step)


class ForwardContext(NamedTuple):
    """Identifies a forward: another thread, another stream, a graph capture or an optimizer step begins a different one.

    The step count catches a forward that a KeyboardInterrupt stopped before it could clear its slots.
    """

    thread: int
    steps: int  # optimizer steps so far
    stream: torch.cuda.Stream | None
    capturing: bool

    def is_current(self, device: torch.device) -> bool:
        """Whether it is that of the caller. Each layer asks, so this makes no other context to compare with."""
        return (
            self.thread == threading.get_ident()
            and self.steps == _optimizer_steps
            and self.stream == streams.current(device)
            and self.capturing == streams.capturing(device)
        )


def _context(device: torch.device) -> ForwardContext:
    return ForwardContext(threading.get_ident(), _optimizer_steps, streams.current(device), streams.capturing(device))


class ForwardFactors(NamedTuple):
    """One layer's factors, composed by the outermost forward that is in progress."""

    factors: Factors
    context: ForwardContext | None  # None while compiling
    part: str  # name of the submodule whose forward it is; "" for the whole model
    differentiable: bool  # False if gradients were off, though parameters require them

    @property
    def is_current(self) -> bool:
        """Whether the caller runs within that forward and gets the gradients that it asks for. Do not call it while compiling."""
        if not self.differentiable and torch.is_grad_enabled():  # the model's code turned them on
            return False
        return self.context is not None and self.context.is_current(self.factors.A.device)


class Slot:
    """Where a layer finds its factors.

    It is a plain object, not a module: layers refer to the adapter without owning it, ``deepcopy`` and pickle preserve the
    reference, and ``torch.compile`` reuses the graph of one block for the next.
    """

    def __init__(self, adapter: "Adapter", index: int) -> None:
        self.adapter = adapter
        self.index = index
        self.forward_factors: ForwardFactors | None = None
        self.was_called = False  # whether the layer ever asked for its factors
        self.weight_read = False  # whether the model's code ever read the weight without calling the layer

    def factors(self, dtype: torch.dtype) -> Factors:
        """This layer's factors: those of the forward in progress, or else composed now, in ``dtype``."""
        if torch.compiler.is_compiling():
            self._note_tracing()
            current = self.forward_factors
            factors = None if current is None else current.factors
        else:
            self.was_called = True
            factors = self.ready_factors
        return self.adapter.factors_of(self.index, dtype) if factors is None else factors

    @property
    def ready_factors(self) -> Factors | None:
        """The factors of the forward in progress, if there is one. Not while compiling."""
        current = self.forward_factors
        if current is None or not current.is_current:
            return None
        self.was_called = True
        return current.factors

    @property
    def current(self) -> ForwardFactors | None:
        """The factors of the outermost forward in progress."""
        current = self.forward_factors
        return current if current is not None and (torch.compiler.is_compiling() or current.is_current) else None

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # runs while tracing, leaves nothing in the graph
    def _note_tracing(self) -> bool:
        self.adapter.traced = True
        return True

    @property
    def in_forward(self) -> bool:
        """Whether an outermost forward is in progress in eager mode."""
        return not torch.compiler.is_compiling() and self.current is not None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"forward_factors": None}  # a graph cannot be copied


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    # A graph that refers to its own outputs through a hook is never freed, so detach.
    return tensor.detach(), tensor._version


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    tensor, version = packed
    if tensor._version != version:  # torch's own check does not run for tensors with hooks
        raise RuntimeError(
            "one of the adapter's tensors needed for gradient computation has been modified by an inplace operation "
            f"(shape {tuple(tensor.shape)}, version {tensor._version}, expected {version}). Run backward before the "
            "optimizer steps."
        )
    return tensor


SAVED_TENSORS_HOOKS = _pack, _unpack


MERGED = "merged_layers"  # in an adapter's state dict, the number of layers that it is merged into


class Adapter(nn.Module, ABC):
    """The trained tensors of one adapter, for all layers that it serves. Each method is a subclass.

    When factors are composed:

    * With gradients, each outermost forward composes once (:meth:`begin_forward`) and never shares with another forward: you
      may run several forwards before their backwards. It is a forward of the model, or of a part that you call by itself, such
      as ``model.bert``, which composes for its own layers only. A layer that runs outside an outermost forward, because
      activation checkpointing recomputes it or you call it directly, composes only its own rows, if the method does not have
      them yet.
    * Without gradients, the same, except within ``generate()`` (:func:`keeping_factors`): one call composes once for all its
      tokens, and again if a parameter's version counter moves or an optimizer steps. Nothing is kept from one call to the next,
      because some writes to a parameter show nowhere: those through ``.data``, and those of ``torch.distributed``. Another
      stream waits for the one that composed the factors.
    * While compiling, exporting or tracing, and within a transform of ``torch.func``, always: composition is part of the graph.
    * While a CUDA graph is captured, always, so that each replay composes from the current parameters. A replay moves no version
      counter. So after an adapter was captured, or any optimizer step was, each token of ``generate()`` composes.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        super().__init__()
        self.targets = tuple(targets)
        self.active: bool | None = None  # whether it is active in the model that it is attached to
        self.trainable_names: list[str] = []  # the parameters that require gradients once it is active again
        self.merged_layers = 0  # how many of its layers hold its update in their weight
        self.disabled_layers = 0  # how many of those have their base weight while the model is disabled
        self.slots = [Slot(self, index) for index in range(len(targets))]
        # Of the layers, cached by AttachedAdapter until something is cast.
        self.compute_dtype: torch.dtype | None = None
        self._captured = False  # whether a CUDA graph was captured that composes it
        # The last backward that recomputed a layer, and the versions that the parameters had then.
        self._recomputing: tuple[int, dict[int, int]] | None = None
        self.traced = False  # whether some layer was compiled: its slot's `was_called` then says nothing
        # Slots of the layers whose weight this forward accessed without calling them, and whether it used the values.
        self.weight_reads: dict[Slot, bool] = {}
        self.register_load_state_dict_post_hook(_invalidate_after_load)  # type: ignore[no-untyped-call]

    r: int  # rank of the updates
    takes_bank: ClassVar[bool] = False  # whether from_config has an argument `bank`
    # AdamW's learning rate of each group, for "default" and for "language" models, whose rates are for layers of 576 inputs. The
    # rates of wider language models are lower by (576 / width) ** FALLS[group]; a group that is not in FALLS keeps its rate.
    RATES: ClassVar[Mapping[str, Mapping[str, float]]]
    FALLS: ClassVar[Mapping[str, float]]

    # In these three, `config` is of the method's own class, as adapters/registry.py pairs them.

    @classmethod
    @abstractmethod
    def from_config(cls, config: Any, targets: Sequence[Target], *, device: torch.device | str | None = None) -> Self:
        """A new adapter for ``targets``, in float32 on ``device``."""

    @classmethod
    def check_targets(cls, config: Any, targets: tuple[Target, ...]) -> None:
        """Refuses layers that the method cannot adapt.

        Raises:
            ValueError: a layer does not fit ``config``. The message names it.
        """

    @classmethod
    def warn_if_untrainable(cls, config: Any) -> None:
        """Warns about settings that keep part of the adapter from learning. The warning points at the caller's caller."""

    @abstractmethod
    def compose(self, dtype: torch.dtype, span: range | None = None) -> list[Factors]:
        """The factors of all targets, or of those in ``span`` only, in ``dtype``."""

    def current_config(self, config: Any) -> Any:
        """``config`` with what you have set in the adapter since, such as its scaling."""
        return config

    @abstractmethod
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters by optimizer group (:func:`vblora.parameter_groups`)."""

    def stored_tensors(self) -> list[Tensor]:
        """The tensors that a trained adapter stores in full."""
        return list(self.parameters())

    def stored_mixture_size(self) -> int:
        """The size of the indices and weights that a trained adapter stores, as a number of float32 values."""
        return 0

    @abstractmethod
    def settings(self) -> list[int]:
        """What makes a state dict compute the same elsewhere, beside its tensors, as 64-bit integers."""

    @abstractmethod
    def set_settings(self, settings: Sequence[int]) -> None:
        """Takes over the :meth:`settings` of an adapter of the same layers, whose tensors were loaded."""

    def get_extra_state(self) -> Tensor:
        """The :meth:`settings`, and a hash of the layers that the tensors are of."""
        values = [*self.settings(), layout_hash(self.targets, self.r)]
        return torch.tensor(values, dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        if state.is_floating_point():  # an average of state dicts, in which it has been rounded
            return
        *settings, layout = state.tolist()
        if layout != layout_hash(self.targets, self.r):
            warnings.warn(
                "the state dict is of an adapter of other layers or another rank than this one, whose tensors have the same "
                "sizes by chance. Inject the model with the config that it was saved with. (Or its integers were averaged "
                "and rounded: leave them out.)",
                VBLoRAWarning,
                stacklevel=2,
            )
            return
        self.set_settings(settings)

    def begin_forward(self, dtype: torch.dtype, part: str = "", span: range | None = None) -> None:
        """Composes the factors for this forward, of the model or of a ``part`` of it with the targets in ``span``, and puts them
        into the slots.

        Raises:
            ValueError: accelerate has offloaded the adapter.
        """
        self.refuse_offloaded()
        all_factors = self.all_factors(dtype, span)
        context = None if torch.compiler.is_compiling() else _context(all_factors[0].A.device)
        differentiable = torch.is_grad_enabled() or not any(p.requires_grad for p in self.parameters())
        for slot, factors in zip(self._slots(span), all_factors, strict=True):
            slot.forward_factors = ForwardFactors(factors, context, part, differentiable)

    def refuse_offloaded(self) -> None:
        """Raises ValueError if accelerate has offloaded the adapter, which it would bring back only for calls of the module."""
        if torch.compiler.is_compiling() or not any(parameter.is_meta for parameter in self.parameters()):
            return
        if any(hasattr(module, "_hf_hook") for module in self.modules()):
            raise ValueError(
                "accelerate has offloaded the adapter, whose parameters every forward needs. Bring it back, and then make the "
                "optimizer: accelerate.hooks.remove_hook_from_submodules(model.vblora). Or offload the base model, with "
                "cpu_offload, disk_offload or dispatch_model, before vblora.inject or vblora.load."
            )

    def _changed_in_backward(self) -> bool:
        """Whether a parameter has changed since the running backward first asked. FSDP2 exchanges them, which does not count."""
        backward = torch._C._current_graph_task_id()
        versions = {
            id(parameter): parameter._version for parameter in self.parameters() if not parameter.is_inference()
        }
        if self._recomputing is None or self._recomputing[0] != backward:
            self._recomputing = backward, versions
        before = self._recomputing[1]
        return any(before.get(key, version) != version for key, version in versions.items())

    def end_forward(self, span: range | None = None) -> None:
        """Clears the slots."""
        for slot in self._slots(span):
            slot.forward_factors = None

    def _slots(self, span: range | None) -> list[Slot]:
        return self.slots if span is None else self.slots[span.start : span.stop]

    def invalidate(self) -> None:
        """Drops the factors that this forward or call of ``generate`` keeps."""
        if (kept := _kept.get()) is not None:
            kept.pop(self, None)
        self.end_forward()

    def factors_of(self, index: int, dtype: torch.dtype) -> Factors:
        """The factors of one layer that runs outside an outermost forward.

        Raises:
            RuntimeError: activation checkpointing recomputes the layer, and the parameters have changed since this backward
                recomputed another one.
            ValueError: accelerate has offloaded the adapter.
        """
        self.refuse_offloaded()
        if in_backward() and torch.is_grad_enabled() and self._changed_in_backward():
            raise RuntimeError(
                "the adapter's parameters have changed in the middle of a backward that recomputes layers, so the gradients "
                "would be wrong: all layers share the parameters. Step after backward; or, with an optimizer that steps in a "
                "hook on each parameter, checkpoint with use_reentrant=False."
            )
        if self._needs_composition():
            return self._compose(dtype, range(index, index + 1))[0]
        return self.all_factors(dtype)[index]

    def _needs_composition(self) -> bool:
        if torch.compiler.is_compiling() or ops.is_recorded():
            return True
        if streams.capturing(next(self.parameters()).device):
            self._captured = True
        if _kept.get() is None or self._captured or _step_was_captured:
            return True
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())

    def all_factors(self, dtype: torch.dtype, span: range | None = None) -> list[Factors]:
        """The factors of all layers, or of those in ``span``."""
        kept = None if self._needs_composition() else _kept.get()
        if kept is None:
            return self._compose(dtype, span)
        own, sources = kept.get(self), self._sources()
        if own is None or not own.is_current(dtype, sources):
            if not all(is_plain(source) for source in sources):
                return self._compose(dtype, span)
            # Not in inference mode, whose tensors cannot be used later where gradients are recorded.
            with torch.inference_mode(False), torch.no_grad():
                own = kept[self] = _KeptFactors(dtype, sources, self.compose(dtype))
        found = own.factors()
        return found if span is None else found[span.start : span.stop]

    def _sources(self) -> list[Tensor]:
        return [*self.parameters(), *self.buffers()]

    def _compose(self, dtype: torch.dtype, span: range | None = None) -> list[Factors]:
        if torch.compiler.is_compiling() or ops.is_recorded():  # torch.func allows no hooks on saved tensors
            return self.compose(dtype, span)
        # Activation checkpointing and offloading track the tensors that a layer saves. A recomputed layer composes its factors
        # elsewhere, so these hooks keep them from counting or moving the tensors saved here.
        with torch.autograd.graph.saved_tensors_hooks(*SAVED_TENSORS_HOOKS):
            return self.compose(dtype, span)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if merged := self.merged_layers - self.disabled_layers:
            destination[f"{prefix}{MERGED}"] = torch.tensor(merged)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Reports an error if the state dict is of a model with this adapter merged, and this model's is not, or conversely."""
        merged = int(state_dict.pop(f"{prefix}{MERGED}", 0))
        if self.disabled_layers:
            args[-1].append(
                f"`{prefix.rstrip('.')}` is merged, and the model is disabled. The end of the block would bring back the "
                "present merged weights. Load the state dict outside the block of `with vblora.disabled(model)`."
            )
        elif merged != self.merged_layers and any(name.startswith(prefix) for name in state_dict):
            there, here = (
                f"merged into {count} layers" if count else "not merged" for count in (merged, self.merged_layers)
            )
            args[-1].append(  # the list of errors
                f"`{prefix.rstrip('.')}` is {there} in the state dict and {here} in the model, so weights would get its update "
                "twice or not at all. Call vblora.merge or vblora.unmerge before you load the state dict."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As in ``nn.Module``. An adapter that is not active in its model changes once it becomes active."""
        if self.active is not False:
            return super().requires_grad_(requires_grad)
        own = [name for name, p in self.named_parameters() if p.is_floating_point()]
        self.trainable_names = [name for name in self.trainable_names if name not in own] + own * requires_grad
        return self

    def _get_name(self) -> str:
        name = type(self).__name__
        return name if self.active is None else f"{name}[{'active' if self.active else 'inactive'}]"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.compute_dtype = None
        self.invalidate()
        before = {name: parameter.dtype for name, parameter in self.named_parameters()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = {name: parameter.dtype for name, parameter in self.named_parameters()}
        warn_of_half_precision({name: dtype for name, dtype in after.items() if dtype != before[name]})
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_captured": False, "_recomputing": None}  # no CUDA graph or forward refers to the copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        note_living(self)


# What the call of `generate` that runs in this thread and asynchronous task keeps.
_kept: "ContextVar[dict[Adapter, _KeptFactors] | None]" = ContextVar("vblora_kept_factors", default=None)


@contextmanager
def keeping_factors() -> Iterator[None]:
    """A context whose forwards without gradients compose an adapter once and use its factors again, while it does not change."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


class _KeptFactors:
    """Factors, with the tensors that they were composed from and the versions of those tensors at the time."""

    def __init__(self, dtype: torch.dtype, sources: list[Tensor], factors: list[Factors]) -> None:
        self._factors = factors
        self._device = factors[0].A.device
        stream = streams.current(self._device)
        self._composed = None if stream is None else stream.record_event()
        self._ready_on = {stream}
        self._composed_from = dtype, _optimizer_steps, [(source.data_ptr(), source._version) for source in sources]
        # References, so that no other tensor can take their identity or memory.
        self._sources = [(source, source.detach()) for source in sources]

    def is_current(self, dtype: torch.dtype, sources: list[Tensor]) -> bool:
        return (
            len(sources) == len(self._sources)
            and all(source is cached for source, (cached, _) in zip(sources, self._sources, strict=True))
            and self._composed_from == (dtype, _optimizer_steps, [(s.data_ptr(), s._version) for s in sources])
        )

    def factors(self) -> list[Factors]:
        """The factors, safe to use on the current stream."""
        stream = streams.current(self._device)
        if stream is not None and self._composed is not None and stream not in self._ready_on:
            stream.wait_event(self._composed)
            for factors in self._factors:
                for factor in factors:
                    if factor is not None:
                        streams.mark_used(factor, stream)
            self._ready_on.add(stream)
        return self._factors


def warn_of_half_precision(dtypes: dict[str, torch.dtype]) -> None:
    """``dtypes``: the new dtype of each adapter parameter, by name."""
    rounded = [f"`{name}`" for name, dtype in dtypes.items() if dtype in (torch.bfloat16, torch.float16)]
    if rounded:
        choice = "Rounded logits choose other bank vectors. " if "`logits`" in rounded else ""
        warnings.warn(
            f"the adapter's {' and '.join(rounded)} {'are' if len(rounded) > 1 else 'is'} half precision now, which loses small "
            f"training steps. {choice}Cast the base model before vblora.inject, which keeps the adapter in float32 and "
            "still computes its factors in the dtype of each layer's input.",
            VBLoRAWarning,
        )


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor's version counter and address show its changes: False for subclasses and inference tensors."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference():
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:  # a torch.func wrapper
        return False
    return True


_living: "weakref.WeakSet[Adapter]" = weakref.WeakSet()


def note_living(adapter: Adapter) -> None:
    """Notes an adapter that some layer uses. One whose ``__init__`` failed is never noted."""
    _living.add(adapter)


def living_adapters() -> "list[Adapter]":
    """Every adapter of this process that a layer uses, so that an optimizer's parameters can be told apart."""
    return list(_living)


def _invalidate_after_load(adapter: Adapter, _incompatible_keys: object) -> None:
    adapter.invalidate()
