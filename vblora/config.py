"""What a user chooses, in PEFT's field names."""

import numbers
import re
from dataclasses import asdict, dataclass, fields

from .bank import check_count

# Fields that PEFT writes beside a method's own and that say nothing about the adapter itself.
PEFT_METADATA = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    }
)
# Fields of ours that PEFT does not have.
BEYOND_PEFT = frozenset({"init", "num_candidates", "pad", "scaling", "seed"})


@dataclass
class VBLoRAConfig:
    """A VB-LoRA adapter (arXiv 2405.15179). Names and defaults are those of PEFT's ``VBLoRAConfig``.

    Args:
        r: rank of each layer's update.
        num_vectors: h, vectors in the bank.
        vector_length: b, elements of a bank vector; must divide ``in_features`` and ``out_features`` of each target, unless
            ``pad``.
        topk: k, bank vectors mixed into a sub-vector. The paper and we recommend 2.
        target_modules: layers to adapt. A list matches a module's name or its ending after a dot, a string is a regular
            expression for the whole name, ``"all-linear"`` means all but the output layer. None takes the default of the
            model's architecture.
        exclude_modules: layers to leave out, a list or a regular expression as above.
        layers_to_transform: only layers of these indices (with ``target_modules`` a list or ``"all-linear"``).
        layers_pattern: name of the list that these indices count, such as ``"layers"`` or ``"h"``.
        fan_in_fan_out: for PEFT's files only: how a target stores its weight is seen from its type.
        vblora_dropout: probability of dropping an element of the update's input while training.
        bias: biases to train: ``"none"``, ``"all"`` of the model, or ``"vblora_only"`` of the targets.
        modules_to_save: other modules to train in full and to save, such as a classification head.
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

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    fan_in_fan_out: bool = False
    vblora_dropout: float = 0.0
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1
    init: str = "paper"
    scaling: float = 1.0
    pad: bool = False
    num_candidates: int | None = 128
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("r", "num_vectors", "vector_length", "topk"):
            check_count(name, getattr(self, name))
        for name in ("vblora_dropout", "init_vector_bank_bound", "init_logits_std", "scaling"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                raise TypeError(f"`{name}` is {value!r}, but must be a number.")
            setattr(self, name, float(value))
        if self.topk > self.num_vectors:
            raise ValueError(f"`topk` is {self.topk}, but must be at most `num_vectors`, {self.num_vectors}.")
        if self.num_candidates is not None:
            check_count("num_candidates", self.num_candidates)
            if self.num_candidates < self.topk:
                raise ValueError(
                    f"`num_candidates` is {self.num_candidates}, but must be at least `topk`, {self.topk}."
                )
        if self.seed is not None:
            if not isinstance(self.seed, int) or isinstance(self.seed, bool):
                raise TypeError(f"`seed` is {self.seed!r}, but must be an integer.")
            if not -(2**63) <= self.seed < 2**63:
                raise ValueError(f"`seed` is {self.seed}, but must be a signed 64-bit integer.")
        if not 0.0 <= self.vblora_dropout < 1.0:
            raise ValueError(f"`vblora_dropout` is {self.vblora_dropout}, but must be at least 0 and below 1.")
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
        if self.bias not in ("none", "all", "vblora_only"):
            raise ValueError(f'`bias` is {self.bias!r}; allowed are "none", "all" and "vblora_only".')
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple, set)) and all(isinstance(item, str) for item in value):
                setattr(self, name, sorted(value) if isinstance(value, set) else list(value))
            elif value is not None and not isinstance(value, str):
                raise TypeError(f"`{name}` is {value!r}, but must be a list of strings or a string.")
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"`modules_to_save` is {self.modules_to_save!r}, but must be a list of names.")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    re.compile(value)
                except re.error as error:
                    raise ValueError(f"`{name}` is {value!r}, which is no regular expression: {error}.") from None
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` was given, but not `layers_to_transform`, whose indices it is about.")
        layers = self.layers_to_transform
        if layers is not None:
            indices = list(layers) if isinstance(layers, (list, tuple, set, range)) else [layers]
            if not all(type(index) is int for index in indices):
                raise TypeError(f"`layers_to_transform` is {layers!r}, but must be an integer or a list of them.")
            self.layers_to_transform = layers if isinstance(layers, int) else indices
        by_regex = isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear"
        if self.layers_to_transform is not None and by_regex:
            raise ValueError("`layers_to_transform` needs `target_modules` as a list; put the indices into the regex.")

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "VBLoRAConfig":
        """The config that ``values`` describe.

        Raises:
            ValueError: a field that we do not know, which may change what the adapter means.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known - PEFT_METADATA)
        if unknown:
            raise ValueError(f"unknown config field `{unknown[0]}`; known are {', '.join(sorted(known))}.")
        return cls(**{name: value for name, value in values.items() if name in known})
