"""What every method's config has: which layers, and what trains beside them."""

import numbers
import re
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, Self

from ..checks import check_count
from .default_targets import FOR_OTHERS

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


@dataclass(kw_only=True)
class AdapterConfig:
    """The fields that all methods share. Use one of the subclasses, each of which also has a rank ``r`` and a dropout.

    Args:
        target_modules: layers to adapt. A list matches a module's name or its ending after a dot, a string is a regular
            expression for the whole name, ``"all-linear"`` means all but the output layer, and but those that
            cannot be adapted, which a warning names. None takes the default of the model's architecture.
        exclude_modules: layers to leave out, a list or a regular expression as above.
        layers_to_transform: only layers of these indices (with ``target_modules`` a list or ``"all-linear"``).
        layers_pattern: name of the list that these indices count, such as ``"layers"`` or ``"h"``.
        fan_in_fan_out: for PEFT's files only: how a target stores its weight is seen from its type.
        bias: biases to train: ``"none"``, ``"all"`` of the model, or those of the targets, which is ``"vblora_only"``,
            ``"vera_only"``, ``"tied_lora_only"`` or ``"lora_only"``.
        modules_to_save: other modules to train in full and to save, such as a classification head.

    Raises:
        ValueError: a value out of range, named.
        TypeError: a value of the wrong type, named.
    """

    method: ClassVar[str]  # as it begins the names of the dropout and of what `bias` may be
    peft_type: ClassVar[str | None] = None  # of PEFT's configs of the same method

    default_targets: ClassVar[dict[str, list[str]]] = FOR_OTHERS

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        check_count("r", self.r)
        dropout = f"{self.method}_dropout"
        self._check_numbers(dropout)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"`{dropout}` is {self.dropout}, but must be at least 0 and below 1.")
        if self.bias not in ("none", "all", self._own_biases):
            raise ValueError(f'`bias` is {self.bias!r}; allowed are "none", "all" and "{self._own_biases}".')
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

    @property
    def dropout(self) -> float:
        """Probability of dropping an element of an update's input while training."""
        return getattr(self, f"{self.method}_dropout")

    @property
    def trains_biases_of_targets(self) -> bool:
        """Whether those train and no others."""
        return self.bias == self._own_biases

    @property
    def _own_biases(self) -> str:
        return f"{self.method}_only"

    def _check_numbers(self, *names: str) -> None:
        """Makes them floats."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                raise TypeError(f"`{name}` is {value!r}, but must be a number.")
            setattr(self, name, float(value))

    def _check_seed(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"`{name}` is {value!r}, but must be an integer.")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"`{name}` is {value}, but must be a signed 64-bit integer.")

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        """The config that ``values`` describe.

        Raises:
            ValueError: a field that we do not know, which may change what the adapter means.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known - PEFT_METADATA)
        if unknown:
            raise ValueError(f"unknown config field `{unknown[0]}`; known are {', '.join(sorted(known))}.")
        return cls(**{name: value for name, value in values.items() if name in known})
