"""``vblora finetune --task causal-lm``: TRL's SFTTrainer, held-out loss and completions before and after."""

import argparse
import json
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

import vblora

from .. import distributed
from ..errors import CommandError
from ..integrations.transformers import trainer_arguments
from ..model.lookup import attached_adapter
from ..model.parameters import ParameterCount
from . import fitting, injection, models
from .checkpoints import check_base
from .fingerprints import fingerprint
from .generation import complete
from .notices import is_main_process, print_warning, say
from .report import Generation, LanguageResults, folder_bytes, lora_bytes, print_generations, print_language_table
from .scores import bleu
from .task import LanguageTask, save_results
from .texts import Example, Message, Texts
from .tokens import IGNORED, Encoder

MAX_LENGTH = 1024
_LARGEST_EXPONENT = 709.0  # of e, in a float
_SHOWN = 3  # completions before and after
_FEATURES = datasets.Features(
    {"input_ids": datasets.List(datasets.Value("int32")), "labels": datasets.List(datasets.Value("int32"))}
)


def run(arguments: argparse.Namespace, task: LanguageTask, checkpoint: str | None) -> int:
    """Trains and evaluates as the arguments of ``vblora finetune`` say. Returns the exit code.

    Args:
        checkpoint: to go on from.

    Raises:
        CommandError: the model or the adapter cannot be made, training diverges or is interrupted, or the saved adapter
            computes something else than the trained one.
    """
    models.quiet()
    datasets.disable_progress_bars()
    set_seed(arguments.seed)
    tokenizer = models.load_tokenizer(task.model)
    encoder = make_encoder(arguments, tokenizer, task)
    injection.check_fits(arguments, models.skeleton(AutoModelForCausalLM, task.model))
    model = models.load_language_model(task.model, arguments.precision, arguments.load_in)
    length = models.max_length(arguments.max_length, MAX_LENGTH, tokenizer, model)
    room = models.room_for_prompt(arguments.max_new_tokens, tokenizer, model)
    if arguments.packing:
        _refuse_if_packed_rows_mix(model)
    task.fingerprint = fingerprint(model)
    check_base(checkpoint, task)
    injection.inject(arguments, model)
    refuse_head(model)
    with tempfile.TemporaryDirectory(prefix="vblora-") as scratch:
        train, held_out = Rows(task.train), Rows(task.held_out)
        # Whole texts that are packed are cut into pieces; all else is cut off.
        plain = task.columns.kind == "text"
        cut_train = None if arguments.packing and plain else length
        train_data = train.tokenize(encoder, cut_train, f"{scratch}/train")
        held_out_data = held_out.tokenize(encoder, length, f"{scratch}/held_out")
        for rows in (train, held_out):
            rows.report(length)
        trainer = _trainer(arguments, model, tokenizer, train_data, held_out_data, length)
        few = fitting.warn_of_few_steps(arguments, len(train_data), _steps(trainer), language=True)
        asking = replace(encoder, chat=False) if plain else encoder
        examples = _first_prompts(task.held_out, max(_SHOWN, arguments.bleu or 0), asking)
        generate = _Generator(arguments, asking, examples, min(length, room))
        say("Before training:")
        with vblora.disabled(model):
            before = trainer.evaluate()["eval_loss"]
            written_before = generate(model, "Completions before")
        count = vblora.count_parameters(model)
        say(f"  held-out loss {before:.4f}, perplexity {_perplexity(before):.2f}")
        seconds = fitting.fit(arguments, task, trainer, checkpoint)
        with fitting.saved_in(arguments.output):
            # of the best epoch, which is loaded
            best = trainer.state.best_metric
            after = trainer.evaluate()["eval_loss"] if best is None else best
            same = _reload(arguments, trainer, held_out_data)
            written_after = generate(trainer.model, "Completions after")
    if not is_main_process():
        return 0
    with fitting.saved_in(arguments.output):
        results = _results(arguments, trainer, count, train, held_out, seconds)
        results.loss_before, results.loss_after = before, after
        results.perplexity_before, results.perplexity_after = _perplexity(before), _perplexity(after)
        if arguments.bleu is not None and examples:
            references = [reference for _, reference in examples[: arguments.bleu]]
            results.bleu_before, results.bleu_after = (
                bleu(written[: arguments.bleu], references) for written in (written_before, written_after)
            )
        results.generations = [
            Generation(_as_text(prompt), reference[0], one, other)
            for (prompt, reference), one, other in zip(examples[:_SHOWN], written_before, written_after, strict=False)
        ]
        results.warnings = [few] if few else []
        bank = fitting.draw(arguments, trainer)
        save_results(arguments, task, bank=bank, results=results.as_json(), log=trainer.state.log_history)
    console = Console()
    print_generations(results.generations, console)
    print_language_table(results, console)
    if not same:
        raise CommandError(
            f"the adapter in {arguments.output}, loaded again, gives other logits than the trained one.", 1
        )
    print(f"Loaded again from {arguments.output}: the same logits, bit for bit.")
    fitting.print_next(arguments, "generate", '--prompt "..."')
    return 0


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf


class TokenLoss(Trainer):  # type: ignore[misc]  # transformers is not typed
    """A Trainer whose held-out loss is the mean over tokens, each of which counts once. The Trainer's own is one over batches."""

    _sums: Tensor | None = None  # of the negative log-likelihoods, and of the tokens

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None, None]:
        inputs = dict(self._prepare_inputs(inputs))
        batch = self.accelerator.gradient_state
        if batch.end_of_dataloader and batch.remainder > 0:
            first = self.accelerator.process_index * self.args.eval_batch_size
            inputs["labels"] = inputs["labels"].masked_fill(rows_of(inputs) + first >= batch.remainder, IGNORED)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, dict(inputs)).detach().double()
        # A label is learnt from the token before it, so the first of a row is not.
        count = (inputs["labels"][:, 1:] != IGNORED).sum().to(loss)
        loss = torch.where(count > 0, loss, 0.0)
        sums = self.accelerator.reduce(torch.stack([loss * count, count]), "sum")
        self._sums = sums if self._sums is None else self._sums + sums
        return loss.float(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._sums = None
        with _without_router_loss(self):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._sums is not None:
            likelihood, count = self._sums.tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = likelihood / max(count, 1)
        return output


@contextmanager
def _without_router_loss(trainer: TokenLoss) -> Iterator[None]:
    """Within it, a mixture of experts has the loss of its tokens alone, without that which balances its experts in training."""
    places = [(trainer, "aux_loss_enabled"), (trainer.model.config.get_text_config(), "output_router_logits")]
    before = [(place, name, getattr(place, name)) for place, name in places if hasattr(place, name)]
    for place, name, _ in before:
        setattr(place, name, False)
    try:
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def rows_of(inputs: Mapping[str, Tensor]) -> Tensor:
    """The number of the row that each token of a batch is of. Of several processes, the last batch is filled up with rows that
    were evaluated before."""
    if "attention_mask" in inputs:
        return torch.arange(len(inputs["labels"]), device=inputs["labels"].device)[:, None]
    return (inputs["position_ids"] == 0).cumsum(-1) - 1  # as --packing has them: one after the other, in one row


class _Trainer(TokenLoss, SFTTrainer):  # type: ignore[misc]  # TRL is not typed
    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: TRL's card knows neither the base model nor the adapter. ``vblora.save`` writes ours."""


@dataclass
class Rows:
    """Texts and, once they are tokenised, how many of them were too long."""

    texts: Texts
    cut: int = 0
    left_out: int = 0

    def tokenize(self, encoder: Encoder, length: int | None, folder: str) -> datasets.Dataset:
        """The rows as tokens, in a file that the data set reads as it is needed: they may be larger than memory."""
        try:
            return datasets.Dataset.from_generator(
                lambda: self._tokens(encoder, length),
                features=_FEATURES,
                cache_dir=folder,
                fingerprint="vblora",  # the folder is this run's own
            )
        except datasets.exceptions.DatasetGenerationError as error:  # hides what a row is refused for
            raise error.__cause__ or error from None
        except ValueError:  # datasets refuses to make an empty one
            if self.left_out < len(self.texts):
                raise
            raise CommandError(
                f"--max-length: none of the {self.left_out} rows of {self.texts.path} has anything to learn in its first "
                f"{length} tokens. Raise --max-length."
            ) from None

    def _tokens(self, encoder: Encoder, length: int | None) -> Iterator[dict[str, list[int]]]:
        for example in self.texts:
            tokens, labels = encoder.encode(example)
            if length is not None and len(tokens) > length:
                self.cut += 1
                tokens, labels = tokens[:length], labels[:length]
            if all(label == IGNORED for label in labels[1:]):
                self.left_out += 1
                continue
            yield {"input_ids": tokens, "labels": labels}

    def report(self, length: int, command: str = "finetune", which: str = "") -> None:
        """Says what was cut, of ``which`` rows."""
        total = len(self.texts)
        if self.cut:
            left_out = (
                f"; {self.left_out} of them are left out, because nothing to learn remains" if self.left_out else ""
            )
            print_warning(
                f"{self.cut} of {total} rows{which} are longer than {length} tokens and are cut off{left_out}.", command
            )


def make_encoder(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, task: LanguageTask) -> Encoder:
    """How rows become tokens. Sets the tokenizer's chat template if one is given, and tells the task how completions end."""
    if task.template is not None:
        tokenizer.chat_template = task.template
    messages = any(not isinstance(example.completion, str) for example in _first(task.train, 1))
    if messages and tokenizer.chat_template is None:
        raise CommandError(
            f"--chat-template: the rows are chats, but the tokenizer of {task.model!r} has none. Give a file with one."
        )
    if tokenizer.eos_token_id is None:
        raise CommandError(f"--model: the tokenizer of {task.model!r} has no token that ends a text.")
    chat = arguments.chat_template != "none" and tokenizer.chat_template is not None
    encoder = Encoder(tokenizer, chat, arguments.loss)
    task.ends = sorted({tokenizer.eos_token_id, *encoder.ends()})
    if not chat:
        _warn_of_joined(_first(task.train, 100))
    if (messages or (chat and task.columns.kind == "prompt")) and not encoder.ends():
        print_warning(
            "the chat template ends what the assistant says without a special token, so the model does not learn to stop. Give "
            "another --chat-template."
        )
    return encoder


def _warn_of_joined(examples: list[Example]) -> None:
    """Says so if no space is between plain prompts and completions, which the model would learn."""
    pairs = [(one.prompt, one.completion) for one in examples if isinstance(one.prompt, str)]
    ends = [prompt[-1] + str(completion)[0] for prompt, completion in pairs]
    if ends and all(end.isascii() and not end[0].isspace() and end[1].isalnum() for end in ends):
        prompt, completion = pairs[0]
        print_warning(
            f"no space is between prompts and completions: {prompt[-20:] + str(completion)[:20]!r}. Without a chat template, "
            "they are joined as they are: begin each completion with a space or a line break."
        )


def _first(texts: Texts, count: int) -> list[Example]:
    return [example for example, _ in zip(texts, range(count), strict=False)]


def _first_prompts(texts: Texts, count: int, encoder: Encoder) -> list[tuple[Example, list[str]]]:
    """The first different prompts, each with all completions that there are for it: ``(example, references)``.

    A text of a single character leaves a prompt without tokens, which is no prompt.
    """
    found: dict[str, tuple[Example, list[str]]] = {}
    for example in texts:
        if example.prompt is None:
            example = _halved(example)
        key = repr(example.prompt)
        if key not in found:
            if len(found) == count or not encoder.prompt(example.prompt or "", example.tools):
                continue
            found[key] = (example, [])
        found[key][1].append(_reference(example))
    return list(found.values())


def _halved(example: Example) -> Example:
    """The first words of a text as a prompt, and the others; of a text without spaces, as in Chinese, its first characters."""
    text = str(example.completion)
    start = text[: len(text) - len(text.lstrip())]
    words = text.lstrip().split(" ")
    asked = start + " ".join(words[: min(len(words) // 2, 16)])
    if len(words) == 1:
        asked = text[: min(len(text) // 2, 64)]
    return Example(asked, text[len(asked) :])


def _reference(example: Example) -> str:
    if isinstance(example.completion, str):
        return example.completion
    return next(_said(message) for message in example.completion if message["role"] == "assistant")


def _said(message: Message) -> str:
    """The text of a message, or else its tool calls."""
    return str(message.get("content") or json.dumps(message.get("tool_calls"), ensure_ascii=False))


def _as_text(example: Example) -> str:
    if isinstance(example.prompt, list):
        return "\n".join(f"{message['role']}: {_said(message)}" for message in example.prompt)
    return example.prompt or ""


class _Generator:
    """Completes the same prompts before and after. Several processes share the work."""

    def __init__(
        self, arguments: argparse.Namespace, encoder: Encoder, examples: list[tuple[Example, list[str]]], room: int
    ) -> None:
        self.arguments = arguments
        self.tokenizer = encoder.tokenizer
        self.ends = encoder.ends()
        self.prompts = [encoder.prompt(example.prompt or "", example.tools)[-room:] for example, _ in examples]

    def __call__(self, model: PreTrainedModel, title: str) -> list[str]:
        written = complete(
            model,
            self.tokenizer,
            self.prompts[distributed.rank() :: distributed.processes()],
            max_new_tokens=self.arguments.max_new_tokens,
            batch_size=self.arguments.batch_size,
            ends=self.ends,
            title=title if is_main_process() else None,
        )
        shares: list[list[str]] = gather_object([written])
        return [text for turn in zip_longest(*shares) for text in turn if text is not None]


def refuse_head(model: PreTrainedModel) -> None:
    """TRL computes the loss from the head's weight, past any adapter of it."""
    head = model.get_output_embeddings()
    names = {name for name, module in model.named_modules() if module is head}
    adapted = names & {target.name for target in attached_adapter(model).adapter.targets}
    if adapted:
        raise CommandError(
            f"--target-modules: {adapted.pop()} is the model's head, which SFTTrainer cannot train. Leave it out."
        )


def _refuse_if_packed_rows_mix(model: PreTrainedModel) -> None:
    """Refuses a model that takes packed rows for one text: their positions start anew, but not every model looks at that."""
    model.eval()
    ids = torch.arange(1, 9, device=model.device)[None] % model.config.get_text_config().vocab_size
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=model.device)
    with torch.no_grad():
        alone = model(input_ids=ids[:, 4:], use_cache=False).logits.float()
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 4:].float()
    if (alone - packed).norm() > 0.02 * alone.norm():
        raise CommandError(f"--packing: {type(model).__name__} does not keep packed rows apart. Leave it out.")


def _trainer(
    arguments: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: datasets.Dataset,
    held_out: datasets.Dataset,
    length: int,
) -> _Trainer:
    settings = fitting.training_arguments(
        SFTConfig,
        arguments,
        per_device_eval_batch_size=arguments.batch_size,
        max_length=length,
        packing=arguments.packing,
        packing_strategy="bfd_split",
        eval_packing=False,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=max(1, len(train) * arguments.epochs // (arguments.batch_size * arguments.accumulate) // 500),
        prediction_loss_only=True,
    )
    how = trainer_arguments(model, **fitting.rates(arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return _Trainer(model, settings, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer, **how)


def _steps(trainer: _Trainer) -> int:
    """The number of steps that the Trainer will make."""
    loader = trainer.get_train_dataloader()
    a_epoch = max(1, math.ceil(len(loader) / trainer.args.gradient_accumulation_steps))
    return math.ceil(a_epoch * trainer.args.num_train_epochs)


def _reload(arguments: argparse.Namespace, trainer: _Trainer, rows: datasets.Dataset) -> bool:
    """Puts the saved adapter in the place of the trained one. Whether a few rows get the same logits, bit for bit."""
    if not is_main_process():
        return True
    model = trainer.model.eval()
    ids = [torch.tensor([row["input_ids"]], device=model.device) for row in rows.select(range(min(4, len(rows))))]
    with torch.no_grad():
        trained = [model(input_ids=one).logits for one in ids]
        vblora.eject(model)
        vblora.load(model, arguments.output, bank=arguments.bank)
        again = [model(input_ids=one).logits for one in ids]
    return all(torch.equal(one, other) for one, other in zip(trained, again, strict=True))


def _results(
    arguments: argparse.Namespace,
    trainer: _Trainer,
    count: ParameterCount,
    train: Rows,
    held_out: Rows,
    seconds: float | None,
) -> LanguageResults:
    adapter = attached_adapter(trainer.model).adapter
    layers = [(target.in_features, target.out_features) for target in adapter.targets]
    return LanguageResults(
        train_rows=len(train.texts) - train.left_out,
        held_out_rows=len(held_out.texts) - held_out.left_out,
        cut_rows=train.cut + held_out.cut,
        left_out_rows=train.left_out + held_out.left_out,
        tokens=_tokens_seen(trainer.state.log_history),
        seconds_per_step=seconds,
        steps=trainer.state.global_step,
        best_epoch=fitting.best_epoch(trainer),
        trainable=count.trainable,
        stored=fitting.stored(arguments, trainer.model, count),
        file_bytes=folder_bytes(arguments.output),
        lora_bytes=lora_bytes(layers, 0),
    )


def _tokens_seen(log: list[dict[str, float]]) -> int:
    """How many tokens were trained on, by the Trainer's log. Its count begins anew where training was resumed."""
    counts = [int(entry["num_tokens"]) for entry in log if "num_tokens" in entry]
    ends = [one for one, following in zip(counts, [*counts[1:], 0], strict=True) if following < one]
    return sum(ends)
