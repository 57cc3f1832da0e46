"""The contents of an adapter whose parameters are what a file holds: VeRA, Tied-LoRA, LoRA."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..adapters import Adapter, Target
from ..adapters.base import Factors
from ..adapters.registry import adapter_class
from ..adapters.vera import draw_projection
from ..bank import VectorBank
from ..config import AdapterConfig, VeraConfig
from ..distributed import gather_to_cpu, shard_like
from .contents import Contents, check_tensor


@dataclass(frozen=True)
class FlatContents(Contents):
    """``tensors``: the adapter's parameters and buffers by their names there, VeRA's projections among them."""

    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, config: AdapterConfig, adapter: Adapter, extra_parameters: dict[str, Tensor]) -> "FlatContents":
        return cls(
            config,
            adapter.targets,
            {name: gather_to_cpu(x) for name, x in _tensors_of(adapter).items()},
            extra_parameters=extra_parameters,
        )

    def check(self) -> None:
        self.check_layout()
        try:
            wanted = _tensors_of(adapter_class(self.config).from_config(self.config, self.targets, device="meta"))
        except (RuntimeError, TypeError, OverflowError):
            raise ValueError(f"its `r` is {self.config.r}: no tensors of such sizes can be made.") from None
        for name in sorted(wanted.keys() ^ self.tensors.keys()):
            raise ValueError(f"it {'lacks' if name in wanted else 'has an unknown'} tensor `{name}`.")
        for name, tensor in self.tensors.items():
            check_tensor(name, tensor, tuple(wanted[name].shape), floating=True)
            if not tensor.isfinite().all():
                raise ValueError(f"`{name}` holds an infinite or NaN element.")

    def all_factors(self, dtype: torch.dtype) -> Iterator[tuple[Target, Factors]]:
        with torch.no_grad():
            yield from zip(self.targets, self.adapter().compose(dtype), strict=True)

    def adapter(self, device: torch.device | str | None = None, bank: VectorBank | None = None) -> Adapter:
        adapter = adapter_class(self.config).from_config(self.config, self.targets, device="meta")
        for name, tensor in self.tensors.items():
            tensor = tensor.detach().to(device, copy=True)
            setattr(adapter, name, nn.Parameter(tensor) if name in adapter._parameters else tensor)
        return adapter

    def check_sizes(self, other: "FlatContents") -> None:
        for name, tensor in self.tensors.items():
            if tensor.shape != other.tensors[name].shape:
                raise ValueError(f"`model` has an adapter with other `{name}`. Eject it first.")

    def write_over(self, adapter: Adapter) -> None:
        for name, tensor in _tensors_of(adapter).items():
            tensor.copy_(shard_like(self.tensors[name], tensor))

    def _reordered(self, targets: tuple[Target, ...], order: list[int]) -> "FlatContents":
        kind = adapter_class(self.config)
        tensors = dict(self.tensors)
        for name, sizes in kind.parts(self.targets, self.config.r).items():
            parts = tensors[name].split(sizes)
            tensors[name] = torch.cat([parts[place] for place in order])
        return replace(self, targets=targets, tensors=tensors)

    def stored(self) -> dict[str, Tensor]:
        """The tensors that a file has to hold: without a projection that its key draws again, if that is wanted."""
        if not isinstance(self.config, VeraConfig) or self.config.save_projection or not self._is_drawn():
            return self.tensors
        return {name: tensor for name, tensor in self.tensors.items() if name not in ("A", "B")}

    def _is_drawn(self) -> bool:
        drawn = draw_projection(
            self.targets,
            self.config.r,
            self.config.projection_prng_key,
            device=self.tensors["A"].device,
            dtype=torch.float32,
        )
        return all(map(torch.equal, drawn, (self.tensors["A"], self.tensors["B"])))


def with_projection(
    config: AdapterConfig, targets: tuple[Target, ...], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What :meth:`FlatContents.stored` was of."""
    if not isinstance(config, VeraConfig) or "A" in tensors or "B" in tensors:
        return tensors
    check_tensor(
        "d", tensors.get("d", torch.empty(0)), (len(targets), config.r), floating=True
    )  # before so much is drawn
    drawn = draw_projection(targets, config.r, config.projection_prng_key, device="cpu", dtype=torch.float32)
    return dict(zip("AB", drawn, strict=True)) | tensors


def _tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    return dict(adapter.named_parameters()) | dict(adapter.named_buffers())
