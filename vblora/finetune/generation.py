"""Completions of prompts, in batches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .stopping import tokens

Tokens = list[int]


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    num_beams: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    adapter_names: Sequence[str | None] | None = None,
    ends: Sequence[int] = (),
    title: str | None = None,
) -> list[str]:
    """What the model writes after each prompt, until it ends or has ``max_new_tokens``.

    Of the model's own settings for generation, only the tokens that end a text apply.

    Args:
        temperature: 0 takes the most likely token each time (or the best of ``num_beams``); above 0 draws.
        adapter_names: the adapter of each prompt, or None for the base model's.
        ends: tokens that end a completion, besides those that the tokenizer and the model name.
        title: of the progress bar; without one there is none.
    """
    texts = [""] * len(prompts)
    options: dict[str, Any] = {"do_sample": temperature > 0, "num_beams": num_beams, "top_k": None}
    options |= {"temperature": temperature, "top_p": top_p} if temperature > 0 else {"temperature": None, "top_p": None}
    was_training = model.training
    model.eval()
    progress = tqdm(total=len(prompts), desc=title, disable=title is None, leave=False)
    with torch.no_grad(), progress, _without_settings(model) as ends_of_model:
        for rows in _batches(prompts, batch_size):
            width = max(len(prompts[row]) for row in rows)
            padding = [width - len(prompts[row]) for row in rows]
            pad = tokenizer.pad_token_id
            ids = [[pad] * count + prompts[row] for row, count in zip(rows, padding, strict=True)]
            mask = [[0] * count + [1] * (width - count) for count in padding]
            if adapter_names is not None:
                options["adapter_names"] = [adapter_names[row] for row in rows]
            out = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max_new_tokens,
                use_cache=True,
                pad_token_id=pad,
                eos_token_id=sorted({*ends_of_model, *ends} | ({tokenizer.eos_token_id} - {None})),
                **options,
            )
            for row, text in zip(rows, tokenizer.batch_decode(out[:, width:], skip_special_tokens=True), strict=True):
                texts[row] = text
            progress.update(len(rows))
    model.train(was_training)
    return texts


def _batches(prompts: Sequence[Tokens], size: int) -> Iterator[list[int]]:
    """Rows of similar length together, which need less padding."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


@contextmanager
def _without_settings(model: PreTrainedModel) -> Iterator[list[int]]:
    """Within it, the model's ``generation_config.json`` does not apply. Yields the tokens with which it ends a text.

    Its ``repetition_penalty`` and the like would otherwise outrank the most likely token, and penalise tokens for the padding of
    the other prompts in the batch.
    """
    stated = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield tokens(stated.eos_token_id)
    finally:
        model.generation_config = stated
