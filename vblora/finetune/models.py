"""Models and tokenizers by folder, by name on the Hub, or from a GGUF file."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import CommandError

# What configurations call the number of positions that a model can tell apart.
_POSITION_LIMITS = ("max_position_embeddings", "max_encoder_position_embeddings", "max_seq_len", "n_positions")


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a padding token.

    Raises:
        CommandError: there is none, or it has no token to pad with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(*_place(model), **_gguf(model))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CommandError(
            f"--model: no tokenizer can be loaded from {_named(model)}: {first_sentence(error)}"
        ) from None
    if tokenizer.pad_token is None:  # as with most decoders
        if tokenizer.eos_token is None:
            raise CommandError(
                f"--model: the tokenizer of {model!r} has neither a padding token nor an end-of-text token to pad with."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def skeleton(auto: Any, model: str) -> PreTrainedModel | None:
    """A model of a class like ``AutoModelForCausalLM`` on the meta device, from its config alone. None if that fails;
    :func:`load_model` says why."""
    try:
        config = transformers.AutoConfig.from_pretrained(*_place(model), **_gguf(model))
        with torch.device("meta"):
            return auto.from_config(config)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError, RuntimeError):
        return None


def load_model(auto: Any, model: str, what: str, load_in: str | None = None, **options: Any) -> PreTrainedModel:
    """A model of a class like ``AutoModelForCausalLM``.

    Args:
        what: what the model is, for messages.
        load_in: "4bit" or "8bit" quantises its linear layers as they are loaded, by bitsandbytes.

    Raises:
        CommandError: it cannot be loaded.
    """
    if load_in is not None:
        if find_spec("bitsandbytes") is None:
            raise CommandError("--load-in: the package bitsandbytes is not installed. pip install bitsandbytes")
        four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": options["dtype"]} if load_in == "4bit" else {}
        options["quantization_config"] = transformers.BitsAndBytesConfig(**{f"load_in_{load_in}": True}, **four)
    try:
        loaded: PreTrainedModel = auto.from_pretrained(*_place(model), **_gguf(model), **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CommandError(f"--model: no {what} can be loaded from {_named(model)}: {first_sentence(error)}") from None
    loaded.config._name_or_path = model  # of a GGUF file, transformers keeps only the folder
    return loaded


def load_language_model(model: str, precision: str, load_in: str | None = None) -> PreTrainedModel:
    """A language model with weights in the dtype in which it computes with ``precision`` (:func:`computes_in_bfloat16`).

    Raises:
        CommandError: as :func:`load_model`.
    """
    dtype = torch.bfloat16 if computes_in_bfloat16(precision) else torch.float32
    return load_model(transformers.AutoModelForCausalLM, model, "language model", load_in, dtype=dtype)


def _named(model: str) -> str:
    return repr(model) if Path(model).exists() else f"{model!r}, which is no folder here, so it is a name on the Hub"


def _place(model: str) -> tuple[str]:
    return (str(Path(model).parent),) if model.endswith(".gguf") else (model,)


def _gguf(model: str) -> dict[str, str]:
    if not model.endswith(".gguf"):
        return {}
    if find_spec("gguf") is None:
        raise CommandError("--model: the package gguf, which reads .gguf files, is not installed. pip install gguf")
    return {"gguf_file": Path(model).name}


def max_length(wanted: int | None, default: int, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """The number of tokens to read of a text."""
    limit = _limit(tokenizer, model)
    if wanted is not None and wanted > limit:
        raise CommandError(f"--max-length: is {wanted}, but this model reads at most {limit} tokens.")
    return wanted or min(default, limit)


def room_for_prompt(new_tokens: int, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """The longest prompt, in tokens, after which the model can still write ``new_tokens``.

    Raises:
        CommandError: there is no such prompt.
    """
    limit = _limit(tokenizer, model)
    if new_tokens >= limit:
        raise CommandError(
            f"--max-new-tokens: is {new_tokens}, but this model takes at most {limit} tokens, the prompt included."
        )
    return limit - new_tokens


def _limit(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """How many tokens a text may have."""
    return min([tokenizer.model_max_length, *_position_limits(model)])


def _position_limits(model: PreTrainedModel) -> list[int]:
    """How many tokens the model's positions allow; nothing for a model without a limit, such as T5 or XLNet."""
    config = model.config.get_text_config()
    stated = [getattr(config, name, None) for name in _POSITION_LIMITS]
    limits = [limit for limit in stated if isinstance(limit, int) and limit > 0]  # XLNet states -1
    for name, module in model.named_modules():
        # RoBERTa and its like count positions from the one after that of padding.
        if name.endswith("position_embeddings") and isinstance(getattr(module, "padding_idx", None), int):
            limits.append(module.weight.shape[0] - module.padding_idx - 1)
    return limits


def computes_in_bfloat16(precision: str) -> bool:
    """Whether layers compute in bfloat16: if told so, or with "auto" on hardware that is fast at it."""
    if precision != "auto":
        return precision == "bfloat16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: Mapping[str, object] = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def first_sentence(error: Exception) -> str:
    """The cause in a message of transformers, without the advice about the Hub that follows it."""
    text = " ".join(str(error).split())
    return (text or type(error).__name__).split(". ")[0].rstrip(".") + "."


def quiet() -> None:
    """Has transformers print neither its own progress nor its hints."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading weights; the Trainer has its own
