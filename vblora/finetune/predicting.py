"""The program behind ``vblora predict``."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

import vblora

from ..errors import CommandError, in_options
from . import models, tables
from .adapters import AdapterRun, read_bank
from .data import Columns, Row
from .fingerprints import warn_of_another_base
from .heads import Head, find_head
from .outputs import Writer, check_columns
from .training import MAX_LENGTH, load_model, tokenize, warn_of_cut

PREDICTED = ("predicted", "probability")
_CHUNK = 4096  # rows that are in memory at a time


@dataclass
class Job:
    """What to predict with.

    Attributes:
        runs: the adapters by name.
        labels: instead of those that an adapter's folder tells.
    """

    model: str
    runs: dict[str, AdapterRun]
    labels: list[str] | None
    columns: Columns


def run(arguments: argparse.Namespace, job: Job) -> int:
    """Predicts as the arguments of ``vblora predict`` say. Returns the exit code.

    Raises:
        CommandError: the model or an adapter cannot be loaded, or a row is wrong.
    """
    models.quiet()
    bank = read_bank(arguments.bank)
    heads = {name: _head_of(run, job.labels) for name, run in job.runs.items()}
    first: tables.Fields = {}
    for fields, _, _ in _rows(arguments, job):  # a wrong file is refused before the model is loaded
        first = first or fields
        check_columns(arguments.output, first, fields)
    if not first:
        raise CommandError(f"--data: {arguments.data} has no rows.")
    rows = _rows(arguments, job)
    chunk = list(islice(rows, _CHUNK))
    predictors: dict[str, _Predictor] = {}
    with Writer(arguments.output) as writer:
        while chunk:
            found: list[dict[str, object]] = [{}] * len(chunk)
            for name in sorted({adapter for _, _, adapter in chunk}):
                places = [place for place, (_, _, adapter) in enumerate(chunk) if adapter == name]
                if name not in predictors:
                    predictors = {name: _Predictor(arguments, job, name, heads[name], bank)}  # one model at a time
                predicted = predictors[name]([chunk[place][1] for place in places])
                for place, one in zip(places, predicted, strict=True):
                    found[place] = one
            for (fields, _, _), one in zip(chunk, found, strict=True):
                writer.row(fields | one)
            chunk = list(islice(rows, _CHUNK))
    return 0


class _Predictor:
    """A model with one adapter."""

    def __init__(
        self, arguments: argparse.Namespace, job: Job, name: str, head: Head, bank: vblora.VectorBank | None
    ) -> None:
        self.arguments = arguments
        self.head = head
        self.tokenizer: PreTrainedTokenizerBase = models.load_tokenizer(job.model)
        self.model: PreTrainedModel = load_model(job.model, head, self.tokenizer)
        run = job.runs[name]
        warn_of_another_base(run, self.model, job.model, "predict")
        try:
            vblora.load(self.model, run.folder, bank=bank)
        except (OSError, ValueError, TypeError) as error:
            given = " Does --labels give one label for each output of its head?" * (arguments.labels is not None)
            raise CommandError(f"--adapter: {in_options(error, 'bank')}{given}") from None
        if torch.accelerator.is_available():
            self.model.to(torch.accelerator.current_accelerator())
        self.model.eval()
        trained = run.arguments.get("max_length")
        self.length = models.max_length(arguments.max_length or trained, MAX_LENGTH, self.tokenizer, self.model)

    def __call__(self, rows: list[Row]) -> list[dict[str, object]]:
        encoded, cut = tokenize(rows, self.tokenizer, self.model, self.length)
        warn_of_cut(cut, len(rows), self.length, "predict")
        order = sorted(range(len(rows)), key=lambda row: len(encoded[row]["input_ids"]))
        collate = DataCollatorWithPadding(self.tokenizer)
        size = self.arguments.batch_size
        device = self.model.device
        bfloat16 = models.computes_in_bfloat16(self.arguments.precision)
        found: list[dict[str, object]] = [{}] * len(rows)
        for start in tqdm(range(0, len(rows), size), desc="Predicting", leave=False, disable=None):
            places = order[start : start + size]
            batch = {name: value.to(device) for name, value in collate([encoded[place] for place in places]).items()}
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                outputs = self.model(**batch).logits.float().cpu().numpy()
            for place, one in zip(places, self.head.predict(outputs), strict=True):
                found[place] = one
        return found


def _rows(arguments: argparse.Namespace, job: Job) -> Iterator[tuple[tables.Fields, Row, str]]:
    """The fields, the text and the adapter's name of each row."""
    columns = job.columns.in_file(arguments.data, "--data")
    needed = {option: name for option, name in columns.by_option().items() if option != "--label-column"}
    if (named_by := arguments.adapter_column) is not None:
        named_by = needed["--adapter-column"] = tables.find_column(named_by, tables.first_row(arguments.data, "--data"))
    only = next(iter(job.runs))
    for where, fields in tables.read(arguments.data, "--data", needed):
        for name in PREDICTED:
            if name in fields:
                raise CommandError(f"{where}: there is a column {name!r} already. Rename it.")
        adapter = only if named_by is None else str(fields[named_by])
        if adapter not in job.runs:
            raise CommandError(
                f"{where}: there is no adapter {adapter!r}; --adapter gives {tables.quoted(sorted(job.runs))}."
            )
        pair = None if columns.pair is None else tables.value(fields, columns.pair, where).strip()
        yield fields, Row(tables.value(fields, columns.text, where).strip(), "", pair, None), adapter


def _head_of(run: AdapterRun, labels: list[str] | None) -> Head:
    trained, scale = run.report.get("labels") or None, run.report.get("scores")
    if labels is not None and trained is not None and labels != trained and sorted(labels) == sorted(trained):
        raise CommandError(
            f"--labels: is {tables.quoted(labels)}, but {run.folder} was trained with the order {tables.quoted(trained)}. Leave "
            "it out."
        )
    labels = labels or trained
    if labels is not None and len(set(labels)) < max(2, len(labels)):
        raise CommandError(
            f"--labels: is {tables.quoted(labels)}, but a classifier has at least two labels, all different. The single "
            "output of a head is a score, and only the finetune.json of its adapter tells in which unit."
        )
    try:
        return find_head(labels, scale)
    except (AssertionError, TypeError):
        raise CommandError(
            f"--labels: {run.folder} does not contain the adapter's labels. Give them in the order of the head's outputs."
        ) from None
