"""How a base layer's weight is stored: dense, or quantised by bitsandbytes (8 and 4 bits) or torchao (int8).

A weight's format is told by the name of its class, so that those packages need not be installed.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Rounding(NamedTuple):
    """The error of quantising a merged weight again, as relative Frobenius norms."""

    of_weight: float  # the error divided by the norm of the merged weight
    of_update: float  # the error divided by the norm of the merged update: from 1 on, more is lost than was added


class Format(ABC):
    """One way to store a weight, as a class of static methods that is never instantiated.

    ``layer`` is Any because the layers and weights of packages that may not be installed have attributes that nn.Module and
    Tensor do not declare.
    """

    exact: ClassVar[bool] = False  # whether a dense weight is stored without rounding

    @staticmethod
    @abstractmethod
    def takes(weight: Tensor) -> bool:
        """Whether ``weight`` is stored in this format."""

    @staticmethod
    @abstractmethod
    def dtype(layer: Any) -> torch.dtype:
        """The dtype of the layer's weight before it was quantised."""

    @staticmethod
    @abstractmethod
    def read(layer: Any) -> Tensor:
        """The layer's weight as a dense tensor."""

    @staticmethod
    @abstractmethod
    def store(layer: Any, weight: Tensor) -> nn.Parameter:
        """A new weight for the layer, in the format of its own; ``weight`` is dense and in ``dtype``."""


class Dense(Format):
    """A floating-point tensor."""

    exact = True

    @staticmethod
    def takes(weight: Tensor) -> bool:
        return weight.is_floating_point() and not _packages(weight)

    @staticmethod
    def dtype(layer: Any) -> torch.dtype:
        return layer.weight.dtype

    @staticmethod
    def read(layer: Any) -> Tensor:
        return layer.weight

    @staticmethod
    def store(layer: Any, weight: Tensor) -> nn.Parameter:
        return nn.Parameter(weight, requires_grad=layer.weight.requires_grad)


class Bits8(Format):
    """bitsandbytes' ``Linear8bitLt``: int8 with one scale per row, quantised from float16."""

    @staticmethod
    def takes(weight: Tensor) -> bool:
        return _is_a(weight, "bitsandbytes", "Int8Params") and weight.dtype == torch.int8

    @staticmethod
    def dtype(layer: Any) -> torch.dtype:
        return torch.float16

    @staticmethod
    def read(layer: Any) -> Tensor:
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        return layer.weight.data.float() * (scales.float() / 127).unsqueeze(1)

    @staticmethod
    def store(layer: Any, weight: Tensor) -> nn.Parameter:
        # Moving the parameter off the CPU quantises it.
        return type(layer.weight)(weight.cpu(), requires_grad=False).to(layer.weight.device)


class Bits4(Format):
    """bitsandbytes' ``Linear4bit``: blocks of 4-bit numbers."""

    @staticmethod
    def takes(weight: Tensor) -> bool:
        return _is_a(weight, "bitsandbytes", "Params4bit") and getattr(weight, "quant_state", None) is not None

    @staticmethod
    def dtype(layer: Any) -> torch.dtype:
        return layer.weight.quant_state.dtype

    @staticmethod
    def read(layer: Any) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        unpack_weight(layer)
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()

    @staticmethod
    def store(layer: Any, weight: Tensor) -> nn.Parameter:
        own = layer.weight
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        return type(own)(weight, requires_grad=False, **{name: getattr(own, name) for name in names}).to(own.device)


class TorchaoInt8(Format):
    """torchao's ``Int8Tensor``, as made by ``quantize_``."""

    @staticmethod
    def takes(weight: Tensor) -> bool:
        return _is_a(weight, "torchao", "Int8Tensor") and getattr(weight, "act_pre_scale", None) is None

    @staticmethod
    def dtype(layer: Any) -> torch.dtype:
        return layer.weight.dtype

    @staticmethod
    def read(layer: Any) -> Tensor:
        return layer.weight.dequantize(torch.promote_types(layer.weight.dtype, torch.float32))

    @staticmethod
    def store(layer: Any, weight: Tensor) -> nn.Parameter:
        from torchao.quantization import MappingType, PerGroup, PerRow, PerTensor

        own = layer.weight
        block = list(own.block_size)
        rows = PerRow() if block[-1] == own.shape[-1] else PerGroup(block[-1])
        asymmetric = own.zero_point is not None and bool(own.zero_point.any())
        names = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "reduce_range")
        return nn.Parameter(
            type(own).from_hp(
                weight,
                PerTensor() if block == list(own.shape) else rows,
                MappingType.ASYMMETRIC if asymmetric else MappingType.SYMMETRIC,
                **{name: getattr(own, name) for name in names},
            ),
            requires_grad=False,
        )


FORMATS: tuple[type[Format], ...] = (Dense, Bits8, Bits4, TorchaoInt8)


def can_merge_into(weight: Tensor) -> bool:
    """Whether the format of a weight is known, so that updates can be merged into it."""
    return any(format.takes(weight) for format in FORMATS)


def format_of(weight: Tensor) -> type[Format]:
    """The format of a weight.

    Raises:
        TypeError: the format is unknown (:func:`can_merge_into`).
    """
    for format in FORMATS:
        if format.takes(weight):
            return format
    raise TypeError(f"a weight of {format_name(weight)} cannot be merged into.")


def format_name(weight: Tensor) -> str:
    """A weight's package, class and dtype, for a message."""
    return " ".join([*(f"{package}'s {type(weight).__name__}" for package in _packages(weight)), str(weight.dtype)])


def is_packed(weight: Tensor) -> bool:
    """Whether a weight's dtype is only that of its storage, not the dtype that the layer computes in."""
    return "bitsandbytes" in _packages(weight) or not weight.is_floating_point()


def passes_gradients(weight: Tensor) -> bool:
    """Whether a layer with this weight passes gradients to its input. torchao layers that also quantise the input do not."""
    return "torchao" not in _packages(weight) or getattr(weight, "act_quant_kwargs", None) is None


def is_quantised(tensor: Tensor) -> bool:
    """Whether the tensor's class is one of a quantisation package, even if its format is unknown."""
    return bool(_packages(tensor))


def rounding(layer: Any, merged: Tensor, stored: nn.Parameter) -> Rounding:
    """The error of ``stored``, the quantised form of ``merged``, which is the layer's weight plus an update."""
    read = format_of(layer.weight).read
    update = (merged - read(layer)).norm()
    own = swap_tensor(layer, "weight", stored)
    error = (merged - read(layer)).norm()
    swap_tensor(layer, "weight", own)
    of_weight, of_update = ((error / norm.float().clamp_min(1e-30)).item() for norm in (merged.float().norm(), update))
    return Rounding(of_weight, of_update)


def swap_tensor(layer: Any, name: str, tensor: Any) -> Tensor:
    """Replaces a tensor of the layer, after matching its device and dtype, and returns the replaced one.

    The quantisation state that bitsandbytes' layers hold apart from a weight goes with it.
    """
    own = getattr(layer, name)
    if not is_quantised(own):
        if (tensor.device, tensor.dtype) != (own.device, own.dtype):
            tensor.data = tensor.data.to(own.device, own.dtype)
    elif tensor.device != own.device:  # `to` also moves the scales, which are not in `data`
        tensor = tensor.to(own.device)
        tensor = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
    if Bits8.takes(own) and own.CB is None:  # the layer's first forward moved them to its state
        own.CB, own.SCB = layer.state.CB, layer.state.SCB
    setattr(layer, name, tensor)
    if Bits4.takes(own):
        layer.quant_state = tensor.quant_state
    return own


def unpack_weight(layer: nn.Module) -> None:
    """Undoes bitsandbytes' repacking of a 4-bit weight for evaluation on some CPUs."""
    if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        layer.state_dict()  # bitsandbytes unpacks the weight here


def disable_packing(model: nn.Module) -> list[nn.Module]:
    """Keeps bitsandbytes' 4-bit layers from repacking their weights when they are evaluated on a CPU with AVX-512 BF16.

    Repacking rounds the scales, and a repacked layer silently passes no gradient to its input.

    Returns:
        The layers that would have repacked, for :func:`enable_packing`.
    """
    layers = [module for module in model.modules() if getattr(module, _PACKS, False)]
    for layer in layers:
        setattr(layer, _PACKS, False)
        unpack_weight(layer)
    return layers


def enable_packing(layers: list[nn.Module]) -> None:
    for layer in layers:
        setattr(layer, _PACKS, True)


_PACKS = "support_avx512bf16_for_cpu"


def _packages(weight: Tensor) -> list[str]:
    """The quantisation packages that the weight's class comes from."""
    found = {kind.__module__.partition(".")[0] for kind in type(weight).__mro__}
    return [package for package in ("bitsandbytes", "torchao") if package in found]


def _is_a(weight: Tensor, package: str, name: str) -> bool:
    return package in _packages(weight) and any(kind.__name__ == name for kind in type(weight).__mro__)
