"""VeRA's config."""

from dataclasses import dataclass

from ..checks import check_seed
from .base import AdapterConfig
from .peft_fields import accepts_peft_fields


@accepts_peft_fields()
@dataclass
class VeraConfig(AdapterConfig):
    """A VeRA adapter (arXiv 2310.11454). Names and defaults are those of PEFT's ``VeraConfig``. It also has the
    fields of :class:`AdapterConfig`.

    Args:
        r: rank of each layer's update: the rows of A and B, the frozen random projections that all layers share.
        projection_prng_key: seed of these projections, a signed 64-bit integer. The same key gives the same bits on every
            device, but not the projections that PEFT draws with it.
        save_projection: whether files contain the projections. If False, loading draws them again from the key, bit for bit.
        vera_dropout: dropout probability of the update's input during training.
        d_initial: initial value of the vectors ``d`` (the paper's table 6).
        init_weights: False initializes ``d`` with normal numbers and the vectors ``e`` (the paper's b) with ones instead of
            zeros, so that the update is not zero, for tests.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has the wrong type.
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
        check_seed("projection_prng_key", self.projection_prng_key)
        self._check_numbers("d_initial")
        self._check_flags("save_projection", "init_weights")
