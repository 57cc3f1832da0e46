"""The program behind ``vblora generate``."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

import vblora

from ..errors import CommandError, in_options
from ..serving import AdapterStore
from . import models, tables
from .adapters import AdapterRun, read_bank
from .fingerprints import warn_of_another_base
from .generation import complete
from .notices import print_warning
from .outputs import Writer, check_columns
from .texts import Prompt, read_prompt
from .tokens import Encoder

OUTPUT_COLUMN = "generated"
_CHUNK = 16  # batches that are sorted by length together


@dataclass
class Job:
    """What to complete, and with what.

    Attributes:
        folders: the adapters by name.
        runs: what is known of those that are read at once: of all, or with a column of names of the first.
    """

    model: str
    folders: dict[str, Path]
    runs: list[AdapterRun]
    template: str | None


@dataclass
class _Row:
    where: str
    fields: tables.Fields
    prompt: Prompt
    adapter: str | None


def run(arguments: argparse.Namespace, job: Job) -> int:
    """Completes prompts as the arguments of ``vblora generate`` say. Returns the exit code.

    Raises:
        CommandError: the model or an adapter cannot be loaded, or a row is wrong.
    """
    models.quiet()
    set_seed(arguments.seed)
    bank = read_bank(arguments.bank)
    rows = _rows(arguments, job)
    first = next(rows)  # a wrong file is refused before the model is loaded
    tokenizer = models.load_tokenizer(job.model)
    if job.template not in (None, "auto", "none"):
        tokenizer.chat_template = job.template
    model = models.load_language_model(job.model, arguments.precision, arguments.load_in)
    if torch.accelerator.is_available() and arguments.load_in is None:
        model.to(torch.accelerator.current_accelerator())
    for one in job.runs:
        warn_of_another_base(one, model, job.model, "generate")
    _attach(arguments, job, model, bank)
    encoder = Encoder(tokenizer, chat=job.template != "none" and tokenizer.chat_template is not None)
    room = models.room_for_prompt(arguments.max_new_tokens, tokenizer, model)
    for row in _rows(arguments, job, quiet=True):  # all that is wrong is refused before anything is generated
        _check_length(row, encoder, room)
        check_columns(arguments.output, first.fields, row.fields)
    with Writer(arguments.output) as writer:
        chunk = [first, *islice(rows, _CHUNK * arguments.batch_size - 1)]
        while chunk:
            for row, text in zip(chunk, _complete(arguments, encoder, model, chunk), strict=True):
                if arguments.prompt and len(arguments.prompt) == 1 and arguments.output is None:
                    print(text, flush=True)
                else:
                    writer.row(row.fields | {OUTPUT_COLUMN: text})
            chunk = list(islice(rows, _CHUNK * arguments.batch_size))
    return 0


def _check_length(row: _Row, encoder: Encoder, room: int) -> None:
    length = len(encoder.prompt(row.prompt.asked, row.prompt.tools))
    if not length:
        raise CommandError(f"{row.where}: the prompt has no tokens, so there is nothing to complete.")
    if length > room:
        raise CommandError(
            f"{row.where}: the prompt has {length} tokens, but the model has room for at most {room} besides --max-new-tokens. "
            "Shorten the prompt, or lower --max-new-tokens."
        )


def _rows(arguments: argparse.Namespace, job: Job, quiet: bool = False) -> Iterator[_Row]:
    """The rows to complete, checked.

    Args:
        quiet: without the notice that chats are shortened.
    """
    only = next(iter(job.folders)) if len(job.folders) == 1 and arguments.adapter_column is None else None
    for prompt in arguments.prompt or []:
        yield _Row(f"--prompt {prompt!r:.50}", {"prompt": prompt}, Prompt(prompt), only)
    if arguments.data is None:
        return
    columns = {}
    if (named_by := arguments.adapter_column) is not None:
        named_by = columns["--adapter-column"] = tables.find_column(
            named_by, tables.first_row(arguments.data, "--data")
        )
    empty, told = True, quiet
    for where, fields in tables.read(arguments.data, "--data", columns):
        empty = False
        if OUTPUT_COLUMN in fields:
            raise CommandError(f"{where}: there is a column {OUTPUT_COLUMN!r} already. Rename it.")
        prompt = read_prompt(fields, arguments.prompt_column, where)
        if prompt.shortened and not told:
            told = True
            print_warning(
                f"{where}: the chat ends with the assistant, so it is completed from before the assistant's first message, "
                "and the rest is left out; so are other such rows. To complete a chat further, end it with the user.",
                "generate",
            )
        adapter = only
        if named_by is not None:
            named = fields[named_by]
            adapter = str(named) if named not in (None, "") else None
            if adapter is not None and adapter not in job.folders:
                raise CommandError(
                    f"{where}: there is no adapter {adapter!r}; --adapter gives {tables.quoted(sorted(job.folders))}."
                )
        yield _Row(where, fields, prompt, adapter)
    if empty:
        raise CommandError(f"--data: {arguments.data} has no rows.")


def _attach(arguments: argparse.Namespace, job: Job, model: PreTrainedModel, bank: vblora.VectorBank | None) -> None:
    try:
        if arguments.adapter_column is not None:
            rank = max(run.rank for run in job.runs)
            AdapterStore(
                model,
                job.folders,
                bank=[] if bank is None else bank,
                max_rank=rank,
                slots=max(16, arguments.batch_size),
            )
        else:
            for folder in job.folders.values():
                vblora.load(model, folder, bank=bank)
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(f"--adapter: {in_options(error, 'bank')}") from None


def _complete(arguments: argparse.Namespace, encoder: Encoder, model: PreTrainedModel, rows: list[_Row]) -> list[str]:
    tokenizer: PreTrainedTokenizerBase = encoder.tokenizer
    try:
        return complete(
            model,
            tokenizer,
            [encoder.prompt(row.prompt.asked, row.prompt.tools) for row in rows],
            max_new_tokens=arguments.max_new_tokens,
            batch_size=arguments.batch_size,
            num_beams=arguments.num_beams,
            temperature=arguments.temperature,
            top_p=1.0 if arguments.top_p is None else arguments.top_p,
            ends=encoder.ends(),
            adapter_names=None if arguments.adapter_column is None else [row.adapter for row in rows],
            title="Completions" if sys.stderr.isatty() else None,
        )
    except ValueError as error:  # an adapter that the store refuses
        if arguments.adapter_column is None:
            raise
        raise CommandError(f"--adapter: {in_options(error, 'bank')}") from None
