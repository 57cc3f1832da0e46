"""A linear layer with its own VB-LoRA adapter."""

import warnings

import torch
from torch import Tensor, nn

from ..adapters import VBLoRAAdapter
from ..adapters.base import note_living
from ..adapters.subvectors import default_length
from ..adapters.vblora import warn_of_one_vector
from ..bank import VectorBank
from ..checks import check_flag, check_number
from ..errors import VBLoRAWarning
from .adapted import AdaptedLayer, Update
from .kinds import is_linear, refusal, target_of
from .reads import Watched
from .weights import disable_packing


class VBLinear(AdaptedLayer):
    """A linear layer with its own VB-LoRA adapter, for models that you write by hand.

    Create it like ``nn.Linear(in_features, out_features)``, or wrap an existing layer: ``VBLinear(base_layer=layer)``. The base
    layer is frozen; ``adapter.bank.vectors`` ``(h, b)`` and ``adapter.logits`` ``(S, M)`` train. To share a bank, give several
    layers the same ``bank``; like any tied parameter, it trains once and appears under each layer. To adapt a whole model, use
    :func:`vblora.inject`, which composes the factors of all layers at once.

    In a ``PreTrainedModel`` of your own, have ``_init_weights(module)`` call ``module.reset_parameters()`` for a ``VectorBank``
    or an ``adapter``. Otherwise ``from_pretrained`` leaves them unset if the checkpoint has no adapter.

    Args:
        in_features, out_features, bias: of a new ``nn.Linear``. Do not combine them with ``base_layer``.
        base_layer: the ``nn.Linear`` or ``Conv1D`` to adapt.
        r: rank of the update.
        topk: k, the number of bank vectors mixed into a sub-vector.
        bank: the vector bank. By default a new one of ``num_vectors`` and ``vector_length``.
        num_vectors, vector_length: h and b of a new bank. ``vector_length`` must divide both widths, unless ``pad``. The default
            is the largest such length up to 256; with ``pad``, 256 or the larger width, whichever is smaller.
        num_candidates: M, the number of bank vectors that a sub-vector can choose from in training (:class:`VBLoRAConfig`).
        dropout: probability of dropping an element of the update's input in training.
        init_logits_std: standard deviation of the initial logits, which are normal.
        init, scaling: the initial values, and a number that multiplies the update (:class:`VBLoRAConfig`).
        train_scales: also train a scale for each sub-vector (:class:`VBLoRAConfig`).
        pad: allow any ``vector_length`` (:class:`VBLoRAConfig`).
        seed: of the initial logits. None draws one from torch's generator.
        device, dtype: of a new ``nn.Linear``. Adapter parameters are float32 on the layer's device.

    Attributes:
        base_layer: the frozen layer.
        adapter: the adapter, with the parameters ``bank.vectors`` ``(h, b)``, ``logits`` ``(S, M)`` and, with ``train_scales``,
            ``scales`` ``(S,)``. S is ``r * (in_features + out_features) / b``.

    Raises:
        ValueError: an argument is out of range or contradicts another.
        TypeError: an argument has the wrong type, or ``base_layer`` cannot be adapted.

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
        train_scales: bool = False,
        pad: bool = False,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        new = {"in_features": in_features, "out_features": out_features, "bias": bias, "device": device, "dtype": dtype}
        given = [name for name, value in new.items() if value is not None]
        if base_layer is not None and given:
            raise ValueError(
                f"`{given[0]}` applies to a new layer, but `base_layer` was given. Leave out one of the two."
            )
        if bank is not None and (num_vectors is not None or vector_length is not None):
            raise ValueError(
                "`num_vectors` and `vector_length` apply to a new bank, but `bank` was given. Leave out one or the other."
            )
        if not 0.0 <= check_number("dropout", dropout) < 1.0:
            raise ValueError(f"`dropout` is {dropout}, but must be at least 0 and below 1.")
        for name, flag in (("bias", True if bias is None else bias), ("train_scales", train_scales), ("pad", pad)):
            check_flag(name, flag)
        if base_layer is None:
            if in_features is None or out_features is None:
                raise ValueError("Pass `in_features` and `out_features`, or a `base_layer` to adapt.")
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
                device=next(base_layer.parameters()).device,
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
            train_scales=train_scales,
            pad=pad,
            seed=seed,
        )
        warn_of_one_vector(topk, train_scales, stacklevel=3)
        super().__init__(base_layer)
        self.base_layer.requires_grad_(False)
        disable_packing(self)
        self.adapter = adapter
        self.updates["default"] = Update(adapter.slots[0], dropout)
        self.set(active=["default"])
        note_living(adapter)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight. It warns when code uses it, because the update is then left out."""
        weight = super().weight
        if torch.compiler.is_compiling() or type(weight) is not nn.Parameter or not self.applied:
            return weight
        # A fused kernel such as that of nn.TransformerEncoderLayer does not take it, so the layer is called.
        return Watched.of(weight, _warn_of_read)


def _warn_of_read() -> None:
    warnings.warn(
        "the weight of a VBLinear was used without calling the layer, which leaves out its update. If the model's code does "
        "this, as nn.MultiheadAttention does with `out_proj`, keep the plain layer there. For the base layer's weight, take "
        "`layer.base_layer.weight`.",
        VBLoRAWarning,
        stacklevel=4,
    )
