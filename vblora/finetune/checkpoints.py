"""The checkpoints of ``vblora finetune``: which one to resume from, and whether it is of the same run."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.folder import TENSORS_FILE
from ..checkpoint.json_objects import field, optional_field, read_object
from ..errors import CommandError
from ..files import sha256
from .fingerprints import differing
from .notices import processes
from .task import RESULTS_FILE, LanguageTask, Task, as_json

# Arguments that a run which is resumed may have otherwise: they change neither data, model nor learning rates.
_MAY_CHANGE = frozenset(
    {"epochs", "patience", "output", "overwrite", "resume", "baseline", "bleu", "run", "command", "max_new_tokens"}
)
_FILES = ("data", "eval_data", "bank", "chat_template")


def find_checkpoint(arguments: argparse.Namespace) -> str | None:
    """The checkpoint to resume from: the last one in the output folder; None without --resume.

    Raises:
        CommandError: there is none, or it was trained with other arguments or files.
    """
    digests = arguments.sha256 = {
        f"--{name.replace('_', '-')}": sha256(path / TENSORS_FILE if path.is_dir() else path)
        for name in _FILES
        if (given := getattr(arguments, name, None)) not in (None, "auto", "none")
        and ((path := Path(given)).is_file() or name == "bank")
    }
    arguments.processes = processes()
    if not arguments.resume:
        for folder in filter(_has_files, incomplete(arguments.output)):
            raise CommandError(
                f"--output: {folder} is another program's checkpoint, or an incomplete one. Remove it, or give another folder."
            )
        return None
    found = last_checkpoint(arguments.output)
    if found is None:
        broken = next(incomplete(arguments.output), None)
        if broken is not None:
            raise CommandError(
                f"--resume: {broken} is incomplete, and there is no other checkpoint in {arguments.output}. Remove it, and give "
                "--overwrite in place of --resume to start a new run."
            )
        raise CommandError(
            f"--resume: there is no checkpoint in {arguments.output}. Leave out --resume to start a new run."
        )
    try:
        before = field(read_object(found / RESULTS_FILE), "arguments", dict)
        digests_before = optional_field(before, "sha256", dict, {})
    except (OSError, ValueError) as error:
        raise CommandError(f"--resume: {found} is not a checkpoint of vblora finetune: {error}.") from None
    now = as_json(arguments)
    if (trained_in := before.get("processes", 1)) != now.pop("processes"):
        raise CommandError(
            f"--resume: the number of processes was {trained_in} when the checkpoint was written, but it is {processes()} now, "
            "so the batches would be others. Start as many as then."
        )
    for option, digest in digests.items():
        if digests_before.get(option) not in (None, digest):
            raise CommandError(
                f"--resume: {option} {getattr(arguments, option[2:].replace('-', '_'))} has changed since the checkpoint. "
                "Give the file of the run that you resume, or leave out --resume."
            )
    if arguments.epochs < before.get("epochs", 0):
        raise CommandError(
            f"--resume: the checkpoint was trained with --epochs {before['epochs']}, but it is {arguments.epochs} now. A run can "
            "be made longer, not shorter: give at least as many."
        )
    for name in now.keys() - {"sha256"}:
        if name == "task" and now[name] is None:
            continue  # the labels tell, and they are those of the same data
        if name not in _MAY_CHANGE and now[name] != before.get(name):
            option = f"--{name.replace('_', '-')}"
            raise CommandError(
                f"--resume: the checkpoint was trained with {option} {before.get(name)}, but it is {now[name]} now. "
                "Give the arguments of the run that you resume, or leave out --resume."
            )
    return str(found)


def check_base(checkpoint: str | None, task: Task | LanguageTask) -> None:
    """Refuses to resume with a model whose weights are not those that the checkpoint was trained with.

    Args:
        checkpoint: what ``find_checkpoint`` found.
        task: with the fingerprint of its model.
    """
    if checkpoint is None:
        return
    trained = optional_field(read_object(Path(checkpoint) / RESULTS_FILE), "fingerprint", dict, {})
    if names := differing(trained, task.fingerprint):
        raise CommandError(
            f"--resume: the weights of --model {task.model} have changed since the checkpoint (among others {names[0]}). Give "
            "the model of the run that you resume, or leave out --resume."
        )


def last_checkpoint(output: Path) -> Path | None:
    """The last complete checkpoint, if there is one."""
    complete = [file.parent for file in output.glob(f"checkpoint-*/{RESULTS_FILE}")]
    return max((folder for folder in complete if folder.name.rpartition("-")[2].isdecimal()), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def incomplete(output: Path) -> Iterator[Path]:
    """Checkpoints without the file that is written last, such as of a run that was killed meanwhile."""
    return (folder for folder in output.glob("checkpoint-*") if not (folder / RESULTS_FILE).is_file())


def _has_files(folder: Path) -> bool:
    return not folder.is_dir() or any(folder.iterdir())
