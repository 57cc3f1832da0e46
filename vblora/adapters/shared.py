"""The common base of VeRA and Tied-LoRA: one pair of projections for all layers, and two vectors per layer."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..checks import check_count
from ..distributed import gather
from .base import Adapter, Factors, Target


class SharedPairAdapter(Adapter):
    """``A`` ``(r, in)`` and ``B`` ``(r, out)`` of the largest widths. Each layer uses views of their first columns.

    Each layer also has two vectors: one scales its ranks, the other its outputs. A subclass registers A and B, as parameters or
    buffers, and the vectors under the names in ``VECTORS``.
    """

    VECTORS: tuple[str, str]
    A: Tensor
    B: Tensor

    def __init__(self, targets: Sequence[Target], r: int) -> None:
        super().__init__(targets)
        check_count("r", r)
        self.r = r
        self._widths = [target.out_features for target in self.targets]
        self._starts = [0, *itertools.accumulate(self._widths)]

    @classmethod
    def parts(cls, targets: Sequence[Target], r: int) -> dict[str, list[int]]:
        """For each tensor that is split by target along its first dimension, the size of each part."""
        return {cls.VECTORS[0]: [1] * len(targets), cls.VECTORS[1]: [target.out_features for target in targets]}

    @staticmethod
    def pair_sizes(targets: Sequence[Target], r: int) -> dict[str, tuple[int, int]]:
        return {"A": (r, max(t.in_features for t in targets)), "B": (r, max(t.out_features for t in targets))}

    def pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` in ``dtype``."""
        return gather(self.A).to(dtype), gather(self.B).to(dtype)

    def _register_vectors(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        for name, size in zip(self.VECTORS, ((len(self.targets), self.r), (sum(self._widths),)), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(size, device=device, dtype=dtype)))

    def compose(self, dtype: torch.dtype, span: range | None = None) -> list[Factors]:
        A, B = self.pair(dtype)
        d, e = (gather(getattr(self, name)) for name in self.VECTORS)
        targets, widths = self.targets, self._widths
        if span is not None:
            targets, widths = targets[span.start : span.stop], widths[span.start : span.stop]
            d, e = d[span.start : span.stop], e.narrow(0, self._starts[span.start], sum(widths))
        ds, es = d.to(dtype).unbind(), e.to(dtype).split_with_sizes(widths)
        # One view per width, not per layer: if the pair trains, the gradient of each view is as large as the pair.
        of_width: dict[tuple[str, int], Tensor] = {}
        for target in targets:
            for name, tensor, width in (("A", A, target.in_features), ("B", B, target.out_features)):
                if (name, width) not in of_width:
                    of_width[name, width] = tensor if width == tensor.shape[1] else tensor.narrow(1, 0, width)
        return [
            Factors(of_width["A", target.in_features], of_width["B", target.out_features], d, e)
            for target, d, e in zip(targets, ds, es, strict=True)
        ]

    def groups(self) -> dict[str, list[nn.Parameter]]:
        vectors = [getattr(self, name) for name in self.VECTORS]
        return {"factors": [p for p in (self.A, self.B) if isinstance(p, nn.Parameter)], "vectors": vectors}

    def extra_repr(self) -> str:
        return f"r={self.r}, targets={len(self.targets)}"
