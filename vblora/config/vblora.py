"""VB-LoRA's config."""

from dataclasses import dataclass

from ..checks import check_count
from .base import AdapterConfig
from .default_targets import FOR_VBLORA

# Fields of ours that PEFT does not have.
BEYOND_PEFT = frozenset({"init", "num_candidates", "pad", "scaling", "seed"})


@dataclass
class VBLoRAConfig(AdapterConfig):
    """A VB-LoRA adapter (arXiv 2405.15179). Names and defaults are those of PEFT's ``VBLoRAConfig``. It also has the fields of
    :class:`AdapterConfig`: which layers, and what trains beside them.

    Args:
        r: rank of each layer's update.
        num_vectors: h, vectors in the bank.
        vector_length: b, elements of a bank vector; must divide ``in_features`` and ``out_features`` of each target, unless
            ``pad``.
        topk: k, bank vectors mixed into a sub-vector. The paper and we recommend 2.
        vblora_dropout: probability of dropping an element of the update's input while training.
        init_vector_bank_bound: the bank starts uniform in ``[-bound, bound]``.
        init_logits_std: logits start normal with this standard deviation.
        init: ``"paper"``, or ``"noop"``: the first forward is exactly the base model's, and bank and logits have gradients all
            the same. Bank vectors start as pairs, each the other's negative, and B's sub-vectors as one half of each of a pair.
            For ``topk=2``.
        scaling: factor of every update; 1 is the paper's.
        pad: let ``vector_length`` be any. A rank then takes as many sub-vectors as reach the layer's width, and of the last one
            what goes beyond is cut off. It costs as much as a whole one. Where every width is divided this changes nothing;
            otherwise PEFT's format cannot express it.
        num_candidates: M, bank vectors that a sub-vector may choose from while it trains: those of its M largest initial logits.
            Training is the same as with all of them until a row has used its candidates up, which
            :func:`vblora.stats` counts; it takes M / h of the memory. None, or as many as ``num_vectors``, is the paper's
            dense form.
        seed: of the initial logits, a signed 64-bit integer. None takes one from torch's generator, which
            ``torch.manual_seed`` sets; an adapter remembers which.

    Raises:
        ValueError: a value out of range, named.
        TypeError: a value of the wrong type, named.
    """

    method = "vblora"
    peft_type = "VBLORA"
    default_targets = FOR_VBLORA

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    vblora_dropout: float = 0.0
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1
    init: str = "paper"
    scaling: float = 1.0
    pad: bool = False
    num_candidates: int | None = 128
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_vectors", "vector_length", "topk"):
            check_count(name, getattr(self, name))
        self._check_numbers("init_vector_bank_bound", "init_logits_std", "scaling")
        if self.topk > self.num_vectors:
            raise ValueError(f"`topk` is {self.topk}, but must be at most `num_vectors`, {self.num_vectors}.")
        if self.num_candidates is not None:
            check_count("num_candidates", self.num_candidates)
            if self.num_candidates < self.topk:
                raise ValueError(
                    f"`num_candidates` is {self.num_candidates}, but must be at least `topk`, {self.topk}."
                )
        if self.seed is not None:
            self._check_seed("seed")
        if not self.init_vector_bank_bound > 0:
            raise ValueError(f"`init_vector_bank_bound` is {self.init_vector_bank_bound}, but must be above 0.")
        if not self.init_logits_std >= 0:
            raise ValueError(f"`init_logits_std` is {self.init_logits_std}, but must be at least 0.")
        if not 0 < self.scaling < float("inf"):
            raise ValueError(f"`scaling` is {self.scaling}, but must be above 0 and finite.")
        if not isinstance(self.pad, bool):
            raise TypeError(f"`pad` is {self.pad!r}, but must be True or False.")
        if self.init not in ("paper", "noop"):
            raise ValueError(f'`init` is {self.init!r}; allowed are "paper" and "noop".')
