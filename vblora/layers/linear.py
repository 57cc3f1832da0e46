"""One linear layer with an adapter of its own."""

import torch
from torch import nn

from ..adapters import VBLoRAAdapter
from ..adapters.vblora import default_length
from ..bank import VectorBank
from .adapted import AdaptedLayer, Update
from .kinds import is_linear, refusal, target_of
from .weights import keep_unpacked


class VBLinear(AdaptedLayer):
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
        num_vectors, vector_length: h and b of a new bank. ``vector_length`` must divide both widths unless ``pad``; by
            default it is the largest such length up to 256.
        num_candidates: M, bank vectors that a sub-vector may choose from while it trains (:class:`VBLoRAConfig`).
        dropout: probability of dropping an element of the update's input while training.
        init_logits_std: logits start normal with this standard deviation.
        init, scaling: how the adapter starts, and the factor of its update (:class:`VBLoRAConfig`).
        pad: let ``vector_length`` be any (:class:`VBLoRAConfig`); by default it is 256, or the larger width if that is less.
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
        pad: bool = False,
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
        elif not is_linear(base_layer):
            raise TypeError(f"`base_layer` is a {type(base_layer).__name__}; allowed are nn.Linear and Conv1D.")
        elif reason := refusal(base_layer):
            raise TypeError(f"`base_layer` is a {type(base_layer).__name__}{reason}.")
        target = target_of("base_layer", base_layer)
        if bank is None:
            bank = VectorBank(
                256 if num_vectors is None else num_vectors,
                default_length((target,), pad) if vector_length is None else vector_length,
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
            pad=pad,
            seed=seed,
        )
        super().__init__(base_layer)
        self.base_layer.requires_grad_(False)
        keep_unpacked(self)
        self.adapter = adapter
        self.updates["default"] = Update(adapter.slots[0], dropout)
        self.set(active=["default"])
