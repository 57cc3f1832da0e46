"""What a folder with an adapter says, whichever format it is in. Formats are read into it and written from it."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
from torch import Tensor, nn

from .. import ops
from ..adapters import Adapter, Target, VBLoRAAdapter
from ..adapters.base import Factors
from ..adapters.registry import adapter_class
from ..adapters.vblora import Deployed, Trained, as_factors, candidate_dtype, draw_rows, rows_of_factors, scaled
from ..bank import VectorBank
from ..config import AdapterConfig, VBLoRAConfig
from ..distributed import gather_to_cpu, shard_like

# Ways to name layers and modules, which come down to names; what is seen from the layers; and ways to begin, which are over.
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
class Contents:
    """An adapter of any method, without a model. Its tensors are on the CPU.

    ``extra_parameters``: tensors that trained beside the adapter (biases, ``modules_to_save``), by their names in the model.
    """

    config: AdapterConfig
    targets: tuple[Target, ...]
    extra_parameters: dict[str, Tensor] = field(default_factory=dict, kw_only=True)

    @property
    def is_trainable(self) -> bool:
        """Whether training can go on from it."""
        return True

    def check_layout(self) -> None:
        """Refuses layers that are none.

        Raises:
            ValueError: named, without saying where it was read.
        """
        if not self.targets:
            raise ValueError("it names no layer.")
        names = [target.name for target in self.targets]
        if len(set(names)) < len(names):
            raise ValueError(f"it names `{max(names, key=names.count)}` more than once.")
        for target in self.targets:
            if target.in_features < 1 or target.out_features < 1:
                raise ValueError(f"its layer `{target.name}` is {target.in_features} -> {target.out_features}.")
        adapter_class(self.config).check_targets(self.config, self.targets)

    @abstractmethod
    def check(self) -> None:
        """Refuses what would not make an adapter: sizes, types and values are what a kernel may be given.

        Raises:
            ValueError: named, without saying where it was read.
        """

    def check_widths_known(self) -> None:
        """Refuses, for what is done without a model, contents that do not say how wide their layers are.

        Raises:
            ValueError: it is not known before they are in a model.
        """

    def in_order(self, targets: tuple[Target, ...]) -> Self:
        """The same in the order of ``targets``.

        Raises:
            ValueError: they are other layers, or of other widths; the first that differs is named.
        """
        own = {target.name: target for target in self.targets}
        wanted = {target.name: target for target in targets}
        for name in sorted(own.keys() ^ wanted.keys()):
            which = "the model adapts" if name in wanted else "it adapts"
            other = "it does not" if name in wanted else "the model does not"
            raise ValueError(f"it is for other layers than the model's: {which} `{name}`, {other}.")
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
        if list(own) == list(wanted):
            return self
        return self._reordered(targets, [list(own).index(name) for name in wanted])

    @abstractmethod
    def _reordered(self, targets: tuple[Target, ...], order: list[int]) -> Self:
        """``order``: where each of ``targets`` stands now."""

    @abstractmethod
    def all_factors(self, dtype: torch.dtype) -> Iterator[tuple[Target, Factors]]:
        """Each layer's factors, composed when they are asked for."""

    def factors(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Target, Factors]]:
        """Each layer's update as A ``(r, in_features)`` and B ``(r, out_features)`` alone.

        Raises:
            ValueError: one is not finite.
        """
        for target, factors in self.all_factors(dtype):
            factors = factors.folded()
            if not (factors.A.isfinite().all() and factors.B.isfinite().all()):
                raise ValueError(f"the update of layer `{target.name}` is not finite.")
            yield target, factors

    def as_trainable(self) -> Self:
        """A deployed form made trainable."""
        return self

    @abstractmethod
    def adapter(self, device: torch.device | str | None = None, bank: VectorBank | None = None) -> Adapter:
        """An adapter of these contents, on ``device``. ``bank``: one that is there and equals these contents'."""

    def check_config(self, other: AdapterConfig) -> None:
        """Refuses to be written over an adapter of another config.

        Raises:
            ValueError: it is one.
        """
        unlike = {f.name: f.default for f in fields(self.config) if f.name in _IRRELEVANT_FIELDS}
        if type(self.config) is not type(other) or replace(self.config, **unlike) != replace(other, **unlike):
            raise ValueError("`model` has an adapter of another config. Eject it first.")

    @abstractmethod
    def check_sizes(self, other: Self) -> None:
        """Refuses to be written over an adapter of the same config whose contents, ``other``, are of other sizes.

        Raises:
            ValueError: they are; named.
        """

    @abstractmethod
    def write_over(self, adapter: Adapter) -> None:
        """Copies these contents, which fit it and stand in its order, into an adapter."""


@dataclass(frozen=True)
class VBLoRAContents(Contents):
    """``rows`` stand in the order of ``targets``, as in :class:`VBLoRAAdapter`."""

    config: VBLoRAConfig
    bank: Tensor
    rows: Trained | Deployed

    @classmethod
    def of(cls, config: VBLoRAConfig, adapter: VBLoRAAdapter, extra_parameters: dict[str, Tensor]) -> "VBLoRAContents":
        rows = type(adapter.rows)(*(gather_to_cpu(x) if isinstance(x, Tensor) else x for x in adapter.rows))
        if isinstance(rows, Trained):
            columns = config.num_candidates if rows.candidates is None else rows.logits.shape[1]
            config = replace(config, seed=rows.seed, num_candidates=columns)
        return cls(
            config, adapter.targets, gather_to_cpu(adapter.bank.vectors), rows, extra_parameters=extra_parameters
        )

    @property
    def is_trainable(self) -> bool:
        return isinstance(self.rows, Trained)

    @property
    def num_rows(self) -> int:
        """S."""
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Rows of each factor in turn."""
        return rows_of_factors(self.targets, self.config.r, self.config.vector_length)

    @property
    def has_candidates(self) -> bool:
        """Whether its rows, if drawn, have fewer logits than there are bank vectors."""
        return self.config.num_candidates is not None and self.config.num_candidates < self.config.num_vectors

    def initial(self, seed: int) -> Trained:
        """Rows as ``seed`` draws them, in descending order: as many of each as may train."""
        config = self.config
        columns = config.num_candidates if self.has_candidates else config.num_vectors
        dtype = self.bank.dtype
        return draw_rows(
            self.sizes,
            config.num_vectors,
            columns,
            seed=seed,
            std=config.init_logits_std,
            init=config.init,
            device=self.bank.device,
            dtype=dtype,
        )

    def check_layout(self) -> None:
        super().check_layout()
        check_tensor("bank.vectors", self.bank, (self.config.num_vectors, self.config.vector_length), floating=True)
        if not self.bank.isfinite().all():
            raise ValueError("`bank.vectors` holds an infinite or NaN element.")

    def check(self) -> None:
        self.check_layout()
        config, rows, size = self.config, self.rows, self.num_rows
        if isinstance(rows, Deployed):
            check_tensor("indices", rows.indices, (size, config.topk), floating=False)
            check_tensor("weights", rows.weights, (size, config.topk), floating=True)
            _check_range("indices", rows.indices, config.num_vectors)
            if not rows.weights.isfinite().all():
                raise ValueError("`weights` holds an infinite or NaN element.")
            return
        columns = config.num_vectors if rows.candidates is None else rows.logits.shape[-1]
        check_tensor("logits", rows.logits, (size, columns), floating=True)
        if columns < config.topk:
            raise ValueError(f"`logits` has {columns} columns, but `topk` is {config.topk}.")
        if rows.logits.isnan().any() or rows.logits.isposinf().any():
            raise ValueError("`logits` holds NaN or +inf.")
        if rows.logits.dtype != self.bank.dtype:
            raise ValueError(f"`logits` is {rows.logits.dtype}, but must be {self.bank.dtype}, as `bank.vectors` is.")
        if rows.candidates is not None:
            check_tensor("candidates", rows.candidates, (size, columns), floating=False)
            _check_range("candidates", rows.candidates, config.num_vectors)
        if rows.exhausted is not None:
            check_tensor("exhausted", rows.exhausted, (size,), floating=False)

    def _reordered(self, targets: tuple[Target, ...], order: list[int]) -> "VBLoRAContents":
        sizes = self.sizes
        blocks = [a + b for a, b in zip(sizes[::2], sizes[1::2], strict=True)]
        of_target = torch.arange(sum(blocks), device=self.bank.device).split(blocks)
        moved = torch.cat([of_target[place] for place in order])
        rows = self.rows
        if isinstance(rows, Deployed):
            rows = Deployed(*(tensor[moved] for tensor in rows))
        else:  # drawn for another order of rows: the seed is of no use any more
            rows = Trained(rows.logits[moved], None if rows.candidates is None else rows.candidates[moved])
        return replace(self, targets=targets, rows=rows, config=replace(self.config, seed=None))

    def deployed(self) -> Deployed:
        """What the sub-vectors are mixed by, whether it still trains or not."""
        if isinstance(self.rows, Deployed):
            return self.rows
        logits, candidates = self.rows.logits, self.rows.candidates
        _, columns, weights = torch.ops.vblora.admixture(logits, self.bank, candidates, self.config.topk)
        if not weights.isfinite().all():
            row = int((~weights.isfinite()).any(1).nonzero()[0])
            raise ValueError(f"row {row} of `logits` has nothing finite among its k largest, so its weights are NaN.")
        indices = columns if candidates is None else candidates.gather(1, columns.long())
        return Deployed(indices.to(candidate_dtype(self.config.num_vectors)), weights)

    def all_factors(self, dtype: torch.dtype) -> Iterator[tuple[Target, Factors]]:
        deployed = self.deployed()
        bank = scaled(self.bank, self.config.scaling)
        sizes = self.sizes
        start = 0
        for target, *size in zip(self.targets, sizes[::2], sizes[1::2], strict=True):
            rows = slice(start, start := start + sum(size))
            subvectors = torch.ops.vblora.compose(bank, deployed.indices[rows], deployed.weights[rows], dtype)
            (factors,) = as_factors(ops.in_parts(subvectors, size, self.config.r), (target,))
            yield target, factors

    def as_trainable(self) -> "VBLoRAContents":
        """A deployed form made trainable: with the k vectors of each row as its only candidates."""
        if isinstance(self.rows, Trained):
            return self
        rows = Trained(self.rows.weights.log().to(self.bank.dtype), self.rows.indices)
        return replace(self, rows=rows, config=replace(self.config, num_candidates=self.config.topk, seed=None))

    def adapter(self, device: torch.device | str | None = None, bank: VectorBank | None = None) -> VBLoRAAdapter:
        if bank is None:
            bank = VectorBank(*self.bank.shape, self.config.init_vector_bank_bound, device="meta")
            bank.vectors = nn.Parameter(self.bank.to(device))
        rows = type(self.rows)(*(x.to(device) if isinstance(x, Tensor) else x for x in self.rows))
        return VBLoRAAdapter.from_config(self.config, self.targets, bank=bank, rows=rows)

    def check_sizes(self, other: "VBLoRAContents") -> None:
        for name, ours, theirs in zip(type(other.rows)._fields, self.rows, other.rows, strict=False):
            shapes = [tuple(x.shape) if isinstance(x, Tensor) else None for x in (ours, theirs)]
            if type(other.rows) is not type(self.rows) or shapes[0] != shapes[1]:
                raise ValueError(f"`model` has an adapter with other `{name}`. Eject it first.")

    def write_over(self, adapter: VBLoRAAdapter) -> None:
        for ours, theirs in zip(self.rows, adapter.rows, strict=True):
            if isinstance(theirs, Tensor):
                theirs.copy_(shard_like(ours, theirs))
        if isinstance(self.rows, Trained):
            adapter.seed = self.rows.seed
        if not adapter.bank.unchanged():
            adapter.bank.vectors.copy_(shard_like(self.bank, adapter.bank.vectors))


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], *, floating: bool) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"`{name}` is {tuple(tensor.shape)}, but must be {shape}.")
    if tensor.is_floating_point() != floating or tensor.is_complex():
        raise ValueError(f"`{name}` is {tensor.dtype}, but must be {'floating-point' if floating else 'integers'}.")


def _check_range(name: str, indices: Tensor, num_vectors: int) -> None:
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < num_vectors:
        outside = indices[(indices < 0) | (indices >= num_vectors)]
        raise ValueError(f"`{name}` holds {int(outside[0])}, but there are only bank vectors 0 to {num_vectors - 1}.")
