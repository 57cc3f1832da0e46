"""Adapters to generate or predict with: their folders, and what ``vblora finetune`` wrote beside them."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bank import VectorBank
from ..checkpoint.folder import CONFIG_FILE, TENSORS_FILE
from ..checkpoint.json_objects import JsonObject, as_list, optional_field, read_object, shortened
from ..errors import CommandError
from ..files import sha256
from .tables import quoted
from .task import RESULTS_FILE, find_model


@dataclass
class AdapterRun:
    """An adapter's folder, and what is known of how it was trained.

    Attributes:
        config: of ``adapter_config.json``.
        report: of ``finetune.json``; empty for an adapter that ``vblora finetune`` has not trained.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def base_model(self) -> str | None:
        """The path or name of the base model. ``finetune.json`` has the whole path, the config the one that the user gave: if a
        project has moved, the latter may still lead to the model."""
        told = [self.report.get("model"), self.config.get("base_model_name_or_path")]
        names = [name for name in told if name]
        return next((name for name in names if Path(name).exists()), names[0] if names else None)

    @property
    def is_language_model(self) -> bool | None:
        """Whether the adapter is for a model that generates; None if the folder does not tell."""
        about = self.config.get("auto_mapping")
        model_class = about.get("base_model_class") if isinstance(about, dict) else None
        if (task := self.report.get("task") or self.config.get("task_type") or model_class) is None:
            return None
        return str(task).replace("_", "-").upper().endswith(("CAUSAL-LM", "FORCAUSALLM"))

    @property
    def rank(self) -> int:
        rank: int = self.config.get("r") or 1
        return rank

    @property
    def arguments(self) -> dict[str, Any]:
        """The options that it was trained with."""
        arguments: dict[str, Any] = self.report.get("arguments") or {}
        return arguments


def read_run(folder: Path) -> AdapterRun:
    """What is known of an adapter.

    Raises:
        CommandError: it is no adapter's folder.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise CommandError(f"--adapter: {folder} has no {CONFIG_FILE}. Give the folder of an adapter.")
    return AdapterRun(folder, _read("--adapter", folder / CONFIG_FILE, _CONFIG_TYPES), read_report("--adapter", folder))


def read_report(argument: str, folder: Path) -> dict[str, Any]:
    """What ``finetune.json`` says of the adapter beside it; empty without that file.

    Args:
        argument: what the user calls the folder, for messages.

    Raises:
        CommandError: the file is damaged, or was written with another adapter.
    """
    path, tensors = folder / RESULTS_FILE, folder / TENSORS_FILE
    if not path.is_file():
        return {}
    report = _read(argument, path, _REPORT_TYPES)
    if tensors.is_file() and report.get("adapter_sha256") not in (None, sha256(tensors)):
        raise CommandError(
            f"{argument}: {tensors} has changed since vblora finetune wrote {RESULTS_FILE}, which may be about another adapter. "
            f"Remove {RESULTS_FILE}, and give its contents as options, such as --model, --labels or --chat-template."
        )
    return report


def trained_template(report: dict[str, Any]) -> str | None:
    """The chat template that an adapter was trained with, if it is not that of the base model."""
    template: str | None = report.get("chat_template")
    return None if template in ("auto", "none") else template


def _read(argument: str, path: Path, types: dict[str, type]) -> JsonObject:
    try:
        values = read_object(path)
        _check_types(values, types)
    except OSError as error:
        raise CommandError(f"{argument}: {path} cannot be read: {error}.") from None
    except ValueError as error:
        message = str(error) if str(path) in str(error) else f"{path} is damaged: {error}"
        raise CommandError(f"{argument}: {message}") from None
    return values


def read_bank(path: Path | None) -> VectorBank | None:
    """The bank that ``--bank`` names.

    Raises:
        CommandError: it cannot be read.
    """
    try:
        return None if path is None else VectorBank.from_file(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"--bank: {error}") from None


# What commands read of the two files. A field may also be missing or null.
_CONFIG_TYPES: dict[str, type] = {"base_model_name_or_path": str, "task_type": str, "auto_mapping": dict, "r": int}
_REPORT_TYPES: dict[str, type] = {
    "model": str, "task": str, "chat_template": str, "adapter_sha256": str,
    "labels": list, "ends": list, "scores": dict, "fingerprint": dict, "arguments": dict,
}  # fmt: skip
_ARGUMENT_TYPES: dict[str, type] = {"text_column": str, "pair_column": str, "max_length": int}


def _check_types(values: JsonObject, types: dict[str, type]) -> None:
    for name, kind in types.items():
        optional_field(values, name, kind, None)
    if types is _REPORT_TYPES:
        as_list("`labels`", values.get("labels") or [], str)
        as_list("`ends`", values.get("ends") or [], int)
        _check_types(optional_field(values, "arguments", dict, {}), _ARGUMENT_TYPES)
        for name, number in optional_field(values, "scores", dict, {}).items():
            if not (isinstance(number, (int, float)) and math.isfinite(number)):
                raise ValueError(f"`{name}` of `scores` is {shortened(number)}, but must be a finite number.")


def common_setting(runs: list[AdapterRun], option: str, settings: list[Any]) -> Any:
    """What all adapters were trained with.

    Args:
        option: which tells it instead, for the message.
        settings: of each of ``runs``.

    Raises:
        CommandError: they were trained with different ones.
    """
    for run, setting in zip(runs, settings, strict=True):
        if setting != settings[0]:
            raise CommandError(
                f"{option}: the adapter in {runs[0].folder} was trained with {settings[0]}, that in {run.folder} with {setting}. "
                f"Give {option}, or run them one after the other."
            )
    return settings[0]


def find_folders(given: list[Path]) -> dict[str, Path]:
    """The folders of adapters by name, which is the folder's. A folder of adapters counts as all of them.

    Raises:
        CommandError: a folder holds no adapter, or two have one name.
    """
    folders: dict[str, Path] = {}
    for one in given:
        if not one.exists():
            raise CommandError(f"--adapter: there is no folder {one}.")
        inner = sorted(file.parent for file in one.glob(f"*/{CONFIG_FILE}"))
        found = [one] if (one / CONFIG_FILE).is_file() or not inner else inner
        for folder in found:
            if not (folder / CONFIG_FILE).is_file():
                raise CommandError(
                    f"--adapter: {folder} is neither the folder of an adapter nor a folder of such folders."
                )
            name = Path(os.path.abspath(folder)).name  # of a link its own
            if name in folders:
                raise CommandError(f"--adapter: two adapters are called {name!r}: {folders[name]} and {folder}.")
            folders[name] = folder
    return folders


def refuse_several(folders: dict[str, Path]) -> None:
    """Refuses several adapters if no column says which one a row uses."""
    if len(folders) > 1:
        raise CommandError(
            f"--adapter: there are {len(folders)} adapters: {quoted(folders)}. Give the folder of one, or with --data the "
            "column that names the adapter of each row, as --adapter-column."
        )


def find_base(given: str | None, runs: list[AdapterRun]) -> str:
    """The base model, checked: the one that is given, or that the adapters name.

    Raises:
        CommandError: they name none, or several, or one that is not there.
    """
    if given is not None:
        return find_model(given)
    if not runs:
        raise CommandError("--model: missing. Give the model that completes the prompts, or --adapter.")
    folders = {run.base_model: run.folder for run in runs if run.base_model is not None}
    if not folders:
        raise CommandError("--model: the adapters name no base model. Give it.")
    if len(folders) > 1:
        raise CommandError(
            f"--model: the adapters name several base models: {', '.join(folders)}. Give the one to use, or run them one after "
            "the other."
        )
    ((name, folder),) = folders.items()
    try:
        return find_model(name)
    except CommandError as error:
        raise CommandError(
            f"{error} The adapter in {folder} names this base model; --model gives another place."
        ) from None
