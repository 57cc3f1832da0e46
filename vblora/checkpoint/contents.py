"""An adapter without a model: what every file format is read into and written from."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..adapters import Adapter, Factors, Target
from ..adapters.registry import adapter_class
from ..bank import BankFile, VectorBank
from ..config import AdapterConfig
from ..model.targets import is_within

# Fields that do not tell apart two adapters of the same layers: ways to select layers, hints for files, initialisation.
_IRRELEVANT_FIELDS = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "pad",
    "seed",
    "num_candidates",
    "save_projection",
    "d_initial",
    "init_weights",
    "init_lora_weights",
)


@dataclass(frozen=True)
class Contents(ABC):
    """An adapter of any method, without a model. Its tensors are on the CPU.

    Attributes:
        extra_parameters: tensors trained in addition to the adapter (biases, ``modules_to_save``), by their names in the model;
            and :attr:`base_tensors`.
    """

    config: AdapterConfig
    targets: tuple[Target, ...]
    extra_parameters: dict[str, Tensor] = field(default_factory=dict, kw_only=True)

    has_bank: ClassVar[bool] = False  # whether the method has a vector bank

    @classmethod
    @abstractmethod
    def of(cls, config: AdapterConfig, adapter: Adapter, extra_parameters: dict[str, Tensor]) -> Self:
        """The contents of a model's adapter. If it is sharded, all processes must call this."""

    @property
    def base_tensors(self) -> dict[str, Tensor]:
        """The extra parameters that the config does not train: the base model's own, as PEFT stores them of adapted or resized
        embeddings."""
        config, targets = self.config, {target.name for target in self.targets}
        saved = config.modules_to_save or []

        def trains(name: str) -> bool:
            module, _, own = name.rpartition(".")
            of_target = config.trains_biases_of_targets and module in targets
            return (own == "bias" and (config.bias == "all" or of_target)) or is_within(module, saved)

        return {name: tensor for name, tensor in self.extra_parameters.items() if not trains(name)}

    @property
    def is_trainable(self) -> bool:
        """Whether training can continue from these contents."""
        return True

    def as_trainable(self) -> Self:
        """The same contents in a form that can train."""
        return self

    def summary(self) -> str:
        """The sizes that a model card states."""
        return f"r={self.config.r}"

    # Checks

    def check_layout(self) -> None:
        """Checks the targets and the extra parameters.

        Raises:
            ValueError: no target, a repeated name, an impossible width, a layer that the method cannot adapt, or NaN.
        """
        if not self.targets:
            raise ValueError("it names no layer.")
        names = [target.name for target in self.targets]
        if len(set(names)) < len(names):
            raise ValueError(f"it names `{max(names, key=names.count)}` more than once.")
        for target in self.targets:
            if target.in_features < 1 or target.out_features < 1:
                raise ValueError(
                    f"its layer `{target.name}` is {target.in_features} -> {target.out_features}, but both widths must be at "
                    "least 1."
                )
        adapter_class(self.config).check_targets(self.config, self.targets)
        self.check_extra_parameters()

    def check_extra_parameters(self) -> None:
        """Checks that no extra parameter holds NaN. Infinite elements may be intended, as in a mask.

        Raises:
            ValueError: one does.
        """
        for name, tensor in self.extra_parameters.items():
            if tensor.isnan().any():
                raise ValueError(f"`{name}` holds NaN.")

    @abstractmethod
    def check(self) -> None:
        """Checks sizes, dtypes and values, so that no operator gets an invalid tensor.

        Raises:
            ValueError: a tensor or a target is invalid. The message does not say which file it comes from.
        """

    def check_widths_known(self) -> None:  # noqa: B027 (most methods always know them)
        """Checks that the widths of all layers are known without a model.

        Raises:
            ValueError: they are not.
        """

    def check_config(self, other: AdapterConfig) -> None:
        """Checks that these contents may overwrite an adapter with the config ``other``.

        Raises:
            ValueError: the configs differ in more than how layers are selected or parameters initialised.
        """
        ignored = {f.name: f.default for f in fields(self.config) if f.name in _IRRELEVANT_FIELDS}
        if type(self.config) is not type(other) or replace(self.config, **ignored) != replace(other, **ignored):  # type: ignore[arg-type] # fields by name
            raise ValueError("`model` has an adapter of another config. Eject it first.")

    @abstractmethod
    def check_sizes(self, other: Self) -> None:
        """Checks that these contents may overwrite an adapter of the same config whose contents are ``other``.

        Raises:
            ValueError: a tensor has another shape.
        """

    # Into a model

    def check_layers(self, targets: tuple[Target, ...]) -> None:
        """Checks that these contents are for the layers ``targets``.

        Raises:
            ValueError: they are other layers or have other widths. The message names the first that differs.
        """
        own = {target.name: target for target in self.targets}
        wanted = {target.name: target for target in targets}
        for name in sorted(own.keys() ^ wanted.keys()):
            one, other = ("the model", "the file") if name in wanted else ("the file", "the model")
            raise ValueError(
                f"it is for other layers than the model's: `{name}` is a target in {one}, but not in {other}."
            )
        for name, target in wanted.items():
            if own[name] != target:
                kinds = own[name].kind != target.kind
                there, here = (
                    f"{kinds * f'{t.kind} '}{t.in_features} -> {t.out_features}" for t in (own[name], target)
                )
                also = " of another kernel, groups, dilation or padding_mode" * (there == here)
                raise ValueError(
                    f"it is for other layers than the model's: `{name}` is {there} there, {here}{also} here."
                )

    def in_order(self, targets: tuple[Target, ...]) -> "Contents":
        """The same contents with their layers in the order of ``targets``.

        Raises:
            ValueError: :meth:`check_layers` refuses ``targets``.
        """
        self.check_layers(targets)
        own, wanted = ([target.name for target in layers] for layers in (self.targets, targets))
        if own == wanted:
            return self
        return self._reordered(targets, [own.index(name) for name in wanted])

    @abstractmethod
    def _reordered(self, targets: tuple[Target, ...], order: list[int]) -> "Contents":
        """``order``: the present index of each of ``targets``."""

    @abstractmethod
    def adapter(self, device: torch.device | str | None = None, bank: VectorBank | None = None) -> Adapter:
        """A new adapter with these contents on ``device``. ``bank``: an existing bank with the same vectors, to be shared."""

    @abstractmethod
    def write_over(self, adapter: Adapter) -> None:
        """Copies these contents into an adapter with the same targets in the same order."""

    # Factors

    @abstractmethod
    def all_factors(self, dtype: torch.dtype) -> Iterator[tuple[Target, Factors]]:
        """The factors of each layer, composed on demand where the method allows it."""

    def factors(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Target, Factors]]:
        """The update of each layer as A ``(r, in_features)`` and B ``(r, out_features)`` alone.

        Raises:
            ValueError: an update is not finite.
        """
        for target, factors in self.all_factors(dtype):
            factors = factors.folded()
            if not (is_finite(factors.A) and is_finite(factors.B)):
                raise ValueError(f"the update of layer `{target.name}` is not finite.")
            yield target, factors

    # Our own file format (native.py), without the extra parameters

    @abstractmethod
    def encode(self, form: str, bank_dtype: torch.dtype | None, bank_file: BankFile | None) -> dict[str, Tensor]:
        """The tensors of a file. A bank that is in ``bank_file`` is left out.

        Raises:
            ValueError: ``form`` or ``bank_dtype`` does not suit these contents.
        """

    @classmethod
    @abstractmethod
    def decode(
        cls,
        config: AdapterConfig,
        targets: tuple[Target, ...],
        tensors: dict[str, Tensor],
        form: str,
        bank: Tensor | None,
        extra_parameters: dict[str, Tensor],
    ) -> "Contents":
        """The contents that :meth:`encode` was called on, to be checked with :meth:`check`.

        Args:
            bank: the vectors of a bank in another file, if the method has a bank and it is in one.

        Raises:
            ValueError: a tensor is missing, unknown or of the wrong size.
        """


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], *, floating: bool) -> None:
    """Checks the shape of a tensor and whether it holds floating-point numbers or integers.

    Raises:
        ValueError: it does not fit.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"`{name}` is {tuple(tensor.shape)}, but must be {shape}.")
    if tensor.is_floating_point() != floating or tensor.is_complex():
        raise ValueError(f"`{name}` is {tensor.dtype}, but must be {'floating-point' if floating else 'integers'}.")


def check_finite(name: str, tensor: Tensor) -> None:
    """Checks that all elements are finite.

    Raises:
        ValueError: one is not.
    """
    if not is_finite(tensor):
        raise ValueError(f"`{name}` holds an infinite or NaN element.")


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite. In one pass: ``Tensor.isfinite`` makes several temporary tensors of the same size."""
    return not tensor.numel() or all(extreme.isfinite() for extreme in tensor.aminmax())


def take(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Removes a required tensor from ``tensors``.

    Raises:
        ValueError: it is missing.
    """
    if name not in tensors:
        raise ValueError(f"it lacks tensor `{name}`.")
    return tensors.pop(name)
