"""How a base layer's weight is stored: dense, or quantised by bitsandbytes (8 and 4 bits) or torchao (int8).

Told by the names of its class, so that those packages need not be there; whose weight it is has imported them.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Rounding(NamedTuple):
    """What is lost as a merged weight is quantised again, as relative Frobenius norms."""

    of_weight: float  # the error by the merged weight
    of_update: float  # the error by the update that was merged: from 1 on, more was lost than was added


class Dense:
    """A floating-point tensor."""

    exact = True  # whether a dense weight is stored as it is

    @staticmethod
    def takes(weight: Tensor) -> bool:
        return weight.is_floating_point() and not _packages(weight)

    @staticmethod
    def dtype(layer: nn.Module) -> torch.dtype:
        """In which the weight is, or was before it was quantised, and is to be before it is again."""
        return layer.weight.dtype

    @staticmethod
    def read(layer: nn.Module) -> Tensor:
        return layer.weight

    @staticmethod
    def stored(layer: nn.Module, weight: Tensor) -> nn.Parameter:
        """A new weight for the layer, stored as its own is; ``weight`` is in ``dtype``."""
        return nn.Parameter(weight, requires_grad=layer.weight.requires_grad)


class Bits8:
    """bitsandbytes' ``Linear8bitLt``: int8 and a scale a row, quantised from float16."""

    exact = False

    @staticmethod
    def takes(weight: Tensor) -> bool:
        return _is_a(weight, "bitsandbytes", "Int8Params") and weight.dtype == torch.int8

    @staticmethod
    def dtype(layer: nn.Module) -> torch.dtype:
        return torch.float16

    @staticmethod
    def read(layer: nn.Module) -> Tensor:
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        return layer.weight.data.float() * (scales.float() / 127).unsqueeze(1)

    @staticmethod
    def stored(layer: nn.Module, weight: Tensor) -> nn.Parameter:
        # Moving it from the CPU is what quantises it.
        return type(layer.weight)(weight.cpu(), requires_grad=False).to(layer.weight.device)


class Bits4:
    """bitsandbytes' ``Linear4bit``: blocks of 4-bit numbers, with the dtype that they stand for."""

    exact = False

    @staticmethod
    def takes(weight: Tensor) -> bool:
        return _is_a(weight, "bitsandbytes", "Params4bit") and weight.quant_state is not None

    @staticmethod
    def dtype(layer: nn.Module) -> torch.dtype:
        return layer.weight.quant_state.dtype

    @staticmethod
    def read(layer: nn.Module) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        unpack_weight(layer)
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()

    @staticmethod
    def stored(layer: nn.Module, weight: Tensor) -> nn.Parameter:
        own = layer.weight
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        return type(own)(weight, requires_grad=False, **{name: getattr(own, name) for name in names}).to(own.device)


class TorchaoInt8:
    """torchao's ``Int8Tensor``, as ``quantize_`` makes it of a weight."""

    exact = False

    @staticmethod
    def takes(weight: Tensor) -> bool:
        return _is_a(weight, "torchao", "Int8Tensor") and weight.act_pre_scale is None

    @staticmethod
    def dtype(layer: nn.Module) -> torch.dtype:
        return layer.weight.dtype

    @staticmethod
    def read(layer: nn.Module) -> Tensor:
        return layer.weight.dequantize(torch.promote_types(layer.weight.dtype, torch.float32))

    @staticmethod
    def stored(layer: nn.Module, weight: Tensor) -> nn.Parameter:
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


FORMATS = (Dense, Bits8, Bits4, TorchaoInt8)


def format_of(weight: Tensor) -> type[Dense] | type[Bits8] | type[Bits4] | type[TorchaoInt8] | None:
    """How a weight is stored, or None: in a way that nothing can be merged into."""
    return next((format for format in FORMATS if format.takes(weight)), None)


def format_name(weight: Tensor) -> str:
    """What a weight is, for a message."""
    return " ".join([*(f"{package}'s {type(weight).__name__}" for package in _packages(weight)), str(weight.dtype)])


def is_packed(weight: Tensor) -> bool:
    """Whether a weight's dtype is that of what it is stored in, and says nothing of what the layer computes in."""
    return "bitsandbytes" in _packages(weight) or not weight.is_floating_point()


def passes_gradients(weight: Tensor) -> bool:
    """Whether a layer of this weight hands gradients on to its input: torchao's do not where they quantise that, too."""
    return "torchao" not in _packages(weight) or getattr(weight, "act_quant_kwargs", None) is None


def is_quantised(tensor: Tensor) -> bool:
    """Whether it is one of the packages', known or not."""
    return bool(_packages(tensor))


def rounding(layer: nn.Module, merged: Tensor, stored: Tensor) -> Rounding:
    """What is lost as ``merged``, the dense sum of the layer's weight and an update, becomes ``stored``."""
    read = format_of(layer.weight).read
    update = (merged - read(layer)).norm()
    own = swap_tensor(layer, "weight", stored)
    error = (merged - read(layer)).norm()
    swap_tensor(layer, "weight", own)
    return Rounding(*((error / norm.float().clamp_min(1e-30)).item() for norm in (merged.float().norm(), update)))


def swap_tensor(layer: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Puts a tensor in the place of the layer's own of that name, moved and cast to where that went meanwhile; returns that.

    What bitsandbytes' layers keep of a weight goes with it.
    """
    own = getattr(layer, name)
    if not is_quantised(own):
        if (tensor.device, tensor.dtype) != (own.device, own.dtype):
            tensor.data = tensor.data.to(own.device, own.dtype)
    elif tensor.device != own.device:  # with its scales, which no `data` holds
        tensor = tensor.to(own.device)
        tensor = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
    if Bits8.takes(own) and own.CB is None:  # its first forward has moved them, and that of the other will
        own.CB, own.SCB = layer.state.CB, layer.state.SCB
    setattr(layer, name, tensor)
    if Bits4.takes(own):
        layer.quant_state = tensor.quant_state
    return own


def unpack_weight(layer: nn.Module) -> None:
    """Undoes what bitsandbytes does to a 4-bit weight as it is evaluated on some CPUs."""
    if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        layer.state_dict()  # there it does it itself


def disable_packing(model: nn.Module) -> list[nn.Module]:
    """Has bitsandbytes' 4-bit layers leave their weights as they are when they are evaluated on a CPU with AVX-512 BF16.

    It packs them otherwise, rounding their scales, and a layer whose weight is packed passes no gradient on, without a word.

    Returns:
        The layers that would; :func:`enable_packing` lets them again.
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
    """Of those known here, the ones that its class comes from."""
    found = {kind.__module__.partition(".")[0] for kind in type(weight).__mro__}
    return [package for package in ("bitsandbytes", "torchao") if package in found]


def _is_a(weight: Tensor, package: str, name: str) -> bool:
    return package in _packages(weight) and any(kind.__name__ == name for kind in type(weight).__mro__)
