"""PEFT's config fields that the configs here lack, and PEFT's config objects."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..errors import VBLoRAWarning

_Config = TypeVar("_Config")

# Fields that every config of PEFT has. They describe a file or a model, not the adapter.
PEFT_METADATA = frozenset({"auto_mapping", "base_model_name_or_path", "peft_type", "peft_version", "revision"})
_SILENT = frozenset({"peft_type", "peft_version"})  # PEFT sets these itself

# Fields of PEFT's LoraConfig that have no effect unless others are set.
LORA_NEUTRAL = frozenset({"megatron_core", "qalora_group_size", "runtime_config"})
# Those that change what the adapter computes. Here they must keep PEFT's default, None, False or empty.
LORA_UNSUPPORTED = frozenset(
    {
        *("alora_invocation_tokens", "alpha_pattern", "arrow_config", "corda_config", "eva_config", "kasa_config"),
        "ensure_weight_tying",  # name both layers in `modules_to_save`: what is tied stays tied
        *("layer_replication", "loftq_config", "lora_bias", "lora_ga_config", "megatron_config", "monteclora_config"),
        *("rank_pattern", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora"),
        "velora_config",
    }
)


def accepts_peft_fields(
    *, neutral: frozenset[str] = frozenset(), unsupported: frozenset[str] = frozenset()
) -> Callable[[type[_Config]], type[_Config]]:
    """Has a config take the fields of PEFT's config that it lacks.

    A field that describes a file or is ``neutral`` has no effect; if it is set, a warning says so. An ``unsupported`` one
    must be unset.
    """

    def decorate(config: type[_Config]) -> type[_Config]:
        init = config.__init__

        @functools.wraps(init)
        def accepting_init(self: _Config, *args: Any, **fields: Any) -> None:
            foreign = {name: fields.pop(name) for name in [*fields] if name in PEFT_METADATA | neutral | unsupported}
            _check_peft_type(getattr(config, "peft_type", None), foreign.get("peft_type"))
            for name, value in foreign.items():
                if name in unsupported and value:
                    raise ValueError(
                        f"`{name}` is {value!r}, which vblora does not support. Leave it out, or train with PEFT."
                    )
            init(self, *args, **fields)
            unused = [name for name in foreign if name in PEFT_METADATA - _SILENT and foreign[name]]
            if unused:
                warnings.warn(
                    f"{config.__name__} ignores {' and '.join(f'`{name}`' for name in unused)}: vblora.save writes what the "
                    "model itself says.",
                    VBLoRAWarning,
                    stacklevel=2,
                )

        config.__init__ = accepting_init  # type: ignore[method-assign, assignment]
        return config

    return decorate


def _check_peft_type(own: str | None, given: Any) -> None:
    kind = getattr(given, "value", given)  # PEFT's is an enum
    if kind is not None and kind != own:
        raise ValueError(f"`peft_type` is {kind!r}, but must be {own!r} in this config.")


def from_peft(config: Any, classes: Mapping[str, type[_Config]]) -> _Config | None:
    """The config here for a config object of PEFT's; None if ``config`` is not one of a method in ``classes``.

    Raises:
        ValueError: it sets a field that vblora does not support.
    """
    kind = getattr(config, "peft_type", None)
    kind = getattr(kind, "value", kind)
    of_peft = any(cls.__module__.partition(".")[0] == "peft" for cls in type(config).__mro__)
    if not of_peft or not isinstance(kind, str) or kind not in classes:
        return None
    return classes[kind](**config.to_dict())
