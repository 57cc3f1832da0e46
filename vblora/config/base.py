"""The fields that every config has: which layers to adapt, and what to train in addition."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Self

from ..checks import check_count, check_flag, check_number, check_positive
from .default_targets import FOR_OTHERS
from .peft_fields import PEFT_METADATA

# Tasks of PEFT's `task_type`.
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclass(kw_only=True)
class AdapterConfig:
    """The fields that all methods share. Use one of the subclasses; each adds a dropout and the fields of its method.

    Args:
        target_modules: layers to adapt. A list matches full module names or their last components; a string is a regular
            expression for the full name; ``"all-linear"`` selects all linear layers except the output layer and, with a warning
            that names them, layers that cannot be adapted. None uses the default for the model's architecture.
        exclude_modules: layers to skip, as a list or a regular expression.
        layers_to_transform: adapt only layers with these indices. Requires ``target_modules`` to be a list or
            ``"all-linear"``.
        layers_pattern: name of the module list that the indices refer to, such as ``"layers"`` or ``"h"``.
        fan_in_fan_out: has no effect: the layer's type determines how it stores its weight. PEFT's files contain it.
        bias: which biases to train: ``"none"``, ``"all"``, or those of the target modules: ``"vblora_only"``,
            ``"vera_only"``, ``"tied_lora_only"`` or ``"lora_only"``.
        modules_to_save: other modules to train in full and save, such as a classification head.
        task_type: as in PEFT, ``"SEQ_CLS"``, ``"TOKEN_CLS"`` and ``"QUESTION_ANS"`` add the model's head to
            ``modules_to_save``. The others do nothing.
        inference_mode: freeze the adapter that :func:`vblora.inject` makes.
        r: rank of each layer's update.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has the wrong type.
    """

    method: ClassVar[str]  # prefix of the dropout's field name and of the `bias` option for targets
    peft_type: ClassVar[str | None] = None  # the method's name in PEFT's files; None if PEFT lacks the method

    default_targets: ClassVar[dict[str, list[str]]] = FOR_OTHERS

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    # These do not change what the adapter computes, so configs that differ in them are equal.
    task_type: str | None = field(default=None, compare=False, repr=False)
    inference_mode: bool = field(default=False, compare=False, repr=False)
    r: int

    def __post_init__(self) -> None:
        check_count("r", self.r)
        self._check_flags("inference_mode")
        self.task_type = getattr(self.task_type, "value", self.task_type)  # PEFT has an enum
        if self.task_type not in (None, *TASK_TYPES):
            raise ValueError(
                f"`task_type` is {self.task_type!r}; allowed are None, {', '.join(map(repr, TASK_TYPES))}."
            )
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
                    raise ValueError(
                        f"`{name}` is {value!r}, which is not a valid regular expression: {error}."
                    ) from None
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` requires `layers_to_transform`. Set both, or neither.")
        layers = self.layers_to_transform
        if layers is not None:
            indices = list(layers) if isinstance(layers, (list, tuple, set, range)) else [layers]
            if not all(type(index) is int for index in indices):
                raise TypeError(f"`layers_to_transform` is {layers!r}, but must be an integer or a list of them.")
            self.layers_to_transform = layers if isinstance(layers, int) else indices
        by_regex = isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear"
        if self.layers_to_transform is not None and by_regex:
            raise ValueError(
                f"`target_modules` is {self.target_modules!r}, but must be a list with `layers_to_transform`. "
                "Or leave `layers_to_transform` out and select the layers by the regular expression."
            )

    @property
    def dropout(self) -> float:
        """Dropout probability of each update's input during training."""
        return getattr(self, f"{self.method}_dropout")

    @property
    def trains_biases_of_targets(self) -> bool:
        """Whether to train the biases of the target modules, and no others."""
        return self.bias == self._own_biases

    @property
    def _own_biases(self) -> str:
        return f"{self.method}_only"

    def _check_numbers(self, *names: str) -> None:
        """Checks that these fields are numbers and converts them to float."""
        for name in names:
            setattr(self, name, check_number(name, getattr(self, name)))

    def _check_positive(self, *names: str) -> None:
        for name in names:
            check_positive(name, getattr(self, name))

    def _check_flags(self, *names: str) -> None:
        for name in names:
            check_flag(name, getattr(self, name))

    def to_dict(self) -> dict[str, Any]:
        """What files hold. ``inference_mode`` is a choice of the moment, so they lack it."""
        values = asdict(self)
        unset = [own.name for own in fields(self) if not own.compare and values[own.name] == own.default]
        return {name: value for name, value in values.items() if name not in (*unset, "inference_mode")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Creates the config from the output of :meth:`to_dict`; PEFT's metadata is ignored.

        Raises:
            ValueError: there is an unknown field, which might change what the adapter means.
        """
        known = {own.name for own in fields(cls)} - {"inference_mode"}
        unknown = sorted(set(values) - known - PEFT_METADATA - {"inference_mode"})
        if unknown:
            raise ValueError(f"unknown config field `{unknown[0]}`; allowed are {', '.join(sorted(known))}.")
        return cls(**{name: value for name, value in values.items() if name in known})
