"""Calls of other packages that would leave out ``adapter_names`` without a word, or give the names to other rows."""

from typing import Any

from .mixed_batch import ARGUMENT
from .peft_guard import check_before


def guard_names() -> None:
    """Has these calls refuse the names, if their packages are imported. This stays."""
    check_before("transformers.generation.utils", "GenerationMixin", "generate_batch", _refuse_in_batches)
    check_before("transformers.pipelines.base", "Pipeline", "__call__", _refuse_without_generate)
    check_before("sentence_transformers.cross_encoder.model", "CrossEncoder", "predict", _refuse_sorted)


def _refuse_in_batches(_model: object, *_: Any, **kwargs: Any) -> None:
    if ARGUMENT in kwargs:
        raise ValueError(
            f"`{ARGUMENT}` is given to `generate_batch`, which packs the prompts of several rows into one. Call `generate`."
        )


def _refuse_without_generate(pipeline: Any, *_: Any, **kwargs: Any) -> None:
    if ARGUMENT in kwargs and not getattr(pipeline, "_pipeline_calls_generate", False):
        raise ValueError(
            f"`{ARGUMENT}` is given to a {type(pipeline).__name__}, which does not pass it on to the model. Call the model with "
            "it, on what the tokenizer returns."
        )


def _refuse_sorted(encoder: Any, *_: Any, **kwargs: Any) -> None:
    if ARGUMENT in kwargs:
        raise ValueError(
            f"`{ARGUMENT}` is given to `{type(encoder).__name__}.predict`, which sorts the pairs by length and does not pass it "
            "on to the model. Call the model with it, on what the tokenizer returns."
        )
