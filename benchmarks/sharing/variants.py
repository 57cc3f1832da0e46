"""What is compared: whose the bank is, and what a task trains beside it."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """How a task's adapter is made and trained.

    Attributes:
        bank: "own" trains with the adapter; "random" is drawn once and frozen; "shared" was trained on other tasks and is frozen.
        r, num_vectors, vector_length, topk, train_scales: as in ``VBLoRAConfig``.
        bound: the bank's initial values are uniform up to it.
        start: begin with the logits that the shared bank was trained with, instead of a draw.
        int8: round the trained bank to int8, as ``vblora.save(..., bank_dtype=torch.int8)`` does.
    """

    bank: str = "own"
    r: int = 4
    num_vectors: int = 236
    vector_length: int = 128
    topk: int = 2
    bound: float = 0.02
    train_scales: bool = False
    start: bool = False
    int8: bool = False
    lr_bank: float = 3e-3
    lr_logits: float = 0.5
    lr_scales: float = 0.2
    lr_head: float = 2e-3

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_RANDOM = {"bank": "random", "num_vectors": 2048, "bound": 0.05}
VARIANTS = {
    "own": Variant(),
    "own, scales": Variant(train_scales=True),
    "own, h=128, int8": Variant(num_vectors=128, int8=True),
    "own, h=128, int8, scales": Variant(num_vectors=128, int8=True, train_scales=True),
    "own, h=64, int8, scales": Variant(num_vectors=64, int8=True, train_scales=True),
    "own, h=32": Variant(num_vectors=32),
    "own, h=32, scales": Variant(num_vectors=32, train_scales=True),
    "shared": Variant("shared"),
    "shared, scales": Variant("shared", train_scales=True),
    "shared, scales, start": Variant("shared", train_scales=True, start=True, lr_scales=0.1, lr_logits=0.1),
    "random": Variant(**_RANDOM),
    "random, scales": Variant(**_RANDOM, train_scales=True),
    "random, scales, b=32, k=1": Variant(**_RANDOM, vector_length=32, topk=1, train_scales=True),
    "random, scales, r=16, k=1": Variant(**_RANDOM, r=16, topk=1, train_scales=True, lr_scales=0.1),
}
