"""What a folder with an adapter says, whichever format it is in. Formats are read into it and written from it."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..adapters import Target
from ..adapters.base import Factors
from ..adapters.vblora import (
    Deployed,
    Trained,
    as_factors,
    candidate_dtype,
    check_widths,
    draw_rows,
    rows_of_factors,
    scaled,
)
from ..config import VBLoRAConfig


@dataclass(frozen=True)
class Contents:
    """An adapter without a model. Its tensors are on the CPU.

    ``rows`` stand in the order of ``targets``, as in :class:`VBLoRAAdapter`. ``beside``: tensors that trained beside the
    adapter (biases, ``modules_to_save``), by their names in the model.
    """

    config: VBLoRAConfig
    targets: tuple[Target, ...]
    bank: Tensor
    rows: Trained | Deployed
    beside: dict[str, Tensor] = field(default_factory=dict)

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
            dtype=dtype,
        )

    def check_layout(self) -> None:
        """Refuses layers and a bank that do not go together.

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
        check_widths(self.targets, self.config.vector_length, self.config.pad)
        check_tensor("bank.vectors", self.bank, (self.config.num_vectors, self.config.vector_length), floating=True)
        if not self.bank.isfinite().all():
            raise ValueError("`bank.vectors` holds an infinite or NaN element.")

    def check(self) -> None:
        """Refuses what would not make an adapter: sizes, types and values are what a kernel may be given.

        Raises:
            ValueError: named, without saying where it was read.
        """
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

    def in_order(self, targets: tuple[Target, ...]) -> "Contents":
        """The same with rows in the order of ``targets``.

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
        sizes = self.sizes
        blocks = [a + b for a, b in zip(sizes[::2], sizes[1::2], strict=True)]
        of_target = dict(zip(own, torch.arange(sum(blocks)).split(blocks), strict=True))
        order = torch.cat([of_target[name] for name in wanted])
        rows = self.rows
        if isinstance(rows, Deployed):
            rows = Deployed(*(tensor[order] for tensor in rows))
        else:  # drawn for another order of rows: the seed is of no use any more
            rows = Trained(rows.logits[order], None if rows.candidates is None else rows.candidates[order])
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

    def factors(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Target, Factors]]:
        """Each layer's factors, composed when they are asked for: A ``(r, in_features)`` and B ``(r, out_features)``.

        Raises:
            ValueError: a sub-vector is not finite.
        """
        deployed = self.deployed()
        bank = scaled(self.bank, self.config.scaling)
        sizes = self.sizes
        start = 0
        for target, *size in zip(self.targets, sizes[::2], sizes[1::2], strict=True):
            rows = slice(start, start := start + sum(size))
            subvectors = torch.ops.vblora.compose(bank, deployed.indices[rows], deployed.weights[rows], dtype)
            (factors,) = as_factors(subvectors.split_with_sizes(size), (target,), self.config.r)
            if not all(factor.isfinite().all() for factor in (factors.A, factors.B)):
                raise ValueError(f"the update of layer `{target.name}` is not finite.")
            yield target, factors

    def kept(self) -> "Contents":
        """A deployed form made trainable: with the k vectors of each row as its only candidates."""
        if isinstance(self.rows, Trained):
            return self
        rows = Trained(self.rows.weights.log().to(self.bank.dtype), self.rows.indices)
        return replace(self, rows=rows, config=replace(self.config, num_candidates=self.config.topk, seed=None))


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], *, floating: bool) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"`{name}` is {tuple(tensor.shape)}, but must be {shape}.")
    if tensor.is_floating_point() != floating or tensor.is_complex():
        raise ValueError(f"`{name}` is {tensor.dtype}, but must be {'floating-point' if floating else 'integers'}.")


def _check_range(name: str, indices: Tensor, num_vectors: int) -> None:
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < num_vectors:
        outside = indices[(indices < 0) | (indices >= num_vectors)]
        raise ValueError(f"`{name}` holds {int(outside[0])}, but there are only bank vectors 0 to {num_vectors - 1}.")
