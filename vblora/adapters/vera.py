"""VeRA: one frozen random pair of projections for all layers, and two trained vectors per layer (arXiv 2310.11454)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .. import ops, streams
from ..config import VeraConfig
from .base import Target, is_plain
from .shared import SharedPairAdapter

_STREAMS = {"A": 1, "B": 2}  # csrc/random.h


class VeRAAdapter(SharedPairAdapter):
    """One VeRA adapter of one model: each layer's update is ``(((x Aᵀ) ∘ d) B) ∘ e`` (eq. 2, where e is called b).

    Args:
        targets: the layers.
        r: rank.
        key: seed of the projections, which are the same bits on every device.
        d_initial: initial value of d. e starts as zeros, so the first update is 0.
        init: False makes d start normal and e as ones.
        save_projection: whether A and B are in the state dict.
        projection: A ``(r, in)`` and B ``(r, out)`` from a file, instead of a draw.
        device, dtype: of the parameters and the projections.

    Attributes:
        A, B: buffers ``(r, in)``, ``(r, out)`` of the largest widths.
        d: parameter ``(layers, r)``.
        e: parameter, the ``out_features`` of each layer in turn.
    """

    VECTORS = ("d", "e")
    # 8e-2 had the lowest loss of a language model, but 0.16 diverges.
    RATES: ClassVar = {"default": {"vectors": 2e-2}, "language": {"vectors": 4e-2}}
    FALLS: ClassVar = {"vectors": 1.0}
    d: nn.Parameter
    e: nn.Parameter

    def __init__(
        self,
        targets: Sequence[Target],
        *,
        r: int = 256,
        key: int = 0,
        d_initial: float = 0.1,
        init: bool = True,
        save_projection: bool = True,
        projection: tuple[Tensor, Tensor] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(targets, r)
        self.key = key
        self.d_initial, self.init = d_initial, init
        if projection is None:
            projection = draw_projection(targets, r, key, device=device, dtype=dtype)
        for name, tensor in zip("AB", projection, strict=True):
            self.register_buffer(name, tensor, persistent=save_projection)
        self._cast: tuple[tuple[object, ...], tuple[Tensor, Tensor]] | None = None  # with the key of the cast
        self._register_vectors(device, dtype)
        self._reset_vectors()

    @classmethod
    def from_config(
        cls,
        config: VeraConfig,
        targets: Sequence[Target],
        *,
        projection: tuple[Tensor, Tensor] | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """``projection``: A and B from a file, instead of a draw."""
        return cls(
            targets,
            r=config.r,
            key=config.projection_prng_key,
            d_initial=config.d_initial,
            init=config.init_weights,
            save_projection=config.save_projection,
            projection=projection,
            device=device,
            dtype=torch.float32,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Resets the vectors, and draws the projections from their key, whatever they were."""
        self._draw()
        self._reset_vectors()
        self.invalidate()

    def settings(self) -> list[int]:
        return [self.key]

    def set_settings(self, settings: Sequence[int]) -> None:
        self.key = settings[0]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = self.key
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.key != key and f"{prefix}A" not in state_dict:
            self._draw()

    def current_config(self, config: VeraConfig) -> VeraConfig:
        return replace(config, projection_prng_key=self.key)

    @torch.no_grad()
    def _draw(self) -> None:
        drawn = draw_projection(self.targets, self.r, self.key, device=self.A.device, dtype=self.A.dtype)
        self.A.copy_(drawn[0])
        self.B.copy_(drawn[1])

    @torch.no_grad()
    def _reset_vectors(self) -> None:
        self.d.fill_(self.d_initial) if self.init else self.d.normal_()
        self.e.fill_(0.0 if self.init else 1.0)

    def pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` in ``dtype``. They are frozen, so a cast is cached, for the stream that made it.

        A cast made while a CUDA graph is captured belongs to the graph and is not cached.
        """
        sources = self.A, self.B
        if self.A.dtype == dtype or torch.compiler.is_compiling() or not all(map(is_plain, sources)):
            return super().pair(dtype)
        if streams.capturing(self.A.device) or ops.is_recorded():
            return super().pair(dtype)
        key = dtype, streams.current(self.A.device), *((source.data_ptr(), source._version) for source in sources)
        cast = self._cast  # read once: another thread may replace it
        if cast is None or cast[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                cast = self._cast = key, super().pair(dtype)
        return cast[1]

    def invalidate(self) -> None:
        self._cast = None
        super().invalidate()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        was_meta = self.A.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.A.is_meta:  # `to_empty`: without save_projection, no state dict brings them
            self._draw()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_cast": None}


def draw_projection(
    targets: Sequence[Target],
    r: int,
    key: int,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """A ``(r, in)`` and B ``(r, out)`` of the largest widths: uniform within Kaiming's bound, sqrt(6 / fan-in), like PEFT's."""
    sizes = SharedPairAdapter.pair_sizes(targets, r)

    def draw(name: str, fan_in: int) -> Tensor:
        values = torch.empty(sizes[name], device=device, dtype=dtype)
        torch.ops.vblora.draw_uniform_(values, key, _STREAMS[name], math.sqrt(6 / fan_in))
        return values

    return draw("A", sizes["A"][1]), draw("B", r)


def pefts_projection(targets: Sequence[Target], r: int, key: int) -> tuple[Tensor, Tensor]:
    """The pair that PEFT draws from ``key`` with torch's CPU generator, provided that torch's draws have not changed since."""
    sizes = SharedPairAdapter.pair_sizes(targets, r)
    generator = torch.Generator().manual_seed(key)
    pair = []
    for size, fan_in in ((sizes["A"], sizes["A"][1]), (sizes["B"][::-1], r)):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan_in))
        pair.append(torch.empty(size, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator))
    return pair[0], pair[1].T.contiguous()
