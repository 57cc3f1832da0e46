"""One vector bank for several tasks: a ``transformers.Trainer`` whose batches alternate between them."""

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapters import VBLoRAAdapter
from ..bank import VectorBank
from ..checkpoint.folder import write
from ..checkpoint.save_load import files_to_save, load
from ..model.lookup import attached_adapter
from ..model.parameters import parameter_groups
from .transformers import VBLoRACallback

BANK_FILE = "bank.safetensors"

_Rows = Dataset[Any] | Sequence[dict[str, Any]]
_Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


class SharedBankTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    """Trains one bank, and an adapter for each of several tasks.

    Pass one injected model for each task. All of them share a :class:`VectorBank`. They may differ in everything else: data,
    head, targets, even the base model, as long as ``vector_length`` fits its layers::

        bank = vblora.VectorBank(256, 64)
        for model in models.values():
            vblora.inject(model, config, bank=bank)
        trainer = SharedBankTrainer(models, arguments, train_dataset=datasets, data_collator=collate)
        trainer.train()
        trainer.save_model("shared")  # shared/bank.safetensors, and an adapter's folder for each task

    Each batch contains rows of one task. An epoch contains every row of every task once, in batches in a random order, so a task
    with twice the rows gets twice the steps. Each model computes its own loss, so you can mix classifiers, regressions and
    language models.

    Checkpoints contain the same files as ``save_model``; ``resume_from_checkpoint`` and ``load_best_model_at_end`` read them.

    Args:
        models: the injected models, by the names of their tasks. The names become names of folders.
        args: the ``TrainingArguments``.
        train_dataset, eval_dataset: the data sets, by the same names. Metrics are named ``eval_TASK_...``.
        data_collator: a function that makes a batch from rows of one task; or one such function for each task, by its name.
        rates: arguments of :func:`vblora.parameter_groups`, such as ``{"lr_bank": 2e-3}``.
        callbacks, trainer_arguments: further arguments of the ``Trainer``.

    Raises:
        ValueError: there are fewer than two models, a name cannot name a folder, a model has no active VB-LoRA adapter or
            another bank than the first one, the bank is frozen, data sets and models have different names, or several processes
            train.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        args: TrainingArguments | None = None,
        *,
        train_dataset: Mapping[str, _Rows],
        data_collator: _Collate | Mapping[str, _Collate],
        eval_dataset: Mapping[str, _Rows] | None = None,
        rates: Mapping[str, Any] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **trainer_arguments: Any,
    ) -> None:
        bank = bank_of(models)
        if not bank.vectors.requires_grad:
            raise ValueError(
                "the bank of `models` is frozen, so there is no bank to train. Inject without `freeze_bank`."
            )
        _check_names("train_dataset", models, train_dataset)
        if args is not None:
            if args.world_size > 1:
                raise ValueError(
                    f"`args.world_size` is {args.world_size}, but a shared bank trains in one process: the processes' batches "
                    "would be of different tasks. Start one process."
                )
            args = copy.copy(args)
            args.remove_unused_columns = False  # the models' arguments are not the wrapper's
            args._n_gpu = min(1, args.n_gpu)  # nn.DataParallel would copy the adapters at every step
        if isinstance(data_collator, Mapping):
            _check_names("data_collator", models, data_collator)
        if eval_dataset is not None:
            _check_names("eval_dataset", models, eval_dataset)
            eval_dataset = {name: _OfTask(name, rows) for name, rows in eval_dataset.items()}
        self._rates = dict(rates or {})
        super().__init__(
            _Tasks(models),
            args,
            _CollateTask(data_collator),
            ConcatDataset([_OfTask(name, train_dataset[name]) for name in models]),
            eval_dataset,
            callbacks=[*callbacks, _WarnOfExhaustion(models)],
            **trainer_arguments,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer: Any = torch.optim.AdamW(parameter_groups(self.model, **self._rates), weight_decay=0.0)
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader[Any]:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sizes = [len(dataset) for dataset in self.train_dataset.datasets]
        batches = OneTaskBatches(sizes, self.args.train_batch_size, seed)
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    # The Trainer saves and loads through these three.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        save_shared(self.model.by_name, self.args.output_dir if output_dir is None else output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        bank = VectorBank.from_file(folder / BANK_FILE)
        for name, task_model in self.model.by_name.items():
            load(task_model, folder / name, bank=bank)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def save_shared(models: Mapping[str, nn.Module], directory: str | os.PathLike[str], form: str | None = None) -> None:
    """Saves the adapters of models that share a bank: ``bank.safetensors``, and a folder for each adapter, without the bank.

    All files are renamed at the end, once they are on disk, so an interrupted save leaves the old ones or the new ones. Each
    adapter names the bank's SHA-256, and :func:`vblora.load` refuses another bank.

    Load them with ``vblora.load(model, "DIRECTORY/NAME", bank="DIRECTORY/bank.safetensors")``.

    Args:
        models: the injected models by the names of their folders.
        directory: created if it does not exist.
        form: ``"resume"`` or ``"deploy"``, as for :func:`vblora.save`.

    Raises:
        ValueError: the models do not share a bank, a name cannot name a folder, or the form includes the bank.
    """
    if form not in (None, "resume", "deploy"):
        raise ValueError(f'`form` is {form!r}, which includes the bank; allowed are "resume" and "deploy".')
    bank = bank_of(models)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path, before = directory / BANK_FILE, bank.file
    data, file = bank.to_file(path)
    bank.file = file or before
    try:
        files = {path: data}
        for name, model in models.items():
            files |= files_to_save(model, directory / name, form=form)
        write(files)
    except BaseException:
        bank.file = before
        raise


def bank_of(models: Mapping[str, nn.Module]) -> VectorBank:
    """The bank that the active adapters of all models share.

    Raises:
        ValueError: they do not share one, there are fewer than two models, or a name is no folder's name.
    """
    if len(models) < 2:
        raise ValueError(f"`models` has {len(models)}, but a shared bank takes at least two.")
    banks = {}
    for name, model in models.items():
        if not name or name in (".", "..", BANK_FILE) or "/" in name or "\\" in name or "\0" in name:
            raise ValueError(f"`models` has the name {name!r}, which cannot name a folder. Give another one.")
        adapter = attached_adapter(model).adapter
        if not isinstance(adapter, VBLoRAAdapter):
            raise ValueError(f"the adapter of `models[{name!r}]` is not a VB-LoRA adapter, so it has no bank to share.")
        banks[name] = adapter.bank
    first, bank = next(iter(banks.items()))
    for name, other in banks.items():
        if other is not bank:
            raise ValueError(
                f"`models[{first!r}]` and `models[{name!r}]` have different banks. Make one, and pass it to each: "
                "vblora.inject(model, config, bank=bank)."
            )
    return bank


class OneTaskBatches(Sampler[list[int]]):
    """Batches of rows of concatenated data sets, each from one data set, in a random order that the seed and the epoch determine.

    Args:
        sizes: the number of rows of each data set.
    """

    def __init__(self, sizes: list[int], batch_size: int, seed: int) -> None:
        self.sizes = sizes
        self.batch_size = batch_size
        self.drop_last = False  # accelerate asks
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(-(-size // self.batch_size) for size in self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        batches: list[list[int]] = []
        start = 0
        for size in self.sizes:
            rows = start + torch.randperm(size, generator=generator)
            batches += [batch.tolist() for batch in rows.split(self.batch_size)]
            start += size
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]


class _Tasks(nn.Module):
    """What the Trainer trains: all models as one, of which the batch's task picks the one that runs."""

    accepts_loss_kwargs = False  # the mean of each batch is its loss, whatever else accumulates with it

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models.values())  # a ModuleDict cannot have every name
        self.names = list(models)

    @property
    def by_name(self) -> dict[str, nn.Module]:
        return dict(zip(self.names, self.models, strict=True))

    def forward(self, task: str, labels: Tensor | None = None, **inputs: Any) -> Any:
        if labels is not None:
            inputs["labels"] = labels
        return self.models[self.names.index(task)](**inputs)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        for model in self.models:
            cast(Any, model).gradient_checkpointing_enable(**options)


class _OfTask(Dataset[dict[str, Any]]):
    """The rows of a data set, each with the name of its task."""

    def __init__(self, name: str, rows: Any) -> None:
        if not isinstance(rows, Sized):
            raise ValueError(f"the data set {name!r} has no length. Give one that is not a stream.")
        self.name = name
        self.rows: Any = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "task": self.name}


class _CollateTask:
    def __init__(self, collate: _Collate | Mapping[str, _Collate]) -> None:
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        task = rows[0]["task"]
        collate = self.collate[task] if isinstance(self.collate, Mapping) else self.collate
        batch = collate([{name: value for name, value in row.items() if name != "task"} for row in rows])
        return {**batch, "task": task}


class _WarnOfExhaustion(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """:class:`VBLoRACallback`'s warning of exhausted rows, for each model."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self.models = [(model, VBLoRACallback()) for model in models.values()]

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for model, callback in self.models:
            callback.on_log(args, state, control, model=model)

    on_train_end = on_log


def _check_names(argument: str, models: Mapping[str, nn.Module], given: Mapping[str, Any]) -> None:
    if given.keys() != models.keys():
        raise ValueError(
            f"`{argument}` is for {', '.join(map(repr, given)) or 'nothing'}, but `models` has {', '.join(map(repr, models))}. "
            "Give the same names."
        )
