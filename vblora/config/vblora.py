"""VB-LoRA's config."""

from dataclasses import dataclass, field

from ..checks import check_count, check_not_negative, check_seed
from .base import AdapterConfig
from .default_targets import FOR_VBLORA
from .peft_fields import accepts_peft_fields

# Fields that PEFT's VBLoRAConfig lacks.
BEYOND_PEFT = frozenset({"init", "num_candidates", "pad", "scaling", "seed", "train_scales"})


@accepts_peft_fields()
@dataclass
class VBLoRAConfig(AdapterConfig):
    """A VB-LoRA adapter (arXiv 2405.15179). Names and defaults are those of PEFT's ``VBLoRAConfig``. It also has the
    fields of :class:`AdapterConfig`.

    Args:
        r: rank of each layer's update.
        num_vectors: h, the number of vectors in the bank.
        vector_length: b, the length of a bank vector. It must divide ``in_features`` and ``out_features`` of each target,
            unless ``pad`` is True.
        topk: k, the number of bank vectors mixed into each sub-vector. 2 is best in the paper (table 5). With 1, the logits get
            no gradient.
        vblora_dropout: dropout probability of the update's input during training.
        init_vector_bank_bound: the bank is initialized uniformly in ``[-bound, bound]``.
        init_logits_std: standard deviation of the initial logits, which are normal.
        init: ``"paper"``, or ``"noop"``, which makes the first forward equal the base model's exactly while bank and logits
            still get gradients: the bank starts as pairs ``v, -v``, and each sub-vector of B mixes both of a pair equally.
            ``"noop"`` requires ``topk=2``.
        scaling: multiplies every update; 1 in the paper.
        train_scales: also train a scale for each sub-vector: a number that multiplies it, and may be negative. It starts at 1
            for A and at 0 for B, so the first forward equals the base model's exactly. Use it with a frozen bank, whose vectors
            cannot grow. In the deploy form, scales are part of the weights and take no space. PEFT's VB-LoRA formats cannot
            store them.
        pad: allow any ``vector_length``. Each rank then uses enough sub-vectors to cover the layer's width, and the excess of
            the last one is cut off. It has no effect if ``vector_length`` divides every width; otherwise PEFT's VB-LoRA formats
            cannot store the adapter.
        num_candidates: M, the number of bank vectors that a sub-vector can choose from during training: those with its M
            largest initial logits. Logits take M / h of the memory. Training gives the same result as with all h logits until a
            sub-vector has used up its candidates; :func:`vblora.stats` counts those that have. None, or ``num_vectors``, keeps
            all h logits, as in the paper.
        seed: seed of the initial logits, a signed 64-bit integer. None draws one from torch's generator (set it with
            ``torch.manual_seed``), and the adapter stores it. Set it if several processes train together.
        save_only_topk_weights: make ``"deploy"`` the default form of :func:`vblora.save`.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has the wrong type.
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
    train_scales: bool = False
    pad: bool = False
    num_candidates: int | None = 128
    seed: int | None = None
    save_only_topk_weights: bool = field(default=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_vectors", "vector_length", "topk"):
            check_count(name, getattr(self, name))
        self._check_numbers("init_vector_bank_bound", "scaling")
        self.init_logits_std = check_not_negative("init_logits_std", self.init_logits_std)
        if self.topk > self.num_vectors:
            raise ValueError(f"`topk` is {self.topk}, but must be at most `num_vectors`, {self.num_vectors}.")
        if self.num_candidates is not None:
            check_count("num_candidates", self.num_candidates)
            if self.num_candidates < self.topk:
                raise ValueError(
                    f"`num_candidates` is {self.num_candidates}, but must be at least `topk`, {self.topk}."
                )
        if self.seed is not None:
            check_seed("seed", self.seed)
        self._check_positive("init_vector_bank_bound", "scaling")
        self._check_flags("pad", "save_only_topk_weights", "train_scales")
        check_start(self.init, self.train_scales)


def check_start(init: str, train_scales: bool) -> None:
    """Refuses an unknown ``init``, and two reasons for the first update to be 0: together they make every gradient 0."""
    if init not in ("paper", "noop"):
        raise ValueError(f'`init` is {init!r}; allowed are "paper" and "noop".')
    if init == "noop" and train_scales:
        raise ValueError(
            '`init` is "noop" and `train_scales` is True. Each makes the first update 0, and together nothing would train. '
            "Choose one."
        )
