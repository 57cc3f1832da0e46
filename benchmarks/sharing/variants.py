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
        int8: round the trained bank to int8, as ``vblora.save(..., bank_dtype=torch.int8)`` does.
    """

    bank: str = "own"
    r: int = 4
    num_vectors: int = 236
    vector_length: int = 128
    topk: int = 2
    bound: float = 0.02
    train_scales: bool = False
    int8: bool = False
    lr_bank: float = 3e-3
    lr_logits: float = 0.5
    lr_scales: float | None = None
    lr_head: float = 2e-3

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_RANDOM = {"bank": "random", "num_vectors": 2048, "bound": 0.05}
VARIANTS = {
    "own": Variant(),
    "own, scales": Variant(train_scales=True),
    "own, h=150, int8": Variant(num_vectors=150, int8=True),
    "own, h=150, int8, scales": Variant(num_vectors=150, int8=True, train_scales=True),
    "own, h=32": Variant(num_vectors=32),
    "shared": Variant("shared"),
    "shared, scales": Variant("shared", train_scales=True),
    "random": Variant(**_RANDOM),
    "random, scales": Variant(**_RANDOM, train_scales=True),
    "random, scales, b=32, k=1": Variant(**_RANDOM, vector_length=32, topk=1, train_scales=True),
    "random, scales, r=16, k=1": Variant(**_RANDOM, r=16, topk=1, train_scales=True, lr_scales=0.1),
}
