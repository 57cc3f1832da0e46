"""The contents of a VB-LoRA adapter: a vector bank, and for each sub-vector the logits or the final mixture."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import ops
from ..adapters import Adapter, Factors, Target, VBLoRAAdapter
from ..adapters.subvectors import as_factors, rows_of_factors
from ..adapters.vblora import scaled
from ..adapters.vblora_rows import Deployed, Trained, candidate_dtype, draw_rows
from ..bank import BankFile, VectorBank, decode_vectors, encode_vectors
from ..config import AdapterConfig, VBLoRAConfig
from ..distributed import gather_to_cpu, shard_like
from .contents import Contents, check_finite, check_tensor, take
from .packing import pack_bits, pack_prefixes, unpack_bits, unpack_prefixes

_BANK = "bank."  # prefix of the bank's tensors in our own files


@dataclass(frozen=True)
class VBLoRAContents(Contents):
    """``bank``: ``(h, b)``. ``rows``: one per sub-vector, in the order of ``targets`` as in :class:`VBLoRAAdapter`."""

    config: VBLoRAConfig
    bank: Tensor
    rows: Trained | Deployed

    has_bank = True

    @classmethod
    def of(cls, config: AdapterConfig, adapter: Adapter, extra_parameters: dict[str, Tensor]) -> "VBLoRAContents":
        assert isinstance(config, VBLoRAConfig) and isinstance(adapter, VBLoRAAdapter)
        rows = adapter.rows.map(gather_to_cpu)
        if isinstance(rows, Trained):
            columns = config.num_candidates if rows.candidates is None else rows.logits.shape[1]
            config = replace(config, seed=rows.seed, num_candidates=columns)
        return cls(
            config, adapter.targets, gather_to_cpu(adapter.bank.vectors), rows, extra_parameters=extra_parameters
        )

    @property
    def is_trainable(self) -> bool:
        return isinstance(self.rows, Trained)

    def as_trainable(self) -> "VBLoRAContents":
        """Deployed contents become trainable with the k vectors of each row as its only candidates.

        If the config trains scales, that of a row is the sum of its weights.

        Raises:
            ValueError: the weights of a row are not a softmax.
        """
        if isinstance(self.rows, Trained):
            return self
        weights, scales = self.rows.weights, None
        if self.config.train_scales:
            scales = weights.sum(1)
            shares = weights / scales[:, None]
            weights = torch.where(weights.any(1)[:, None], shares, 1 / self.config.topk)
            scales = scales.to(self.bank.dtype)
        if not are_mixtures(weights):
            raise ValueError(
                "some of its weights are negative or do not sum to 1, so no logits can give them. Load it without train_kept; it "
                "cannot train."
            )
        rows = Trained(weights.log().to(self.bank.dtype), self.rows.indices, scales=scales)
        return replace(self, rows=rows, config=replace(self.config, num_candidates=self.config.topk, seed=None))

    def summary(self) -> str:
        config = self.config
        return (
            f"{super().summary()}, {config.num_vectors} bank vectors of length {config.vector_length}, k={config.topk}"
        )

    @property
    def sizes(self) -> list[int]:
        """The number of rows of each factor in turn."""
        return rows_of_factors(self.targets, self.config.r, self.config.vector_length)

    @property
    def num_rows(self) -> int:
        """S, the number of sub-vectors."""
        return sum(self.sizes)

    @property
    def num_columns(self) -> int:
        """M, the number of logits of each row as it is drawn."""
        config = self.config
        return config.num_vectors if config.num_candidates is None else min(config.num_candidates, config.num_vectors)

    @property
    def has_candidates(self) -> bool:
        """Whether rows are drawn with fewer logits than there are bank vectors."""
        return self.num_columns < self.config.num_vectors

    def initial(self, seed: int) -> tuple[Trained, Tensor]:
        """The rows as ``seed`` draws them, the M largest logits of each in descending order; and the candidates ``(S, M)``."""
        rows = draw_rows(
            self.sizes,
            self.config.num_vectors,
            self.num_columns,
            seed=seed,
            std=self.config.init_logits_std,
            init=self.config.init,
            device=self.bank.device,
            dtype=self.bank.dtype,
        )
        assert rows.candidates is not None  # a number of candidates was given
        return rows, rows.candidates

    # Checks

    def check_layout(self) -> None:
        super().check_layout()
        check_tensor("bank.vectors", self.bank, (self.config.num_vectors, self.config.vector_length), floating=True)
        check_finite("bank.vectors", self.bank)

    def check(self) -> None:
        self.check_layout()
        if isinstance(self.rows, Deployed):
            self._check_deployed(self.rows)
        else:
            self._check_trained(self.rows)

    def _check_deployed(self, rows: Deployed) -> None:
        shape = self.num_rows, self.config.topk
        check_tensor("indices", rows.indices, shape, floating=False)
        check_tensor("weights", rows.weights, shape, floating=True)
        _check_range("indices", rows.indices, self.config.num_vectors)
        check_finite("weights", rows.weights)

    def _check_trained(self, rows: Trained) -> None:
        config, size = self.config, self.num_rows
        columns = config.num_vectors if rows.candidates is None else rows.logits.shape[-1] if rows.logits.dim() else 0
        check_tensor("logits", rows.logits, (size, columns), floating=True)
        if columns < config.topk:
            raise ValueError(f"`logits` has {columns} columns, but `topk` is {config.topk}.")
        if rows.logits.isnan().any() or rows.logits.isposinf().any():
            raise ValueError("`logits` holds NaN or +inf.")
        if rows.logits.dtype != self.bank.dtype:
            raise ValueError(f"`logits` is {rows.logits.dtype}, but must be {self.bank.dtype}, as `bank.vectors` is.")
        if (rows.logits.amax(1) == -torch.inf).any():
            raise ValueError("`logits` holds a row with nothing but -inf.")
        if rows.candidates is not None:
            check_tensor("candidates", rows.candidates, (size, columns), floating=False)
            _check_range("candidates", rows.candidates, config.num_vectors)
        if rows.exhausted is not None:
            check_tensor("exhausted", rows.exhausted, (size,), floating=False)
        if rows.scales is not None:
            check_tensor("scales", rows.scales, (size,), floating=True)
            check_finite("scales", rows.scales)
            if rows.scales.dtype != self.bank.dtype:
                raise ValueError(
                    f"`scales` is {rows.scales.dtype}, but must be {self.bank.dtype}, as `bank.vectors` is."
                )

    def check_sizes(self, other: "VBLoRAContents") -> None:
        if isinstance(self.rows, Trained) and isinstance(other.rows, Trained):
            columns, present = self.rows.logits.shape[1], other.rows.logits.shape[1]
            if columns != present:
                wanted = None if self.rows.candidates is None else columns
                raise ValueError(
                    f"it has {columns} logits per row, but the adapter in `model` has {present}. To load it as it is, eject that "
                    f"adapter first. To resume training, inject with num_candidates={wanted}, resume, and call vblora.grow then."
                )
        elif type(other.rows) is not type(self.rows):
            forms = ["can train" if contents.is_trainable else "is deployed" for contents in (self, other)]
            raise ValueError(f"it {forms[0]}, but the adapter in `model` {forms[1]}. Eject that adapter first.")
        for name, ours, theirs in zip(type(other.rows)._fields, self.rows, other.rows, strict=True):
            shapes = [tuple(x.shape) if isinstance(x, Tensor) else None for x in (ours, theirs)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"`model` has an adapter with other `{name}`. Eject it first.")

    # Into a model

    def _reordered(self, targets: tuple[Target, ...], order: list[int]) -> "VBLoRAContents":
        sizes = self.sizes
        blocks = [a + b for a, b in zip(sizes[::2], sizes[1::2], strict=True)]
        of_target = torch.arange(sum(blocks), device=self.bank.device).split(blocks)
        moved = torch.cat([of_target[place] for place in order])
        rows = self.rows.map(lambda tensor: tensor[moved])
        if isinstance(rows, Trained):  # the seed draws rows in the old order, and `exhausted` needs a seed
            rows = Trained(rows.logits, rows.candidates, scales=rows.scales)
        return replace(self, targets=targets, rows=rows, config=replace(self.config, seed=None))

    def adapter(self, device: torch.device | str | None = None, bank: VectorBank | None = None) -> VBLoRAAdapter:
        # Copies: tensors read from a file are views of it, which would change with the file.
        def copied(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, copy=True)

        if bank is None:
            num_vectors, vector_length = self.bank.shape
            bank = VectorBank(num_vectors, vector_length, self.config.init_vector_bank_bound, device="meta")
            bank.vectors = nn.Parameter(copied(self.bank))
        return VBLoRAAdapter.from_config(self.config, self.targets, bank=bank, rows=self.rows.map(copied))

    def write_over(self, adapter: Adapter) -> None:
        assert isinstance(adapter, VBLoRAAdapter)
        for ours, theirs in zip(self.rows, adapter.rows, strict=True):
            if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
                theirs.copy_(shard_like(ours, theirs))
        if isinstance(self.rows, Trained):
            adapter.seed = self.rows.seed
        adapter.note_integers()
        vectors = adapter.bank.vectors
        # Other adapters of an equal bank keep their caches.
        if not torch.equal(gather_to_cpu(vectors), self.bank.to(vectors.dtype)):
            vectors.copy_(shard_like(self.bank, vectors))

    # Factors

    def deployed(self) -> Deployed:
        """The mixture of each sub-vector: its k bank vectors and their weights.

        Raises:
            ValueError: the logits of a row give no finite weights.
        """
        if isinstance(self.rows, Deployed):
            return self.rows
        logits, candidates = self.rows.logits, self.rows.candidates
        _, columns, weights = torch.ops.vblora.admixture(logits, self.bank, candidates, self.config.topk)
        if not weights.isfinite().all():
            row = int((~weights.isfinite()).any(1).nonzero()[0])
            raise ValueError(f"row {row} of `logits` has nothing finite among its k largest, so its weights are NaN.")
        if self.rows.scales is not None:
            weights = weights * self.rows.scales[:, None]
        indices = columns if candidates is None else candidates.gather(1, columns.long())
        return Deployed(indices.to(candidate_dtype(self.config.num_vectors)), weights)

    def all_factors(self, dtype: torch.dtype) -> Iterator[tuple[Target, Factors]]:
        deployed = self.deployed()
        bank = scaled(self.bank, self.config.scaling)
        # One call for all layers: a call for each takes most of the time of a LoRA export.
        subvectors = torch.ops.vblora.compose(bank, deployed.indices, deployed.weights, dtype)
        factors = as_factors(ops.in_parts(subvectors, self.sizes, self.config.r), self.targets)
        yield from zip(self.targets, factors, strict=True)

    # Our own file format

    def encode(self, form: str, bank_dtype: torch.dtype | None, bank_file: BankFile | None) -> dict[str, Tensor]:
        if form == "deploy":
            deployed = self.deployed()
            bits = index_bits(self.config.num_vectors)
            tensors = {"indices": pack_bits(deployed.indices, bits), "weights": deployed.weights}
        elif isinstance(self.rows, Deployed):
            raise ValueError(
                '`form` is "resume", but the adapter is a deployed one, without logits to train. Use "deploy".'
            )
        elif bank_dtype is not None:
            raise ValueError(
                f'`bank_dtype` is {bank_dtype}, but `form` "resume" keeps the bank as it is. Leave it out, or take "deploy".'
            )
        else:
            tensors = self._encode_trained(self.rows)
        if bank_file is None:
            tensors |= {_BANK + name: tensor for name, tensor in encode_vectors(self.bank, bank_dtype).items()}
        return tensors

    def _encode_trained(self, rows: Trained) -> dict[str, Tensor]:
        tensors = {}
        if rows.seed is None:
            tensors["logits"] = rows.logits
            if rows.candidates is not None:
                tensors["candidates"] = rows.candidates
        else:
            initial, candidates = self.initial(rows.seed)
            if rows.candidates is not None and not torch.equal(candidates, rows.candidates.to(candidates.dtype)):
                raise ValueError(
                    f"the adapter's candidates are not those that its seed {rows.seed} draws, so something has written into "
                    "them, such as an average that takes integers, too. If they are right nevertheless, set the adapter's `seed` "
                    "to None: then its file holds them."
                )
            values = rows.logits if rows.candidates is not None else rows.logits.gather(1, candidates.long())
            tensors["logits.lengths"], tensors["logits.values"] = pack_prefixes(values, initial.logits)
        if rows.exhausted is not None:
            tensors["exhausted"] = pack_bits(rows.exhausted, 1)
        if rows.scales is not None:
            tensors["scales"] = rows.scales
        return tensors

    @classmethod
    def decode(
        cls,
        config: AdapterConfig,
        targets: tuple[Target, ...],
        tensors: dict[str, Tensor],
        form: str,
        bank: Tensor | None,
        extra_parameters: dict[str, Tensor],
    ) -> "VBLoRAContents":
        assert isinstance(config, VBLoRAConfig)
        tensors = dict(tensors)
        own_bank = {name.removeprefix(_BANK): tensors.pop(name) for name in list(tensors) if name.startswith(_BANK)}
        if bank is None:
            if not own_bank:
                raise ValueError("it lacks its vector bank, tensor `bank.vectors`.")
            bank = decode_vectors(own_bank)
        elif own_bank:
            raise ValueError("it has a bank of its own and also names a bank file.")
        if form == "deploy" and bank.dtype != torch.float64:
            bank = bank.float()
        no_rows = Deployed(bank.new_empty(0), bank.new_empty(0))
        contents = cls(config, targets, bank, no_rows, extra_parameters=extra_parameters)
        contents.check_layout()
        rows = contents._decode_trained(tensors) if form == "resume" else contents._decode_deployed(tensors)
        for name in tensors:
            raise ValueError(f"it has an unknown tensor `{name}`.")
        return replace(contents, rows=rows)

    def _decode_trained(self, tensors: dict[str, Tensor]) -> Trained:
        seed = self.config.seed
        exhausted = None
        if "exhausted" in tensors:
            exhausted = unpack_bits(tensors.pop("exhausted"), 1, self.num_rows).bool()
        scales = take(tensors, "scales") if self.config.train_scales else None
        if seed is None:
            return Trained(take(tensors, "logits"), tensors.pop("candidates", None), exhausted, scales=scales)
        lengths, values = take(tensors, "logits.lengths"), take(tensors, "logits.values")
        check_tensor("logits.lengths", lengths, (self.num_rows,), floating=False)  # before so many rows are drawn
        initial, candidates = self.initial(seed)
        logits = unpack_prefixes(lengths, values, initial.logits)
        if self.has_candidates:
            exhausted = initial.exhausted if exhausted is None else exhausted
            return initial._replace(logits=logits, exhausted=exhausted, scales=scales)
        return Trained(torch.empty_like(logits).scatter_(1, candidates.long(), logits), seed=seed, scales=scales)

    def _decode_deployed(self, tensors: dict[str, Tensor]) -> Deployed:
        config, packed, weights = self.config, take(tensors, "indices"), take(tensors, "weights")
        count = self.num_rows * config.topk
        indices = unpack_bits(packed, index_bits(config.num_vectors), count).view(-1, config.topk)
        if weights.is_floating_point() and self.bank.dtype != torch.float64:
            weights = weights.float()
        return Deployed(indices.to(candidate_dtype(config.num_vectors)), weights)


def are_mixtures(weights: Tensor) -> bool:
    """Whether each row of weights can be the softmax of logits: at least 0, and the sum is 1."""
    return bool((weights >= 0).all() and ((weights.double().sum(1) - 1).abs() < 1e-4).all())


def index_bits(num_vectors: int) -> int:
    """How many bits files and stores take for an index of a bank vector."""
    return max(1, (num_vectors - 1).bit_length())


def _check_range(name: str, indices: Tensor, num_vectors: int) -> None:
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < num_vectors:
        outside = indices[(indices < 0) | (indices >= num_vectors)]
        raise ValueError(f"`{name}` holds {int(outside[0])}, but there are only bank vectors 0 to {num_vectors - 1}.")
