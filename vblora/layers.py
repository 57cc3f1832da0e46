"""Where factors meet a frozen layer."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters import Factors, Slot, Target, VBLoRAAdapter
from .bank import VectorBank
from .lowrank import add_update, delta


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is transformers' ``Conv1D``: a linear layer with its weight stored ``(in, out)``.

    By name, so that transformers need not be there.
    """
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(layer).__mro__)


def widths(layer: nn.Module) -> tuple[int, int]:
    """``in_features`` and ``out_features`` of a linear layer."""
    if is_conv1d(layer):
        return layer.weight.shape[0], layer.weight.shape[1]
    return layer.in_features, layer.out_features


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What a linear layer computes in there, given tensors of ``dtype``."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype


class Replaced:
    """A tensor of the base model in whose place a trained or merged one stands, until the two are swapped."""

    def __init__(self, module: nn.Module, name: str, stand_in: Tensor) -> None:
        self.module = module
        self.name = name
        self.swapped = False
        self._aside: Tensor = getattr(module, name)
        setattr(module, name, stand_in)

    @property
    def stand_in(self) -> Tensor:
        return self._aside if self.swapped else getattr(self.module, self.name)

    @torch.no_grad()
    def swap(self) -> None:
        """Puts the one that stands aside in place, moved and cast to where the model went meanwhile, and that one aside."""
        current = getattr(self.module, self.name)
        if (self._aside.device, self._aside.dtype) != (current.device, current.dtype):
            self._aside.data = self._aside.data.to(current.device, current.dtype)
        setattr(self.module, self.name, self._aside)
        self._aside = current
        self.swapped = not self.swapped


class AdaptedLinear(nn.Module):
    """A frozen linear layer with a low-rank update: ``y = base_layer(x) + dropout(x) Aᵀ B``.

    Args:
        base_layer: ``nn.Linear``, or transformers' ``Conv1D``.
        slot: where the factors come from, A ``(r, in_features)`` and B ``(r, out_features)``.
        dropout: probability of dropping an element of the update's input while training.

    Attributes:
        enabled: False leaves the update out.
        merged: True while the update is in ``base_layer.weight`` (see :func:`vblora.merge`).
        unmerged: the weight without it and with it, unless the former was released.
    """

    def __init__(self, base_layer: nn.Module, slot: Slot, dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.slot = slot
        self.dropout = dropout
        self.enabled = True
        self.merged = False
        self.unmerged: Replaced | None = None
        self.train(base_layer.training)

    # Models look at these on a layer that they do not call, and tie weights through them.
    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("weight", "bias"):
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def in_features(self) -> int:
        return widths(self.base_layer)[0]

    @property
    def out_features(self) -> int:
        return widths(self.base_layer)[1]

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if not self.active:
            return y
        dtype = compute_dtype(x.device, x.dtype)
        factors = (factor if factor is None else factor.to(x.device, dtype) for factor in self.slot.factors(dtype))
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return add_update(y, x, Factors(*factors))

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """The update as a matrix, laid out as ``base_layer.weight`` is, in at least float32."""
        weight = self.weight
        # From the parameters as they are, not from a forward's factors.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        update = delta(self.slot.adapter.factors_of(self.slot.index, dtype))
        return (update if is_conv1d(self.base_layer) else update.T).to(weight.device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight with the update in it, rounded once to the weight's dtype."""
        return self.delta_weight().add_(self.weight).to(self.weight.dtype)

    def merge(self, release: bool) -> None:
        """Puts the update into a new weight; the old one is kept for :meth:`unmerge`, or released."""
        merged = nn.Parameter(self.merged_weight(), requires_grad=self.weight.requires_grad)
        replaced = Replaced(self.base_layer, "weight", merged)
        self.unmerged = None if release else replaced
        self.merged = True

    @property
    def released(self) -> bool:
        """Whether it was merged for good."""
        return self.merged and self.unmerged is None

    def unmerge(self) -> None:
        if self.unmerged is not None:
            self.unmerged.swap()
            self.unmerged = None
            self.merged = False

    @property
    def active(self) -> bool:
        """Whether a forward adds the update."""
        return self.enabled and not self.merged

    def extra_repr(self) -> str:
        state = "merged" if self.merged else "" if self.enabled else "disabled"
        return ", ".join(part for part in (f"dropout={self.dropout}" if self.dropout else "", state) if part)


def adapted_layers(model: nn.Module) -> list[tuple[str, AdaptedLinear]]:
    """A model's adapted layers by their names.

    Raises:
        ValueError: there are none.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]
    if not layers:
        raise ValueError("`model` has no adapted layers: call vblora.inject(model, config) first.")
    return layers


class VBLinear(AdaptedLinear):
    """A linear layer with a VB-LoRA adapter of its own, for models that are written by hand.

    Like ``nn.Linear(in_features, out_features)``, or around a layer that is there: ``VBLinear(base_layer=layer)``. The base
    layer is frozen; what trains is ``adapter.bank.vectors`` ``(h, b)`` and ``adapter.logits`` ``(S, M)``. Give several
    layers the same ``bank`` to share it: like any tied parameter it is then trained once and found under each. A whole model
    is better served by :func:`vblora.inject`, which composes the factors of all layers in one go.

    Args:
        in_features, out_features, bias: of a new ``nn.Linear``. Not together with ``base_layer``.
        base_layer: the ``nn.Linear`` or ``Conv1D`` to adapt.
        r: rank of the update.
        topk: k, bank vectors mixed into a sub-vector.
        bank: the vector bank. Without it a new one is made from ``num_vectors`` and ``vector_length``.
        num_vectors, vector_length: h and b of a new bank. ``vector_length`` must divide both widths; by default it is the
            largest such length up to 256.
        num_candidates: M, bank vectors that a sub-vector may choose from while it trains (:class:`VBLoRAConfig`).
        dropout: probability of dropping an element of the update's input while training.
        init_logits_std: logits start normal with this standard deviation.
        init, scaling: how the adapter starts, and the factor of its update (:class:`VBLoRAConfig`).
        seed: of that draw; from torch's generator if None.
        device, dtype: of a new ``nn.Linear``. Adapter parameters go to the layer's device and are float32.

    Raises:
        ValueError: arguments that contradict each other or are out of range.
        TypeError: a ``base_layer`` of another type.

    Shape:
        ``(*, in_features)`` to ``(*, out_features)``.

    Example::

        layer = vblora.VBLinear(768, 3072, r=4, num_vectors=256, vector_length=256)
        y = layer(torch.randn(2, 768))
    """

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int | None = None,
        bias: bool | None = None,
        *,
        base_layer: nn.Module | None = None,
        r: int = 4,
        topk: int = 2,
        bank: VectorBank | None = None,
        num_vectors: int | None = None,
        vector_length: int | None = None,
        num_candidates: int | None = 128,
        dropout: float = 0.0,
        init_logits_std: float = 0.1,
        init: str = "paper",
        scaling: float = 1.0,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        new = {"in_features": in_features, "out_features": out_features, "bias": bias, "device": device, "dtype": dtype}
        given = [name for name, value in new.items() if value is not None]
        if base_layer is not None and given:
            raise ValueError(f"`{given[0]}` is of a new layer, but `base_layer` was given. Give one of the two.")
        if base_layer is None and (in_features is None or out_features is None):
            raise ValueError("Give `in_features` and `out_features`, or a `base_layer` to adapt.")
        if bank is not None and (num_vectors is not None or vector_length is not None):
            raise ValueError(
                "`num_vectors` and `vector_length` are of a new bank, but `bank` was given. Give one of the two."
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"`dropout` is {dropout}, but must be at least 0 and below 1.")
        if base_layer is None:
            base_layer = nn.Linear(in_features, out_features, bias is not False, device=device, dtype=dtype)
        elif not (isinstance(base_layer, nn.Linear) or is_conv1d(base_layer)):
            raise TypeError(f"`base_layer` is a {type(base_layer).__name__}; allowed are nn.Linear and Conv1D.")
        target = Target("base_layer", *widths(base_layer))
        if bank is None:
            common = math.gcd(target.in_features, target.out_features)
            if vector_length is None:
                vector_length = max(length for length in range(1, min(common, 256) + 1) if common % length == 0)
            bank = VectorBank(
                256 if num_vectors is None else num_vectors,
                vector_length,
                pairs=init == "noop",
                device=base_layer.weight.device,
            )
        adapter = VBLoRAAdapter(
            [target],
            bank,
            r=r,
            topk=topk,
            num_candidates=num_candidates,
            init_logits_std=init_logits_std,
            init=init,
            scaling=scaling,
            seed=seed,
        )
        super().__init__(base_layer, adapter.slots[0], dropout)
        self.base_layer.requires_grad_(False)
        self.adapter = adapter
