"""Tied-LoRA: one trained pair of projections for all layers, and two trained vectors per layer (arXiv 2311.09578)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ..config import TiedLoraConfig
from ..distributed import gather
from .base import Target
from .shared import SharedPairAdapter
from .state import as_float, as_integer


class TiedLoRAAdapter(SharedPairAdapter):
    """One Tied-LoRA adapter of one model: each layer's update is ``(((x Aᵀ) ∘ u) B) ∘ v``, and all four train (vBuA).

    A starts uniform within Kaiming's bound, sqrt(6 / in); B starts as zeros, u and v as ones.

    Args:
        targets: the layers.
        r: rank.
        scaling: factor of every update.
        device, dtype: of the parameters.

    Attributes:
        A, B: parameters ``(r, in)``, ``(r, out)`` of the largest widths.
        u: parameter ``(layers, r)``.
        v: parameter, the ``out_features`` of each layer in turn.
    """

    VECTORS = ("u", "v")
    RATES: ClassVar = {
        "default": {"factors": 1.5e-3, "vectors": 3e-2},
        "language": {"factors": 3e-3, "vectors": 3e-2},
    }
    FALLS: ClassVar = {"factors": 1.0, "vectors": 1.0}
    u: nn.Parameter
    v: nn.Parameter

    def __init__(
        self,
        targets: Sequence[Target],
        *,
        r: int = 8,
        scaling: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(targets, r)
        self.scaling = scaling
        for name, size in self.pair_sizes(targets, r).items():
            self.register_parameter(name, nn.Parameter(torch.empty(size, device=device, dtype=dtype)))
        self._register_vectors(device, dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws A again, from torch's generator, and resets the others."""
        bound = math.sqrt(6 / self.A.shape[1])
        if not self.A.is_meta:
            self.A.uniform_(-bound, bound)
        self.B.zero_()
        self.u.fill_(1.0)
        self.v.fill_(1.0)

    @classmethod
    def from_config(
        cls, config: TiedLoraConfig, targets: Sequence[Target], *, device: torch.device | str | None = None
    ) -> Self:
        return cls(targets, r=config.r, scaling=config.scaling, device=device, dtype=torch.float32)

    def current_config(self, config: TiedLoraConfig) -> TiedLoraConfig:
        return replace(config, lora_alpha=config.lora_alpha * (self.scaling / config.scaling))

    def settings(self) -> list[int]:
        return [as_integer(self.scaling)]

    def set_settings(self, settings: Sequence[int]) -> None:
        self.scaling = as_float(settings[0])

    def pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        B = gather(self.B)
        return gather(self.A).to(dtype), (B if self.scaling == 1.0 else B * self.scaling).to(dtype)
