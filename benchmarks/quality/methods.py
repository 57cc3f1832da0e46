"""What is compared: each method's config and learning rates. docs/experiments/recipes.md says how they were found."""

import itertools
import random
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import vblora
from vblora.adapters import Adapter, LoRAAdapter, TiedLoRAAdapter, VBLoRAAdapter, VeRAAdapter
from vblora.model.learning_rates import WARM_UP

CONFIGS = {
    "vblora": vblora.VBLoRAConfig,
    "lora": vblora.LoraConfig,
    "vera": vblora.VeraConfig,
    "tied_lora": vblora.TiedLoraConfig,
}
FROZEN_BANK = "vblora, frozen bank"
_ADAPTERS = {"vblora": VBLoRAAdapter, "lora": LoRAAdapter, "vera": VeRAAdapter, "tied_lora": TiedLoRAAdapter}


@dataclass(frozen=True)
class Recipe:
    """How a method is trained.

    Attributes:
        method: a key of ``CONFIGS``; None leaves the model frozen: an encoder's head trains, a language model is only asked.
        config: fields of its config; of a frozen language model ``shots``, the training rows that go before each prompt.
        rates: arguments of ``vblora.parameter_groups``.
        frozen_bank: VB-LoRA does not train the bank, which is the same for every seed and counts as no parameter of the adapter.
        bank_dtype: the trained bank is rounded as by ``vblora.save(..., form="deploy", bank_dtype=...)``, and then scored.
    """

    method: str | None
    config: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    warm_up: float = 0.06  # share of the steps
    frozen_bank: bool = False
    bank_dtype: str | None = None

    @property
    def settings(self) -> set[str]:
        """The names of what :meth:`changed` may change: learning rates, the warm-up, and fields of the config."""
        if self.method is None:
            return {"warm_up", *self.rates} if self.rates else {"shots"}
        rates = {f"lr_{name}" for name in _ADAPTERS[self.method].RATES["default"]} | {"lr_other"}
        frozen = {"lr_bank"} if self.frozen_bank else set()
        return (rates - frozen) | {"warm_up"} | {f.name for f in fields(CONFIGS[self.method])}

    @property
    def tuned_as(self) -> str | None:
        """The key of what it is tuned by, in ``SPACES`` or ``LANGUAGE_SPACES``."""
        return FROZEN_BANK if self.frozen_bank else self.method

    @property
    def shared(self) -> int:
        """How many of the parameters that ``count_parameters`` calls stored are in the file of a frozen bank."""
        return self.config["num_vectors"] * self.config["vector_length"] if self.frozen_bank else 0

    @property
    def has_seeds(self) -> bool:
        """Whether anything depends on the seed: a language model that is only asked answers the same each time."""
        return self.method is not None or bool(self.rates or self.config.get("shots"))

    def changed(self, settings: dict[str, Any]) -> "Recipe":
        """The same with other values of the settings, each where it belongs by its name.

        Raises:
            ValueError: the method refuses a value.
        """
        own = {name: value for name, value in settings.items() if name == "warm_up"}
        rates = {name: value for name, value in settings.items() if name.startswith("lr_")}
        config = {name: value for name, value in settings.items() if name not in own and name not in rates}
        for name, value in (own | rates).items():
            most = 1 if name == "warm_up" else 100
            if not isinstance(value, (int, float)) or not 0 <= value <= most:
                raise ValueError(f"{name} is {value!r}, but must be a number from 0 to {most}.")
        changed = replace(self, config=self.config | config, rates=self.rates | rates, **own)
        changed._full_config()
        return changed

    def _full_config(self) -> dict[str, Any]:
        """All fields of the config, of which ``config`` has some."""
        try:
            return self.config if self.method is None else asdict(CONFIGS[self.method](**self.config))
        except TypeError as error:
            raise ValueError(str(error)) from None

    def is_same(self, other: "Recipe") -> bool:
        """Whether both mean the same, whatever they say outright."""
        return replace(self, config=self._full_config()) == replace(other, config=other._full_config())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_QUERY_VALUE = {"target_modules": ["query", "value"]}
_ALL = {"target_modules": "all-linear"}
_BANK = {"r": 4, "num_vectors": 236, "vector_length": 128}  # with all-linear, a tenth of what LoRA r=8 stores


# Rates are part of a recipe, and not left to parameter_groups, since a run is found again by what its recipe says. Scales do not
# train in most of them.
def _rates(adapter: type[Adapter], recipe: str = "default") -> dict[str, float]:
    return {f"lr_{name}": rate for name, rate in adapter.RATES[recipe].items() if name != "scales"}


def _lora(targets: dict[str, Any]) -> Recipe:
    config = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.1}
    return Recipe("lora", config | targets, _rates(LoRAAdapter) | {"lr_other": 2e-3}, warm_up=0.15)


def _vera(targets: dict[str, Any]) -> Recipe:
    return Recipe("vera", {"r": 256, "d_initial": 0.03} | targets, _rates(VeRAAdapter) | {"lr_other": 2e-3})


def _vb(targets: dict[str, Any], recipe: str = "default", **config: Any) -> Recipe:
    rates = _rates(VBLoRAAdapter, recipe) | {"lr_other": 2e-3}
    return Recipe("vblora", _BANK | targets | config, rates, warm_up=WARM_UP)


RECIPES = {
    "frozen encoder": Recipe(None, rates={"lr_other": 1e-2}),
    "LoRA r=8": _lora(_ALL),
    "LoRA r=8, query and value": _lora(_QUERY_VALUE),
    "VeRA r=256": _vera(_ALL),
    "VeRA r=256, query and value": _vera(_QUERY_VALUE),
    "Tied-LoRA r=4": Recipe(
        "tied_lora",
        {"r": 4, "lora_alpha": 16} | _ALL,
        _rates(TiedLoRAAdapter) | {"lr_other": 1e-3},
        warm_up=0.15,
    ),
    "VB-LoRA": _vb(_ALL),
    "VB-LoRA, query and value": _vb(_QUERY_VALUE, num_vectors=50),  # a tenth, of the same targets
    "VB-LoRA, h=1024": _vb(_ALL, num_vectors=1024),
    "VB-LoRA, the paper's rates": _vb(_ALL, "paper"),
    "VB-LoRA, dense": _vb(_ALL, num_candidates=None),
    "VB-LoRA, M=64": _vb(_ALL, num_candidates=64),
    "VB-LoRA, M=32": _vb(_ALL, num_candidates=32),
}

# Of SmolLM2-135M, whose widths 192 divides: a tenth of what LoRA r=8 stores, or less.
_LANGUAGE_BANK = {"r": 8, "num_vectors": 1070, "vector_length": 192, "init_vector_bank_bound": 0.05}


def _language_vb(recipe: str) -> Recipe:
    return Recipe("vblora", _LANGUAGE_BANK | _ALL, _rates(VBLoRAAdapter, recipe), warm_up=WARM_UP)


LANGUAGE_RECIPES = {
    "frozen": Recipe(None),
    "frozen, 3 examples": Recipe(None, {"shots": 3}),
    "LoRA r=8": Recipe("lora", {"r": 8, "lora_alpha": 8} | _ALL, _rates(LoRAAdapter, "language")),
    # Its best rate in the search. The default is half of it, because twice of it diverges.
    "VeRA r=256": Recipe("vera", {"r": 256, "d_initial": 0.03} | _ALL, {"lr_vectors": 8e-2}),
    "Tied-LoRA r=24": Recipe("tied_lora", {"r": 24, "lora_alpha": 96} | _ALL, _rates(TiedLoRAAdapter, "language")),
    "VB-LoRA": _language_vb("language"),
    "VB-LoRA, the paper's rates": _language_vb("paper"),
    # A tenth of the bytes of LoRA's float32 file. Fewer sub-vectors use each vector, so the rate of the bank is lower.
    "VB-LoRA, int8 bank": replace(
        _language_vb("language").changed({"num_vectors": 4600, "topk": 1, "num_candidates": 1, "lr_bank": 6e-3}),
        bank_dtype="int8",
    ),
    "VB-LoRA, frozen bank": Recipe(
        "vblora",
        _LANGUAGE_BANK | _ALL | {"r": 32, "num_vectors": 4096, "topk": 1, "num_candidates": 1, "train_scales": True},
        {"lr_scales": 0.3},  # its best rate in the search; twice of it diverges, so the default is lower
        warm_up=WARM_UP,
        frozen_bank=True,
    ),
}

# What is drawn from when a method is tuned: the same number of draws for each.
Space = dict[str, tuple[float, ...]]
_ANY: Space = {"lr_other": (5e-4, 1e-3, 2e-3), "warm_up": (0.06, 0.15, 0.3)}
SPACES: dict[str | None, Space] = {
    None: _ANY,
    "lora": {
        "lr_factors": (3e-4, 5e-4, 7e-4, 1e-3, 1.5e-3, 2e-3),
        "lora_alpha": (8, 16, 32),
        "lora_dropout": (0.0, 0.1),
    },
    "vera": {
        "lr_vectors": (1e-2, 1.5e-2, 2e-2, 3e-2, 4e-2, 6e-2),
        "d_initial": (0.03, 0.1, 0.3),
        "vera_dropout": (0.0, 0.1),
    },
    "tied_lora": {
        "lr_factors": (3e-4, 5e-4, 1e-3, 1.5e-3),
        "lr_vectors": (1e-2, 2e-2, 3e-2, 6e-2),
        "lora_alpha": (4, 8, 16),
        "tied_lora_dropout": (0.0, 0.1),
    },
    "vblora": {
        "lr_bank": (1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3),
        "lr_logits": (0.03, 0.1, 0.3, 0.5, 1.0),
        "init_vector_bank_bound": (0.02, 0.04, 0.08),
        "vblora_dropout": (0.0, 0.1),
    },
}
SPACES = {method: _ANY | space for method, space in SPACES.items()}
_LANGUAGE_ANY: Space = {"warm_up": (0.02, 0.06, 0.15)}
LANGUAGE_SPACES: dict[str | None, Space] = {
    None: {},
    "lora": _LANGUAGE_ANY | {"lr_factors": (1e-3, 2e-3, 4e-3, 8e-3), "lora_alpha": (8, 16)},
    "vera": _LANGUAGE_ANY | {"lr_vectors": (2e-2, 4e-2, 8e-2, 0.16), "d_initial": (0.03, 0.1, 0.3)},
    "tied_lora": _LANGUAGE_ANY
    | {"lr_factors": (1.5e-3, 3e-3, 6e-3), "lr_vectors": (1e-2, 3e-2), "lora_alpha": (24, 48, 96)},
    "vblora": _LANGUAGE_ANY | {"lr_bank": (1.5e-3, 3e-3, 6e-3, 1.2e-2), "lr_logits": (0.05, 0.15, 0.5)},
    FROZEN_BANK: _LANGUAGE_ANY | {"lr_scales": (0.01, 0.03, 0.1, 0.3), "init_vector_bank_bound": (0.05, 0.1)},
}


def draw(recipe: Recipe, space: Space, count: int) -> list[dict[str, Any]]:
    """That many different settings for ``Recipe.changed``, or all that there are. The first is the recipe's own, so it changes
    nothing. The same each time."""
    rng, settings = random.Random(0), [{}]
    every = (dict(zip(space, values, strict=True)) for values in itertools.product(*space.values()))
    others = [drawn for drawn in every if not recipe.changed(drawn).is_same(recipe)] if count > 1 else []
    while len(settings) < min(count, 1 + len(others)):
        drawn = {name: rng.choice(values) for name, values in space.items()}
        if drawn in others and drawn not in settings:
            settings.append(drawn)
    return settings
