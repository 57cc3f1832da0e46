"""One run: a language model, adapted, trained on prompts with their completions, and what it then makes of others."""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from .. import models
from .adapting import NOTHING, Optimization, adapt, as_stored, exhausted, mean_losses, shuffled
from .methods import Recipe
from .texts import Pair, Prompt, TextTask

_NO_LABEL = -100
_SHOTS_APART = "\n\n"


@dataclass(frozen=True)
class Settings:
    model: Path  # a folder, or a GGUF file
    bfloat16: bool
    steps: int = 600
    batch_size: int = 8
    max_new_tokens: int = 80
    beams: tuple[int, ...] = (1, 4)


def run(task: TextTask, recipe: Recipe, seed: int, settings: Settings) -> dict:
    """Trains; then the loss of ``task.dev``, and how near completions of ``task.prompts`` come to their references."""
    transformers.set_seed(seed)
    tokenizer, base = _load(settings.model)
    model = models.twin(base)
    prefix, losses, stored, begin = "", [], NOTHING, time.perf_counter()
    if recipe.method is None:
        prefix = _shots(task, recipe.config.get("shots", 0), seed)
    else:
        losses = _train(model, task, recipe, seed, settings, tokenizer)
        stored = as_stored(model, recipe)
    seconds = time.perf_counter() - begin
    model.eval()
    dev = _Rows([pair._replace(prompt=prefix + pair.prompt) if prefix else pair for pair in task.dev], tokenizer)
    scores = {"loss": _loss(model, dev, settings)}
    for beams in settings.beams if task.prompts else ():
        texts = _complete(model, [prefix + prompt.text for prompt in task.prompts], beams, settings, tokenizer)
        if beams == settings.beams[0]:
            examples = texts[:3]
        name = "" if beams == 1 else f", {beams} beams"
        scores |= {metric + name: score for metric, score in _compare(texts, task.prompts).items()}
    return {
        "score": -scores["loss"],
        "scores": scores,
        **stored,
        "seconds": seconds,
        "steps": len(losses),
        "losses": mean_losses(losses),
        "exhausted": exhausted(model),
        "examples": examples if task.prompts else [],
    }


def steps_of(task: TextTask, settings: Settings) -> int:
    return settings.steps


@lru_cache(maxsize=1)
def _load(path: Path) -> tuple[transformers.PreTrainedTokenizerBase, nn.Module]:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder, file = (path, None) if path.is_dir() else (path.parent, path.name)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file,
        dtype=torch.float32,
        attn_implementation="eager",  # for sequences as short as these its backward takes less time on a processor
    )
    return tokenizer, model.requires_grad_(False)


def _train(model: nn.Module, task: TextTask, recipe: Recipe, seed: int, settings: Settings, tokenizer) -> list[Tensor]:
    groups = adapt(model, recipe, seed)
    optimization = Optimization(groups, recipe.warm_up, settings.steps)
    rows, losses = _Rows(task.train, tokenizer), []
    model.train()
    for batch, labels in rows.batches(settings, seed):
        losses.append(optimization.step(_losses(model, batch, labels, settings).mean()))
    return losses


def _losses(model: nn.Module, batch: dict[str, Tensor], labels: Tensor, settings: Settings) -> Tensor:
    """The loss of each token that a completion has."""
    kept = labels.shape[1]  # completions end together, on the right
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
        logits = model(**batch, logits_to_keep=kept + 1, use_cache=False).logits[:, :-1]
    told = labels != _NO_LABEL
    return nn.functional.cross_entropy(logits[told].float(), labels[told], reduction="none")


@torch.inference_mode()
def _loss(model: nn.Module, rows: "_Rows", settings: Settings) -> float:
    losses = [_losses(model, batch, labels, settings) for batch, labels in rows.in_order(4 * settings.batch_size)]
    return float(torch.cat(losses).double().mean())


@torch.inference_mode()
def _complete(model: nn.Module, prompts: list[str], beams: int, settings: Settings, tokenizer) -> list[str]:
    """The line that follows each prompt."""
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    ends = [tokenizer.eos_token_id, *tokenizer("\n", add_special_tokens=False)["input_ids"]]
    size, texts = max(1, 8 * settings.batch_size // beams), {}
    for start in range(0, len(rows), size):
        part = by_length[start : start + size]
        batch = _padded([rows[row] for row in part], tokenizer)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
            made = model.generate(
                **batch,
                do_sample=False,
                num_beams=beams,
                max_new_tokens=settings.max_new_tokens,
                eos_token_id=ends,
                pad_token_id=tokenizer.eos_token_id,
            )
        made = tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        texts |= dict(zip(part, made, strict=True))
    return [texts[row].strip().split("\n")[0].strip() for row in range(len(rows))]


def _compare(texts: list[str], prompts: list[Prompt]) -> dict[str, float]:
    """Corpus BLEU and chrF; ROUGE-L of each by the reference that is nearest, and of that the mean. All times 100."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    most = max(len(prompt.references) for prompt in prompts)
    padded = [[*prompt.references, *[None] * (most - len(prompt.references))] for prompt in prompts]
    references = [list(column) for column in zip(*padded, strict=True)]
    rouge = RougeScorer(["rougeL"])
    nearest = [
        rouge.score_multi(prompt.references, text)["rougeL"].fmeasure
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    return {
        "BLEU": sacrebleu.corpus_bleu(texts, references).score,
        "chrF": sacrebleu.corpus_chrf(texts, references).score,
        "ROUGE-L": 100 * sum(nearest) / len(nearest),
    }


def _shots(task: TextTask, count: int, seed: int) -> str:
    """That many training rows, to go before a prompt."""
    pairs = random.Random(seed).sample(task.train, count)
    return "".join(f"{pair.prompt}{pair.completion}{_SHOTS_APART}" for pair in pairs)


def _padded(rows: list[list[int]], tokenizer) -> dict[str, Tensor]:
    """On the left, so that all end together."""
    longest = _rounded(max(map(len, rows)))
    ids = [[tokenizer.eos_token_id] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def _rounded(length: int) -> int:
    """Up to a multiple of 8: for each shape that is new to it, oneDNN compiles kernels, which takes longer than the step."""
    return -(-length // 8) * 8


class _Rows:
    """Tokens of prompts and of completions, which the end of the text belongs to."""

    def __init__(self, pairs: list[Pair], tokenizer) -> None:
        self.tokenizer = tokenizer
        self.prompts = [self._tokens(self._text(pair.prompt)) for pair in pairs]
        self.completions = [[*self._tokens(pair.completion), tokenizer.eos_token_id] for pair in pairs]
        self.lengths = [len(p) + len(c) for p, c in zip(self.prompts, self.completions, strict=True)]

    def _text(self, prompt: str | tuple[str, ...]) -> str:
        if isinstance(prompt, str):
            return prompt
        roles = ("user", "assistant")
        turns = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(prompt)]
        return self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def _batch(self, rows: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        longest = _rounded(max(len(self.completions[row]) for row in rows))
        labels = [[_NO_LABEL] * (longest - len(self.completions[row])) + self.completions[row] for row in rows]
        batch = _padded([self.prompts[row] + self.completions[row] for row in rows], self.tokenizer)
        return batch, torch.tensor(labels)

    def batches(self, settings: Settings, seed: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        done, epoch = 0, 0
        while done < settings.steps:
            for rows in shuffled(self.lengths, settings.batch_size, random.Random(f"{seed} {epoch}")):
                if done < settings.steps:
                    yield self._batch(rows)
                    done += 1
            epoch += 1

    def in_order(self, size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        order = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        yield from (self._batch(order[i : i + size]) for i in range(0, len(order), size))
