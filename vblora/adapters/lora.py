"""LoRA: each layer has its own pair of factors (arXiv 2106.09685)."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ..checks import check_count
from ..config import LoraConfig
from ..distributed import gather
from .base import Adapter, Factors, Target
from .rows import rows_of
from .state import as_float, as_integer


class LoRAAdapter(Adapter):
    """One LoRA adapter of one model, with the factors of all layers in one tensor: one cast and one split per forward.

    Args:
        targets: the layers.
        r: rank of each layer's update.
        scaling: factor of every update, above 0. Its square root multiplies both factors.
        init: with True, A starts like the weight of ``nn.Linear`` and B as zeros; with ``"gaussian"``, A is normal with standard
            deviation ``1 / r`` and B zeros; with False, both start like ``nn.Linear``. For an embedding, A starts as zeros and B
            normal, or with False both normal.
        device, dtype: of the parameter.

    Attributes:
        factors: parameter, flat: A ``(r, in_features)`` and B ``(r, out_features)`` of each target in turn.
    """

    RATES: ClassVar = {"default": {"factors": 7e-4}, "language": {"factors": 4e-3}}
    FALLS: ClassVar = {"factors": 1.5}  # to 2.1e-4 at 4,096, near what is usual for models of 7B

    def __init__(
        self,
        targets: Sequence[Target],
        *,
        r: int = 8,
        scaling: float = 1.0,
        init: bool | str = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(targets)
        check_count("r", r)
        self.r = r
        self.scaling = scaling
        self.init = init
        self._sizes = [r * width for target in self.targets for width in (target.in_features, target.out_features)]
        self._starts = [0, *itertools.accumulate(self._sizes)][::2]
        self.factors = nn.Parameter(torch.empty(sum(self._sizes), device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def from_config(
        cls, config: LoraConfig, targets: Sequence[Target], *, device: torch.device | str | None = None
    ) -> Self:
        return cls(
            targets,
            r=config.r,
            scaling=config.scaling,
            init=config.init_lora_weights,
            device=device,
            dtype=torch.float32,
        )

    @staticmethod
    def parts(targets: Sequence[Target], r: int) -> dict[str, list[int]]:
        """For each tensor that is split by target along its first dimension, the size of each part."""
        return {"factors": [r * (target.in_features + target.out_features) for target in targets]}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the factors again, from torch's generator."""
        if self.factors.is_meta:
            return
        parts = self.factors.split_with_sizes(self._sizes)
        for target, A, B in zip(self.targets, parts[::2], parts[1::2], strict=True):
            if target.kind == "embedding":  # A is the table that is looked up
                A.normal_(std=0.0 if self.init else 1.0)
                B.normal_()
                continue
            if self.init == "gaussian":
                A.normal_(std=1 / self.r)
            else:
                bound = 1 / math.sqrt(target.in_features)
                A.uniform_(-bound, bound)
            bound = 0.0 if self.init else 1 / math.sqrt(self.r)
            B.uniform_(-bound, bound)

    def compose(self, dtype: torch.dtype, span: range | None = None) -> list[Factors]:
        factors, sizes = gather(self.factors), self._sizes
        if span is not None:
            sizes = sizes[2 * span.start : 2 * span.stop]
            factors = rows_of(factors, self._starts[span.start], sum(sizes))
        parts = _scaled(factors, self.scaling).to(dtype).split_with_sizes(sizes)
        return [Factors(a.view(self.r, -1), b.view(self.r, -1)) for a, b in zip(parts[::2], parts[1::2], strict=True)]

    def current_config(self, config: LoraConfig) -> LoraConfig:
        return replace(config, lora_alpha=config.lora_alpha * (self.scaling / config.scaling))

    def settings(self) -> list[int]:
        return [as_integer(self.scaling)]

    def set_settings(self, settings: Sequence[int]) -> None:
        self.scaling = as_float(settings[0])

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"factors": [self.factors]}

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling}, targets={len(self.targets)}"


def _scaled(factors: Tensor, scaling: float) -> Tensor:
    return factors if scaling == 1.0 else factors * math.sqrt(scaling)
