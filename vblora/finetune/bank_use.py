"""How an adapter uses its bank: numbers for pictures and JSON."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.vblora_rows import Trained
from ..checkpoint.vblora import VBLoRAContents


@dataclass
class BankUse:
    """Of an adapter with h bank vectors, S sub-vectors of k each, and L layers.

    Attributes:
        counts: h numbers, how many sub-vectors have a vector among their k.
        depths: S numbers, how far down its candidates each sub-vector came: the number of its logits, in the order of their
            initial values, up to the last that training changed. None for an adapter without logits or seed.
        candidates: M, the largest depth that is possible.
        entropies: S numbers from 0 (one vector has all the weight) to 1 (all k have the same).
        layers: L names.
        sharing: L × L numbers from 0 to 1, the cosine of how much weight two layers give to each vector.
    """

    counts: list[int]
    depths: list[int] | None
    candidates: int
    entropies: list[float]
    layers: list[str]
    sharing: list[list[float]]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """A few numbers of it."""
        counts = torch.tensor(self.counts)
        numbers: dict[str, Any] = {
            "vectors": len(self.counts),
            "vectors_used": int((counts > 0).sum()),
            "most_used": int(counts.max()),
            "mean_entropy": float(torch.tensor(self.entropies).mean()),
        }
        if self.depths is not None:
            depths = torch.tensor(self.depths, dtype=torch.float32)
            numbers |= {"candidates": self.candidates, "mean_depth": float(depths.mean()), "deepest": int(depths.max())}
        return numbers


def bank_use(contents: VBLoRAContents) -> BankUse:
    deployed = contents.deployed()
    indices, weights = deployed.indices.long(), deployed.weights.float()
    vectors = len(contents.bank)
    sizes = contents.sizes
    per_layer = [a + b for a, b in zip(sizes[::2], sizes[1::2], strict=True)]
    layer = torch.arange(len(per_layer)).repeat_interleave(torch.tensor(per_layer))
    use = torch.zeros(len(per_layer), vectors)
    use.index_put_((layer[:, None].expand_as(indices), indices), weights.abs(), accumulate=True)
    use = torch.nn.functional.normalize(use, dim=1)
    depths = _depths(contents)
    return BankUse(
        counts=torch.bincount(indices.flatten(), minlength=vectors).tolist(),
        depths=None if depths is None else depths.tolist(),
        candidates=contents.num_columns,
        entropies=_entropies(weights).tolist(),
        layers=[target.name for target in contents.targets],
        sharing=(use @ use.T).tolist(),
    )


def _entropies(weights: Tensor) -> Tensor:
    k = weights.shape[1]
    if k == 1:
        return weights.new_zeros(len(weights))
    shares = torch.nn.functional.normalize(weights.abs(), p=1, dim=1)  # without the sub-vector's scale
    return torch.special.entr(shares).sum(1) / torch.log(torch.tensor(float(k)))


def _depths(contents: VBLoRAContents) -> Tensor | None:
    rows = contents.rows
    if not isinstance(rows, Trained) or rows.seed is None:
        return None
    initial, candidates = contents.initial(rows.seed)
    values = rows.logits if rows.candidates is not None else rows.logits.gather(1, candidates.long())
    changed = values != initial.logits[:, : values.shape[1]]
    places = torch.arange(1, values.shape[1] + 1)
    return (changed * places).amax(1)
