"""What a base model's ``config.json`` says of its weights: which are stored as (in, out), and which are tied."""

from .json_objects import JsonObject

# Models of transformers made of Conv1D, which stores its weight as (in, out). For square weights, shapes do not tell.
_CONV1D_MODELS = ("clvp", "clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")


def stores_in_out(config: JsonObject, name: str) -> bool | None:
    """Whether the linear layers of the part of the model that ``name`` is in are Conv1D; None if the config does not tell."""
    parts = {key: part for key, part in config.items() if isinstance(part, dict) and "model_type" in part}
    for key, part in parts.items():
        if f".{key}." in f".{name}":
            return part["model_type"] in _CONV1D_MODELS
    if config.get("model_type") in _CONV1D_MODELS:
        return True
    types = {part["model_type"] in _CONV1D_MODELS for part in parts.values()}
    return None if True in types or not parts else False


def tied_vocabularies(config: JsonObject) -> set[int]:
    """Sizes of the vocabularies whose embeddings and head are tied when the model is loaded."""
    every = [config, *(part for part in config.values() if isinstance(part, dict))]
    if not any(_is_tied(part) for part in every):
        return set()
    return {size for part in every if isinstance(size := part.get("vocab_size"), int)}


def _is_tied(config: JsonObject) -> bool:
    given = config.get("tie_word_embeddings")
    if given is not None or "model_type" not in config:
        return given is True
    return _class_default(str(config["model_type"]))


def _class_default(model_type: str) -> bool:
    """What a config without ``tie_word_embeddings`` means, which its class decides; True where that is not known."""
    try:
        from transformers import AutoConfig

        return bool(getattr(AutoConfig.for_model(model_type), "tie_word_embeddings", False))
    except (ImportError, ValueError):
        return True
