"""The kinds of layer that can be adapted: their widths, and how an update is added to their output or their weight.

An update is ``Bᵀ A``, the shape of the layer's weight as a matrix ``(out, in)``.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .. import ops
from ..adapters.base import Factors, Target

LayerT = TypeVar("LayerT", bound=nn.Module)


def add_product(y: Tensor, hidden: Tensor, factors: Factors) -> Tensor:
    """Adds an update to ``y`` ``(*, out_features)``, in ``y``'s dtype; ``hidden`` ``(*, r)`` is ``x Aᵀ``.

    ``d`` scales ``hidden`` and ``e`` the product, never B, which may be a view of a larger tensor and is not copied.
    """
    _, B, d, e = factors
    if d is not None:
        hidden = hidden * d
    if (y.device, y.dtype) != (hidden.device, hidden.dtype) or y.is_nested:
        update = F.linear(hidden, B.T)  # which takes nested tensors
        return y + (update if e is None else update * e).to(y.device, y.dtype)
    if e is not None:
        return torch.addcmul(y, hidden @ B, e)
    if not ops.is_recorded() and y.dim() == 3 and y.shape[0] == 1 and not torch.is_grad_enabled():
        # Decoding one token: saves three calls.
        return torch.baddbmm(y, hidden, B[None])
    # One pass over `y` less than a product followed by a sum.
    return torch.addmm(y.reshape(-1, y.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), B).view(y.shape)


class Kind(ABC, Generic[LayerT]):
    """One kind of layer, as a class of static methods that is never instantiated."""

    name: ClassVar[str]  # as files store it

    @staticmethod
    @abstractmethod
    def takes(layer: nn.Module) -> bool:
        """Whether ``layer`` is of this kind."""

    @staticmethod
    @abstractmethod
    def refusal(layer: LayerT) -> str | None:
        """Why this layer cannot be adapted; None if it can."""

    @staticmethod
    @abstractmethod
    def widths(layer: LayerT) -> tuple[int, int]:
        """``in_features`` and ``out_features``."""

    @staticmethod
    @abstractmethod
    def add_update(layer: LayerT, y: Tensor, x: Tensor, factors: Factors) -> Tensor:
        """The layer's output ``y`` for the input ``x``, plus the update."""

    @staticmethod
    @abstractmethod
    def delta(layer: LayerT, A: Tensor, B: Tensor) -> Tensor:
        """The update of the layer's weight, in the layout of that weight."""


class Linear(Kind[nn.Linear]):
    """``nn.Linear``."""

    name = "linear"

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear)

    @staticmethod
    def refusal(layer: nn.Linear) -> str | None:
        if not isinstance(layer.weight, UninitializedParameter) and 0 in layer.weight.shape:
            return "has an empty weight"
        return _other_forward(layer, nn.Linear)

    @staticmethod
    def widths(layer: nn.Linear) -> tuple[int, int]:
        return layer.in_features, layer.out_features

    @staticmethod
    def add_update(layer: nn.Linear, y: Tensor, x: Tensor, factors: Factors) -> Tensor:
        return add_product(y, F.linear(x, factors.A), factors)

    @staticmethod
    def delta(layer: nn.Linear, A: Tensor, B: Tensor) -> Tensor:
        return B.T @ A


class Conv1D(Linear):
    """transformers' ``Conv1D``: a linear layer whose weight is ``(in, out)``."""

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        return _transformers_conv1d(layer) is not None

    @staticmethod
    def refusal(layer: nn.Linear) -> str | None:
        base = _transformers_conv1d(layer)
        return None if base is None else _other_forward(layer, base)

    @staticmethod
    def widths(layer: nn.Linear) -> tuple[int, int]:
        return layer.weight.shape[0], layer.weight.shape[1]

    @staticmethod
    def delta(layer: nn.Linear, A: Tensor, B: Tensor) -> Tensor:
        return A.T @ B


class Embedding(Kind[nn.Embedding]):
    """``nn.Embedding``, treated as a linear layer of one-hot inputs: ``in`` is the number of entries. No dropout applies."""

    name = "embedding"

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        return isinstance(layer, nn.Embedding)

    @staticmethod
    def refusal(layer: nn.Embedding) -> str | None:
        if layer.max_norm is not None:
            return "changes its weight on lookup (`max_norm`)"
        if layer.scale_grad_by_freq:
            return "scales its gradients (`scale_grad_by_freq`)"
        scaled = type(layer).__name__.endswith("ScaledWordEmbedding") and hasattr(layer, "embed_scale")  # transformers'
        return None if scaled else _other_forward(layer, nn.Embedding)

    @staticmethod
    def widths(layer: nn.Embedding) -> tuple[int, int]:
        return layer.num_embeddings, layer.embedding_dim

    @staticmethod
    def add_update(layer: nn.Embedding, y: Tensor, x: Tensor, factors: Factors) -> Tensor:
        hidden = F.embedding(x, factors.A.T)
        scale = getattr(layer, "embed_scale", None)
        y = add_product(y, hidden if scale is None else hidden * scale, factors)
        if layer.padding_idx is None:
            return y
        padding = torch.eq(x, layer.padding_idx).unsqueeze(-1)
        return torch.where(padding, y.detach(), y)  # padding gets no gradient, as in nn.Embedding

    @staticmethod
    def delta(layer: nn.Embedding, A: Tensor, B: Tensor) -> Tensor:
        return A.T @ B


class Convolution(Kind[nn.Conv1d | nn.Conv2d]):
    """``nn.Conv1d`` and ``nn.Conv2d``, with the weight flattened to ``(out_channels, in_channels / groups * kernel)``."""

    name = "convolution"

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        return isinstance(layer, (nn.Conv1d, nn.Conv2d))

    @staticmethod
    def refusal(layer: nn.Conv1d | nn.Conv2d) -> str | None:
        base = nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d
        if type(layer)._conv_forward is not base._conv_forward:
            return "overrides `_conv_forward`"
        return _other_forward(layer, base)

    @staticmethod
    def widths(layer: nn.Conv1d | nn.Conv2d) -> tuple[int, int]:
        return layer.weight[0].numel(), layer.out_channels

    @staticmethod
    def add_update(layer: nn.Conv1d | nn.Conv2d, y: Tensor, x: Tensor, factors: Factors) -> Tensor:
        kernel, groups = layer.kernel_size, layer.groups
        point = (1,) * len(kernel)
        A = factors.A.reshape(-1, layer.in_channels // groups, *kernel)
        # All groups share A, each applied to its own inputs.
        hidden = layer._conv_forward(x, A.repeat(groups, 1, *point) if groups > 1 else A, None)
        if factors.d is not None:
            hidden = hidden * factors.d.repeat(groups).view(-1, *point)
        convolve = F.conv1d if len(kernel) == 1 else F.conv2d
        update = convolve(hidden, factors.B.T.reshape(layer.out_channels, -1, *point), groups=groups)
        update = update if factors.e is None else update * factors.e.view(-1, *point)
        return y + update.to(y.device, y.dtype)

    @staticmethod
    def delta(layer: nn.Conv1d | nn.Conv2d, A: Tensor, B: Tensor) -> Tensor:
        return (B.T @ A).view_as(layer.weight)


def _transformers_conv1d(layer: nn.Module) -> type[nn.Module] | None:
    # By name, so that transformers need not be installed.
    named = [c for c in type(layer).__mro__ if (c.__module__, c.__name__) == ("transformers.pytorch_utils", "Conv1D")]
    return named[0] if named else None


# Subclasses of nn.Linear whose `forward` is known to compute the same.
_AS_LINEAR = {
    "bitsandbytes.nn.modules.Linear4bit.forward",
    "bitsandbytes.nn.modules.Linear8bitLt.forward",
    "transformers.models.falcon.modeling_falcon.FalconLinear.forward",
}


def _other_forward(layer: nn.Module, base: type[nn.Module]) -> str | None:
    """Why the layer's ``forward`` may not be that of ``base``: its class or the layer itself overrides it. accelerate's hook on a
    layer only moves tensors, so it is allowed."""
    if "forward" in vars(layer) and not hasattr(layer, "_hf_hook"):
        return "has a replaced `forward` that may compute something else"
    if type(layer).__call__ is not nn.Module.__call__:
        return "has a `__call__` of its own that may compute something else"
    forward = type(layer).forward
    if forward is base.forward or f"{forward.__module__}.{forward.__qualname__}" in _AS_LINEAR:
        return None
    kind = f"nn.{base.__name__}" if hasattr(nn, base.__name__) else base.__name__
    return f"is no plain {kind}: its `forward` may compute something else"


KINDS: tuple[type[Kind[Any]], ...] = (Linear, Conv1D, Embedding, Convolution)
ALLOWED = "nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d and transformers' Conv1D"


def has_kind(layer: nn.Module) -> bool:
    """Whether a layer is of a known kind."""
    return any(kind.takes(layer) for kind in KINDS)


def kind_of(layer: nn.Module) -> type[Kind[Any]]:
    """The kind of a layer.

    Raises:
        TypeError: a layer of another kind.
    """
    for kind in KINDS:
        if kind.takes(layer):
            return kind
    raise TypeError(f"`base_layer` is a {type(layer).__name__}; allowed are {ALLOWED}.")


def refusal(layer: nn.Module) -> str | None:
    """Why a layer cannot be adapted, worded to follow its class name; None if it can."""
    if not has_kind(layer):
        return f"; allowed are {ALLOWED}"
    if isinstance(layer.weight, UninitializedParameter):
        return ", which has no sizes yet; run the model once"
    reason = kind_of(layer).refusal(layer)
    return reason and f", which {reason}"


def target_of(name: str, layer: nn.Module) -> Target:
    """The target that describes ``layer`` to adapters and files."""
    kind = kind_of(layer)
    in_features, out_features = kind.widths(layer)
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return Target(name, in_features, out_features, kind.name)
    defaults = {"groups": 1, "dilation": (1,) * len(layer.kernel_size), "padding_mode": "zeros"}
    unusual = [attribute for attribute, value in defaults.items() if getattr(layer, attribute) != value]
    return Target(name, in_features, out_features, kind.name, tuple(layer.weight.shape[1:]), tuple(unusual))


def is_linear(layer: nn.Module) -> bool:
    return Linear.takes(layer) or Conv1D.takes(layer)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # Dynamo cannot trace it before torch 2.12
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a layer on ``device`` computes in, given inputs of ``dtype``: autocast's, if that is enabled. It leaves
    float64 alone."""
    kind = device.type
    if dtype != torch.float64 and _has_autocast(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype
