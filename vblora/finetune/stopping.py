"""Has a merged language model stop where its adapter was trained to end: in ``generation_config.json``, which servers read."""

import json
from collections.abc import Iterable
from pathlib import Path

from ..checkpoint.json_objects import Json, JsonObject, as_list, optional_field, read_object

GENERATION_FILE = "generation_config.json"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def generation_settings(base: Path, ends: Iterable[int]) -> dict[str, str]:
    """The file with ``ends`` among its tokens that end a text, by its name; empty if the base model names them all.

    Args:
        base: the base model's folder.
        ends: the tokens that end what the adapter writes.

    Raises:
        ValueError: a file is damaged.
    """
    settings = _settings_of(base)
    stated = tokens(settings.get("eos_token_id"))
    if not set(ends) - {*stated}:
        return {}
    settings["eos_token_id"] = [*stated, *sorted(set(ends) - {*stated})]
    # With it, older versions of transformers would read the model's configuration instead.
    settings.pop("_from_model_config", None)
    return {GENERATION_FILE: json.dumps(settings, indent=2) + "\n"}


def tokens(stated: Json) -> list[int]:
    """What a configuration has as ``eos_token_id``: one token, several or none."""
    if stated is None:
        return []
    return as_list("`eos_token_id`", stated if isinstance(stated, list) else [stated], int)


def _settings_of(base: Path) -> JsonObject:
    """The base model's settings, or those that transformers takes from its configuration if it has none."""
    try:
        return read_object(base / GENERATION_FILE)
    except FileNotFoundError:
        pass
    try:
        config = read_object(base / "config.json")
    except FileNotFoundError:
        return {}
    config = optional_field(config, "text_config", dict, {}) | config
    return {name: config[name] for name in _TOKENS if config.get(name) is not None}
