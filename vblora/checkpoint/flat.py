"""The contents of adapters whose parameters are stored as they are: LoRA and Tied-LoRA, and VeRA in ``vera.py``."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from ..adapters import Adapter, Factors, LoRAAdapter, Target, TiedLoRAAdapter
from ..adapters.registry import adapter_class
from ..bank import BankFile, VectorBank
from ..config import AdapterConfig, LoraConfig, TiedLoraConfig
from ..distributed import gather_to_cpu, shard_like
from .contents import Contents, check_finite, check_tensor


@dataclass(frozen=True)
class FlatContents(Contents):
    """``tensors``: the adapter's parameters and buffers by their names in the adapter."""

    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, config: AdapterConfig, adapter: Adapter, extra_parameters: dict[str, Tensor]) -> Self:
        tensors = {name: gather_to_cpu(tensor) for name, tensor in _tensors_of(adapter).items()}
        return cls(config, adapter.targets, tensors, extra_parameters=extra_parameters)

    @abstractmethod
    def _part_sizes(self) -> dict[str, list[int]]:
        """For each tensor that has one part per target along its first dimension: the sizes of the parts."""

    def check(self) -> None:
        self.check_layout()
        try:
            wanted = _tensors_of(adapter_class(self.config).from_config(self.config, self.targets, device="meta"))
        except (RuntimeError, TypeError, OverflowError):
            raise ValueError(f"its `r` is {self.config.r}, which is too large for any tensor.") from None
        for name in sorted(wanted.keys() ^ self.tensors.keys()):
            raise ValueError(f"it {'lacks' if name in wanted else 'has an unknown'} tensor `{name}`.")
        for name, tensor in self.tensors.items():
            check_tensor(name, tensor, tuple(wanted[name].shape), floating=True)
            check_finite(name, tensor)

    def check_sizes(self, other: Self) -> None:
        for name, tensor in self.tensors.items():
            if tensor.shape != other.tensors[name].shape:
                raise ValueError(f"`model` has an adapter with other `{name}`. Eject it first.")

    def all_factors(self, dtype: torch.dtype) -> Iterator[tuple[Target, Factors]]:
        with torch.no_grad():
            yield from zip(self.targets, self.adapter().compose(dtype), strict=True)

    def adapter(self, device: torch.device | str | None = None, bank: VectorBank | None = None) -> Adapter:
        adapter = adapter_class(self.config).from_config(self.config, self.targets, device="meta")
        for name, tensor in self.tensors.items():
            tensor = tensor.detach().to(device, copy=True)
            setattr(adapter, name, nn.Parameter(tensor) if name in adapter._parameters else tensor)
        return adapter

    def write_over(self, adapter: Adapter) -> None:
        for name, tensor in _tensors_of(adapter).items():
            tensor.copy_(shard_like(self.tensors[name], tensor))

    def _reordered(self, targets: tuple[Target, ...], order: list[int]) -> Self:
        tensors = dict(self.tensors)
        for name, sizes in self._part_sizes().items():
            parts = tensors[name].split(sizes)
            tensors[name] = torch.cat([parts[place] for place in order])
        return replace(self, targets=targets, tensors=tensors)

    def encode(self, form: str, bank_dtype: torch.dtype | None, bank_file: BankFile | None) -> dict[str, Tensor]:
        if bank_dtype is not None:
            raise ValueError(
                f"`bank_dtype` is {bank_dtype}, but the adapter is not VB-LoRA, so it has no bank. Leave it out."
            )
        return dict(self.tensors)

    @classmethod
    def decode(
        cls,
        config: AdapterConfig,
        targets: tuple[Target, ...],
        tensors: dict[str, Tensor],
        form: str,
        bank: Tensor | None,
        extra_parameters: dict[str, Tensor],
    ) -> Self:
        return cls(config, targets, tensors, extra_parameters=extra_parameters)


@dataclass(frozen=True)
class LoRAContents(FlatContents):
    """``tensors``: ``factors``."""

    config: LoraConfig

    def _part_sizes(self) -> dict[str, list[int]]:
        return LoRAAdapter.parts(self.targets, self.config.r)


@dataclass(frozen=True)
class TiedLoRAContents(FlatContents):
    """``tensors``: ``A``, ``B``, ``u`` and ``v``."""

    config: TiedLoraConfig

    def _part_sizes(self) -> dict[str, list[int]]:
        return TiedLoRAAdapter.parts(self.targets, self.config.r)


def _tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    return dict(adapter.named_parameters()) | dict(adapter.named_buffers())
