"""Tried here, not in the library: sub-vectors with factors, and a small trained matrix that is added to a frozen bank."""

import torch
from torch import Tensor, nn

import vblora
from vblora import ops
from vblora.adapters import Factors, VBLoRAAdapter
from vblora.adapters.vblora import Deployed, as_factors
from vblora.bank import VectorBank

from .variants import Variant


class TriedAdapter(VBLoRAAdapter):
    """Attributes:
    scale: parameter ``(S,)``, a factor of each sub-vector, or None.
    delta: two parameters whose product is added to the bank, or None.
    """

    scale: nn.Parameter | None
    delta: nn.ParameterList | None

    def _bank(self) -> Tensor:
        bank: Tensor = self.bank.vectors
        return bank if self.delta is None else bank + self.delta[0] @ self.delta[1]

    def compose(self, dtype: torch.dtype, index: int | None = None) -> list[Factors]:
        assert index is None  # nothing is recomputed here
        subvectors = torch.ops.vblora.admixture(self.logits, self._bank(), self.candidates, self.topk)[0]
        if self.scale is not None:
            subvectors = subvectors * self.scale[:, None]
        return as_factors(ops.in_parts(subvectors.to(dtype), self._rows, self.r), self.targets)

    @torch.no_grad()
    def deployed(self) -> Deployed:
        """What inference needs. A factor goes into the weights, so it takes no space."""
        _, columns, weights = torch.ops.vblora.admixture(self.logits, self._bank(), self.candidates, self.topk)
        indices = columns if self.candidates is None else self.candidates.gather(1, columns.long())
        return Deployed(indices, weights if self.scale is None else weights * self.scale[:, None])


def adapt(
    model: nn.Module,
    variant: Variant,
    seed: int,
    bank: VectorBank,
    *,
    train_bank: bool,
    start: dict[str, Tensor] | None,
) -> list[dict]:
    """Gives the model an adapter and returns the optimizer's groups, without the bank's."""
    config = vblora.VBLoRAConfig(
        r=variant.r,
        num_vectors=bank.num_vectors,
        vector_length=bank.vector_length,
        topk=variant.topk,
        seed=seed,
        target_modules="all-linear",
        modules_to_save=["classifier"],
    )
    vblora.inject(model, config, bank=bank, freeze_bank=not train_bank)
    adapter = model.vblora["default"]
    adapter.__class__ = TriedAdapter  # its parameters are those of the library's adapter, and these:
    adapter.scale = adapter.delta = None
    if start is not None:
        adapter.logits.data.copy_(start["logits"])
        if adapter.candidates is not None:
            adapter.candidates.copy_(start["candidates"])
    groups = [{"params": [adapter.logits], "lr": variant.lr_logits}]
    if variant.scale:
        of_b = torch.arange(len(adapter._rows)).remainder(2).repeat_interleave(torch.tensor(adapter._rows))
        adapter.scale = nn.Parameter(1.0 - of_b if start is None else torch.ones(len(of_b)))
        groups.append({"params": [adapter.scale], "lr": variant.lr_scale})
    if variant.delta:
        sides = torch.zeros(bank.num_vectors, variant.delta), torch.randn(variant.delta, bank.vector_length)
        adapter.delta = nn.ParameterList([sides[0], sides[1] / variant.delta**0.5])
        groups.append({"params": list(adapter.delta), "lr": variant.lr_delta})
    head = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" in name]
    return [*groups, {"params": head, "lr": variant.lr_head}]
