"""VeRA's config."""

from dataclasses import dataclass

from .base import AdapterConfig


@dataclass
class VeraConfig(AdapterConfig):
    """A VeRA adapter (arXiv 2310.11454). Names and defaults are those of PEFT's ``VeraConfig``. It also has the fields of
    :class:`AdapterConfig`: which layers, and what trains beside them.

    Args:
        r: rank: rows of the frozen random projections, which all layers share.
        projection_prng_key: what these are drawn by, a signed 64-bit integer. The same key means the same bits on every
            device; PEFT's generator draws others by it.
        save_projection: write them into files. False leaves out what the key draws again, bit for bit.
        vera_dropout: probability of dropping an element of the update's input while training.
        d_initial: the vectors ``d`` start as this (the paper's table 6).
        init_weights: False starts them normal, and the vectors ``e`` (the paper's b) as ones instead of zeros: an update that
            is not 0, for tests.

    Raises:
        ValueError: a value out of range, named.
        TypeError: a value of the wrong type, named.
    """

    method = "vera"
    peft_type = "VERA"

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_seed("projection_prng_key")
        self._check_numbers("d_initial")
        for name in ("save_projection", "init_weights"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` is {getattr(self, name)!r}, but must be True or False.")
