"""The kinds of frozen layer that take an update: how wide they are, how it is added to their output, and to their weight.

An update is ``B`` transposed times ``A``, in the shape of the layer's weight seen as a matrix ``(out, in)``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..adapters.base import Factors, Target


def add_product(y: Tensor, hidden: Tensor, factors: Factors) -> Tensor:
    """``y`` ``(*, out_features)`` with the update whose ``x Aᵀ`` is ``hidden`` ``(*, r)``, in ``y``'s dtype.

    ``d`` scales what is ``(*, r)`` and ``e`` what is ``(*, out_features)``: B may be a view of a larger one, and neither it nor a
    scaled one is copied.
    """
    _, B, d, e = factors
    if d is not None:
        hidden = hidden * d
    if (y.device, y.dtype) != (hidden.device, hidden.dtype):
        update = hidden @ B
        return y + (update if e is None else update * e).to(y.device, y.dtype)
    if e is not None:
        return torch.addcmul(y, hidden @ B, e)
    if y.dim() == 3 and y.shape[0] == 1 and not torch.is_grad_enabled():  # a token's decoding: three calls less
        return torch.baddbmm(y, hidden, B[None])
    # The sum is formed while the product is: a pass over `y` less than a product and a sum take.
    return torch.addmm(y.reshape(-1, y.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), B).view(y.shape)


class Linear:
    """``nn.Linear``."""

    name = "linear"

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear)

    @staticmethod
    def refusal(layer: nn.Module) -> str | None:
        """What about a layer of this kind keeps an update from it; None: nothing."""
        return _other_forward(layer, nn.Linear)

    @staticmethod
    def widths(layer: nn.Module) -> tuple[int, int]:
        """``in_features`` and ``out_features``."""
        return layer.in_features, layer.out_features

    @staticmethod
    def add_update(layer: nn.Module, y: Tensor, x: Tensor, factors: Factors) -> Tensor:
        """The layer's output ``y`` for ``x``, with an update."""
        return add_product(y, F.linear(x, factors.A), factors)

    @staticmethod
    def delta(layer: nn.Module, A: Tensor, B: Tensor) -> Tensor:
        """What is added to its weight, laid out as that is."""
        return B.T @ A


class Conv1D(Linear):
    """transformers' ``Conv1D``: a linear layer with its weight stored ``(in, out)``."""

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        return _transformers_conv1d(layer) is not None

    @staticmethod
    def refusal(layer: nn.Module) -> str | None:
        return _other_forward(layer, _transformers_conv1d(layer))

    @staticmethod
    def widths(layer: nn.Module) -> tuple[int, int]:
        return layer.weight.shape[0], layer.weight.shape[1]

    @staticmethod
    def delta(layer: nn.Module, A: Tensor, B: Tensor) -> Tensor:
        return A.T @ B


class Embedding(Linear):
    """``nn.Embedding``, as the linear layer of one-hot inputs that it is: ``in`` counts the entries. It has no dropout."""

    name = "embedding"

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        return isinstance(layer, nn.Embedding)

    @staticmethod
    def refusal(layer: nn.Module) -> str | None:
        if layer.max_norm is not None:
            return "changes its weight as it is read (`max_norm`)"
        if layer.scale_grad_by_freq:
            return "has a rule of its own for gradients (`scale_grad_by_freq`)"
        scaled = type(layer).__name__.endswith("ScaledWordEmbedding") and hasattr(layer, "embed_scale")  # transformers'
        return None if scaled else _other_forward(layer, nn.Embedding)

    @staticmethod
    def widths(layer: nn.Module) -> tuple[int, int]:
        return layer.num_embeddings, layer.embedding_dim

    @staticmethod
    def add_update(layer: nn.Module, y: Tensor, x: Tensor, factors: Factors) -> Tensor:
        hidden = F.embedding(x, factors.A.T)
        scale = getattr(layer, "embed_scale", None)
        y = add_product(y, hidden if scale is None else hidden * scale, factors)
        if layer.padding_idx is None:
            return y
        return torch.where(
            (x == layer.padding_idx).unsqueeze(-1), y.detach(), y
        )  # trains nothing, as in the layer itself

    @staticmethod
    def delta(layer: nn.Module, A: Tensor, B: Tensor) -> Tensor:
        return A.T @ B


class Convolution:
    """``nn.Conv1d`` and ``nn.Conv2d``, by their weight flattened to ``(out_channels, in_channels / groups * kernel)``."""

    name = "convolution"

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        return isinstance(layer, (nn.Conv1d, nn.Conv2d))

    @staticmethod
    def refusal(layer: nn.Module) -> str | None:
        base = nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d
        if type(layer)._conv_forward is not base._conv_forward:
            return "has a `_conv_forward` of its own"
        return _other_forward(layer, base)

    @staticmethod
    def widths(layer: nn.Module) -> tuple[int, int]:
        return layer.weight[0].numel(), layer.out_channels

    @staticmethod
    def add_update(layer: nn.Module, y: Tensor, x: Tensor, factors: Factors) -> Tensor:
        kernel, groups = layer.kernel_size, layer.groups
        point = (1,) * len(kernel)
        A = factors.A.reshape(-1, layer.in_channels // groups, *kernel)
        # Each group of outputs sees its own inputs through the same A.
        hidden = layer._conv_forward(x, A.repeat(groups, 1, *point) if groups > 1 else A, None)
        if factors.d is not None:
            hidden = hidden * factors.d.repeat(groups).view(-1, *point)
        convolve = F.conv1d if len(kernel) == 1 else F.conv2d
        update = convolve(hidden, factors.B.T.reshape(layer.out_channels, -1, *point), groups=groups)
        update = update if factors.e is None else update * factors.e.view(-1, *point)
        return y + update.to(y.device, y.dtype)

    @staticmethod
    def delta(layer: nn.Module, A: Tensor, B: Tensor) -> Tensor:
        return (B.T @ A).view_as(layer.weight)


def _transformers_conv1d(layer: nn.Module) -> type[nn.Module] | None:
    # By name, so that transformers need not be there.
    named = [c for c in type(layer).__mro__ if (c.__module__, c.__name__) == ("transformers.pytorch_utils", "Conv1D")]
    return named[0] if named else None


# The `forward` of subclasses of nn.Linear that gives what nn.Linear's does.
_AS_LINEAR = {
    "bitsandbytes.nn.modules.Linear4bit.forward",
    "bitsandbytes.nn.modules.Linear8bitLt.forward",
    "transformers.models.falcon.modeling_falcon.FalconLinear.forward",
}


def _other_forward(layer: nn.Module, base: type[nn.Module]) -> str | None:
    """A class's own, or one put on the layer itself: accelerate's alone is known, which moves what the layer's own takes."""
    if "forward" in vars(layer) and not hasattr(layer, "_hf_hook"):
        return "has been given another `forward`: what it does is not known"
    forward = type(layer).forward
    if forward is base.forward or f"{forward.__module__}.{forward.__qualname__}" in _AS_LINEAR:
        return None
    kind = f"nn.{base.__name__}" if hasattr(nn, base.__name__) else base.__name__
    return f"is no plain {kind}: what its `forward` does is not known"


KINDS = (Linear, Conv1D, Embedding, Convolution)
ALLOWED = "nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d and transformers' Conv1D"


def kind_of(layer: nn.Module) -> type[Linear] | type[Convolution] | None:
    """The kind of a layer, or None: it is of none of them."""
    return next((kind for kind in KINDS if kind.takes(layer)), None)


def refusal(layer: nn.Module) -> str | None:
    """Why a layer takes no update, to be said after what it is; None: it takes one."""
    kind = kind_of(layer)
    if kind is None:
        return f"; allowed are {ALLOWED}"
    if is_lazy(layer.weight):
        return ", which has no sizes yet; run the model once"
    reason = kind.refusal(layer)
    return reason and f", which {reason}"


def target_of(name: str, layer: nn.Module) -> Target:
    """A layer as an adapter and its files see it."""
    kind = kind_of(layer)
    if kind is not Convolution:
        return Target(name, *kind.widths(layer), kind.name)
    usual = {"groups": 1, "dilation": (1,) * len(layer.kernel_size), "padding_mode": "zeros"}
    unusual = [attribute for attribute, value in usual.items() if getattr(layer, attribute) != value]
    return Target(name, *kind.widths(layer), kind.name, tuple(layer.weight.shape[1:]), tuple(unusual))


def is_linear(layer: nn.Module) -> bool:
    return Linear.takes(layer) or Conv1D.takes(layer)


@torch.compiler.assume_constant_result  # Dynamo cannot trace it before torch 2.12
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What a layer computes in there, given tensors of ``dtype``."""
    if _has_autocast(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype
