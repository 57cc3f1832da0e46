"""The contents of a VeRA adapter, whose projections need not be stored: their key draws them again."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..adapters import Target, VeRAAdapter
from ..adapters.vera import draw_projection
from ..bank import BankFile
from ..config import AdapterConfig, VeraConfig
from .contents import check_tensor
from .flat import FlatContents


@dataclass(frozen=True)
class VeRAContents(FlatContents):
    """``tensors``: ``d``, ``e``, and the projections ``A`` and ``B``."""

    config: VeraConfig

    def _part_sizes(self) -> dict[str, list[int]]:
        return VeRAAdapter.parts(self.targets, self.config.r)

    def encode(self, form: str, bank_dtype: torch.dtype | None, bank_file: BankFile | None) -> dict[str, Tensor]:
        tensors = super().encode(form, bank_dtype, bank_file)
        if not self.config.save_projection:
            drawn = _draw(self.config, self.targets, tensors["A"].device)
            if all(torch.equal(drawn[name], tensors[name]) for name in drawn):
                tensors = {name: tensor for name, tensor in tensors.items() if name not in drawn}
        return tensors

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
        assert isinstance(config, VeraConfig)
        contents = cls(config, targets, tensors, extra_parameters=extra_parameters)
        if "A" in tensors or "B" in tensors:
            return contents
        # Before the projections are drawn, as the sizes may be absurd.
        contents.check_layout()
        check_tensor("d", tensors.get("d", torch.empty(0)), (len(targets), config.r), floating=True)
        outputs = sum(target.out_features for target in targets)
        check_tensor("e", tensors.get("e", torch.empty(0)), (outputs,), floating=True)
        tensors = _draw(config, targets, torch.device("cpu")) | tensors
        return cls(config, targets, tensors, extra_parameters=extra_parameters)


def _draw(config: VeraConfig, targets: tuple[Target, ...], device: torch.device) -> dict[str, Tensor]:
    A, B = draw_projection(targets, config.r, config.projection_prng_key, device=device, dtype=torch.float32)
    return {"A": A, "B": B}
