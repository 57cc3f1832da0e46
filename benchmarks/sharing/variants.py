"""What is compared: whose the bank is, and what a task trains beside it."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """How a task's adapter is made and trained.

    Attributes:
        bank: "own" trains with the adapter; "random" is drawn once and frozen; "shared" was trained on other tasks and is frozen.
        r, num_vectors, vector_length, topk: as in ``VBLoRAConfig``.
        bound: the bank's initial values are uniform up to it.
        scale: each sub-vector also trains a factor, which may be negative. It starts at 1 for A and at 0 for B.
        start: begin with the logits that the shared bank was trained with, instead of a draw.
        delta: rank of a trained matrix that is added to the frozen bank; 0 for none.
        int8: round the trained bank to int8, as ``vblora.save(..., bank_dtype=torch.int8)`` does.
    """

    bank: str = "own"
    r: int = 4
    num_vectors: int = 236
    vector_length: int = 128
    topk: int = 2
    bound: float = 0.02
    scale: bool = False
    start: bool = False
    delta: int = 0
    int8: bool = False
    lr_bank: float = 3e-3
    lr_logits: float = 0.5
    lr_scale: float = 0.2
    lr_delta: float = 3e-3
    lr_head: float = 2e-3

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_RANDOM = {"bank": "random", "num_vectors": 2048, "bound": 0.05}
VARIANTS = {
    "own": Variant(),
    "own, h=128, int8": Variant(num_vectors=128, int8=True),
    "own, h=32": Variant(num_vectors=32),
    "shared": Variant("shared"),
    "shared, scale": Variant("shared", scale=True),
    "shared, scale, start": Variant("shared", scale=True, start=True, lr_scale=0.1, lr_logits=0.1),
    "random": Variant(**_RANDOM),
    "random, scale": Variant(**_RANDOM, scale=True),
    "random, scale, r=16, k=1": Variant(**_RANDOM, scale=True, r=16, topk=1, lr_scale=0.1),
}
