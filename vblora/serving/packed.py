"""Packed adapters: the cold tier of a store."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from .. import ops
from ..adapters import Factors, Target
from ..adapters.subvectors import as_factors, rows_of_factors
from ..adapters.vblora import scaled
from ..adapters.vblora_rows import Deployed, candidate_dtype
from ..bank import VectorBank
from ..checkpoint import folder, native
from ..checkpoint.base_tensors import split_base_tensors
from ..checkpoint.contents import Contents, check_tensor
from ..checkpoint.flat import FlatContents
from ..checkpoint.json_objects import parse_object
from ..checkpoint.packing import pack_bits, unpack_bits
from ..checkpoint.vblora import VBLoRAContents, index_bits
from ..config import VBLoRAConfig
from ..files import read_tensors

# All weights of a sub-vector but its largest are at most 1/2. They are stored in steps of about 2^-17.
_STEPS = 2**17 - 2
_OFFSET = 2**15


class PackedAdapter(ABC):
    """An adapter as a store holds it."""

    @property
    @abstractmethod
    def targets(self) -> tuple[Target, ...]:
        """The layers that it adapts."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """Rank of its factors."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Its bytes, without those that it shares with other adapters."""

    @abstractmethod
    def factors(self, dtype: torch.dtype) -> Iterator[tuple[Target, Factors]]:
        """The factors of each layer that it adapts."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedVBLoRA(PackedAdapter):
    """A VB-LoRA adapter.

    Attributes:
        bank: ``(h, b)``.
        indices: uint8; ⌈log₂ h⌉ bits per index.
        weights: int16 ``(S, k - 1)``, all but the largest weight of each row, or float32 ``(S, k)``.
        scales: float32 ``(S, 1)``, the sum of each row's weights, if int16 weights do not sum to 1.
    """

    layout: "Layout"
    bank: Tensor
    indices: Tensor
    weights: Tensor
    scales: Tensor | None

    @property
    def targets(self) -> tuple[Target, ...]:
        return self.layout.targets

    @property
    def rank(self) -> int:
        return self.layout.config.r

    @property
    def nbytes(self) -> int:
        return self.indices.nbytes + self.weights.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def deployed(self) -> Deployed:
        layout = self.layout
        indices = unpack_bits(self.indices, layout.bits, layout.num_rows * layout.config.topk)
        indices = indices.view(-1, layout.config.topk).to(candidate_dtype(layout.config.num_vectors))
        if self.weights.is_floating_point():
            return Deployed(indices, self.weights)
        rest = (self.weights.float() + _OFFSET) / _STEPS
        weights = torch.cat([1 - rest.sum(1, keepdim=True), rest], 1)
        return Deployed(indices, weights if self.scales is None else weights * self.scales)

    def factors(self, dtype: torch.dtype) -> Iterator[tuple[Target, Factors]]:
        config, targets = self.layout.config, self.layout.targets
        rows, bank = self.deployed(), scaled(self.bank, config.scaling)
        subvectors = torch.ops.vblora.compose(bank, rows.indices.to(bank.device), rows.weights.to(bank.device), dtype)
        parts = ops.in_parts(subvectors, rows_of_factors(targets, config.r, config.vector_length), config.r)
        return zip(targets, as_factors(parts, targets), strict=True)


@dataclass(frozen=True, slots=True, eq=False)
class PackedFlat(PackedAdapter):
    """An adapter of another method, with the tensors of its file."""

    contents: FlatContents
    own_bytes: int

    @property
    def targets(self) -> tuple[Target, ...]:
        return self.contents.targets

    @property
    def rank(self) -> int:
        return self.contents.config.r

    @property
    def nbytes(self) -> int:
        return self.own_bytes

    def factors(self, dtype: torch.dtype) -> Iterator[tuple[Target, Factors]]:
        return self.contents.factors(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What all VB-LoRA adapters with the same config and targets share."""

    config: VBLoRAConfig
    targets: tuple[Target, ...]
    num_rows: int
    bits: int


class Reader:
    """Reads adapter folders, and holds what several of them share only once: banks, projections and layouts.

    Args:
        model: the model; None where there is none, as with the targets.
        targets: the layers that adapters may adapt, by name. None: any, and adapters stay as their folders have them.
        banks: the vector banks that adapters refer to by the SHA-256 of their file.
        device: the device of the banks.
        exact: whether to keep all k weights in float32.
    """

    def __init__(
        self,
        model: nn.Module | None,
        targets: dict[str, Target] | None,
        banks: list[VectorBank],
        max_rank: int,
        device: torch.device,
        exact: bool,
    ) -> None:
        self._model = model
        self.targets = targets
        self.max_rank = max_rank
        self.exact = exact
        self._device = device
        self._files = {bank.file.sha256: bank for bank in banks if bank.file is not None}
        # By their content's SHA-256. Gone with the last adapter that has them.
        self._shared: WeakValueDictionary[bytes, Tensor] = WeakValueDictionary()
        self._layouts: dict[str, Layout] = {}
        self._of_files: dict[str, Tensor] = {}

    @property
    def shared_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._shared.values())

    def read(self, directory: Path) -> PackedAdapter:
        """Reads an adapter.

        Raises:
            FileNotFoundError, ValueError: the adapter is missing or damaged, or does not fit the model.
        """
        tensors, metadata = read_tensors(directory / folder.TENSORS_FILE)
        try:
            description = parse_object(metadata.get(native.METADATA, "{}"))
            key = _layout_key(description)
        except (ValueError, TypeError, KeyError, AttributeError):
            description, key = {}, None  # `folder.read` says what is wrong
        layout = None if key is None else self._layouts.get(key)
        if layout is not None:  # another adapter has passed all checks except those of numbers
            bank = self._bank_of(description, tensors, layout)
            if bank is not None:
                return self._pack(layout, bank, tensors["indices"], tensors["weights"])
        bank_file = self._files.get(_sha256_of_bank(description))
        contents, _ = folder.read(directory, bank_file)
        contents = self._fitting(contents)
        if isinstance(contents, VBLoRAContents):
            return self._first_of_layout(contents, key, _sha256_of_bank(description))
        assert isinstance(contents, FlatContents)
        shared = {name: self._intern(contents.tensors[name]) for name in ("A", "B") if name in contents.tensors}
        own = {name: tensor for name, tensor in contents.tensors.items() if name not in shared}
        contents = replace(contents, tensors=own | shared)
        return PackedFlat(contents, sum(tensor.nbytes for tensor in own.values()))

    def _fitting(self, contents: Contents) -> Contents:
        """The contents with the model's targets; raises ``ValueError`` if they do not fit the model."""
        if contents.config.r > self.max_rank:
            raise ValueError(f"its rank is {contents.config.r}, but `max_rank` is {self.max_rank}.")
        if self.targets is not None:
            for target in contents.targets:
                if target.name not in self.targets:
                    raise ValueError(
                        f"it adapts `{target.name}`, which the model does not have, or the store's `target_modules` do not match."
                    )
        if self._model is not None:
            contents, differing = split_base_tensors(contents, self._model)
            for name in differing:
                raise ValueError(f"it holds another `{name}` than the model's, which cannot differ between rows.")
        for name in contents.extra_parameters:
            raise ValueError(f"it trained `{name}`, but biases and `modules_to_save` cannot differ between rows.")
        if self.targets is None:
            contents.check_widths_known()
            return contents
        return contents.in_order(tuple(self.targets[target.name] for target in contents.targets))

    def _first_of_layout(self, contents: VBLoRAContents, key: str | None, sha256: str) -> PackedVBLoRA:
        config = replace(contents.config, seed=None, num_candidates=None)
        bits = index_bits(config.num_vectors)
        layout = Layout(config, contents.targets, contents.num_rows, bits)
        bank = self._intern(contents.bank)
        if sha256:
            self._of_files[sha256] = bank
        if key is not None:
            layout = self._layouts.setdefault(key, layout)
        rows = contents.deployed()
        return self._pack(layout, bank, pack_bits(rows.indices, bits), rows.weights)

    def _pack(self, layout: Layout, bank: Tensor, indices: Tensor, weights: Tensor) -> PackedVBLoRA:
        count, topk = layout.num_rows, layout.config.topk
        check_tensor("indices", indices, (-(-count * topk * layout.bits // 8),), floating=False)
        check_tensor("weights", weights, (count, topk), floating=True)
        if indices.dtype != torch.uint8:
            raise ValueError(f"`indices` is {indices.dtype}, but must be torch.uint8.")
        weights = weights.float()
        if not weights.isfinite().all():
            raise ValueError("`weights` holds an infinite or NaN element.")
        if 2**layout.bits != layout.config.num_vectors:
            largest = int(unpack_bits(indices, layout.bits, count * topk).max())
            if largest >= layout.config.num_vectors:
                raise ValueError(f"`indices` holds {largest}, but the bank has {layout.config.num_vectors} vectors.")
        scales = weights.sum(1, keepdim=True)
        lost = weights.any(1) & (scales[:, 0] == 0)  # of both signs: no factor brings them back
        rest = torch.where(scales == 0, 0.0, weights / scales)[:, 1:]
        if ((scales - 1).abs() < 1e-5).all():
            rest, scales = weights[:, 1:], scales[:0]
        if self.exact or lost.any() or not ((rest >= 0) & (rest <= 0.5)).all():
            scales = scales[:0]
        else:
            weights = ((rest * _STEPS).round() - _OFFSET).to(torch.int16)
        # One allocation for all, against fragmentation.
        parts = [part.reshape(-1).view(torch.uint8) for part in (scales, weights, indices)]
        own = torch.cat(parts).split([len(part) for part in parts])
        return PackedVBLoRA(
            layout,
            bank,
            indices=own[2],
            weights=own[1].view(weights.dtype).view(weights.shape),
            scales=own[0].view(torch.float32).view(scales.shape) if len(scales) else None,
        )

    def _bank_of(self, description: dict[str, Any], tensors: dict[str, Tensor], layout: Layout) -> Tensor | None:
        """The bank of an adapter in its deploy form, if that bank has been checked before."""
        if tensors.keys() == {"indices", "weights"}:
            return self._of_files.get(_sha256_of_bank(description))
        if description.get("bank_file") is None and tensors.keys() == {"indices", "weights", "bank.vectors"}:
            return self._shared.get(_digest(_in_float(tensors["bank.vectors"])))
        return None

    def _intern(self, tensor: Tensor) -> Tensor:
        digest = _digest(tensor)
        shared = self._shared.get(digest)
        return self._shared.setdefault(digest, tensor.to(self._device)) if shared is None else shared


def _sha256_of_bank(description: dict[str, Any]) -> str:
    """The SHA-256 of the separate bank file that an adapter refers to; empty if the adapter contains its bank."""
    file = description.get("bank_file")
    return str(file.get("sha256", "")) if isinstance(file, dict) else ""


def _in_float(bank: Tensor) -> Tensor:
    return bank if bank.dtype == torch.float64 else bank.float()


def _digest(tensor: Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}".encode())
    digest.update(data.view(torch.uint8).numpy().data)
    return digest.digest()


def _layout_key(description: dict[str, Any]) -> str | None:
    """Identifies what VB-LoRA adapters in their deploy form share; None for other adapters, which are always read in full."""
    if description.get("form") != "deploy" or description.get("method") != "vblora" or description.get("aliases"):
        return None
    shared = {name: value for name, value in description.items() if name != "bank_file"}
    config = description["config"] | {"seed": None, "num_candidates": None}  # they do not affect the update
    return json.dumps(shared | {"config": config}, sort_keys=True)
