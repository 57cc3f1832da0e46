"""``vblora info``: what an adapter's folder holds, and how large each part is."""

import argparse
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from .folders import add_adapter, add_bank, read_about, read_adapter, require

if TYPE_CHECKING:
    from ..adapters import Target
    from ..checkpoint.contents import Contents
    from ..checkpoint.native import Description
    from ..config import AdapterConfig
    from .folders import Subparsers

# The parts of an adapter by the names of their tensors: vblora's, then PEFT's.
_PARTS = {
    "vector bank": r"bank\..*|base_model\.vblora_vector_bank",
    "indices": r"indices|.*_topk_indices",
    "weights": r"weights|.*_topk_weights",
    "logits": r"logits|logits\..*|.*\.vblora_logits_[AB]",
    "candidates": r"candidates|exhausted",
    "scales": r"scales",
    "projections": r"[AB]|base_model\.vera_[AB]",
    "vectors": r"[deuv]|.*\.vera_lambda_[bd]",
    "factors": r"factors|.*\.lora_([AB]\.weight|embedding_[AB])",
}
_EXTRA = "extra: biases, modules_to_save"
_OPTIMIZER = re.compile(r"optimi[sz]er.*\.(pt|pth|bin|safetensors)")
# Config fields that are not shown: how layers are chosen, and how the adapter was initialised.
_HIDDEN_FIELDS = frozenset(
    {
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        *("init", "init_logits_std", "init_vector_bank_bound", "init_weights", "init_lora_weights", "d_initial"),
    }
)
_SHOWN_TARGETS = 8


def add_parser(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "info",
        help="show what an adapter contains",
        description="Shows what the folder of an adapter contains, and how large each part is. If the adapter was saved without "
        "its bank, --bank also checks that the bank is the right one.",
    )
    parser.set_defaults(run=run)
    add_adapter(parser, "folder")
    add_bank(parser)


def run(arguments: argparse.Namespace) -> int:
    require("rich")
    folder: Path = arguments.folder
    description = _description(folder)
    bank = None
    if description is not None and description.bank_file is not None:
        bank = f"{description.bank_file[0]}, SHA-256 {description.bank_file[1]}"
    if description is not None and bank is not None and arguments.bank is None:
        bank += "\nmissing here: give its file, or the folder of the adapter that holds it, as --bank"
        config, targets, form = description.config, description.targets, _form(description, None)
    else:
        contents = read_adapter("FOLDER", folder, arguments.bank).contents
        config, targets, form = contents.config, contents.targets, _form(description, contents)
    _print(folder, config, targets, form, bank)
    return 0


def _description(folder: Path) -> "Description | None":
    """What vblora's own file tells of itself; None for PEFT's, and for a damaged one, which :func:`read_adapter` refuses."""
    from ..checkpoint.folder import read_description

    try:
        return read_description(folder)
    except (OSError, ValueError):
        return None


def _print(folder: Path, config: "AdapterConfig", targets: "tuple[Target, ...]", form: str, bank: str | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..adapters.subvectors import rows_of_factors
    from ..checkpoint.folder import CONFIG_FILE, METHOD_NAMES
    from ..config import VBLoRAConfig

    table = Table(title=Text(str(folder)), show_header=False)

    def add(name: str, value: str, style: str = "") -> None:
        table.add_row(Text(name, style), Text(value, style))  # Text: brackets in a value are no markup

    add("form", form)
    add("base model", read_about(folder / CONFIG_FILE)[0] or "unknown")
    add("method", METHOD_NAMES[config.method])
    for name, value in config.to_dict().items():
        if name not in _HIDDEN_FIELDS:
            add(name, str(value))
    names = [f"{t.name} ({_kind(t.kind)}{t.in_features or '?'} -> {t.out_features})" for t in targets]
    more = f"\n... and {len(names) - _SHOWN_TARGETS} more" if len(names) > _SHOWN_TARGETS else ""
    add(f"{len(names)} layers", "\n".join(names[:_SHOWN_TARGETS]) + more)
    if isinstance(config, VBLoRAConfig):
        add("sub-vectors", f"{sum(rows_of_factors(targets, config.r, config.vector_length)):,}")
    if bank is not None:
        add("bank file", bank)
    table.add_section()
    sizes = sizes_by_part(folder)
    for part, size in sizes.items():
        add(part, f"{size:,} bytes")
    add("all", f"{sum(sizes.values()):,} bytes", "bold")
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no width of its own
    console.print(table)


def _kind(kind: str) -> str:
    return "" if kind == "linear" else f"{kind} "


def _form(description: "Description | None", contents: "Contents | None") -> str:
    """``contents``: needed only of PEFT's file, which has no description."""
    if description is not None:
        form = description.form
        return f"vblora, {form}: " + ("training can continue from it" if form == "resume" else "for inference")
    assert contents is not None
    if contents.config.method != "vblora":
        return "PEFT: training can continue from it"
    return (
        "PEFT, all logits: training can continue from it"
        if contents.is_trainable
        else "PEFT, save_only_topk_weights: for inference"
    )


def sizes_by_part(folder: Path) -> dict[str, int]:
    """Bytes of each part that an adapter's folder holds, by the part's name."""
    from ..checkpoint.folder import CONFIG_FILE, TENSORS_FILE
    from ..files import open_tensors

    path = folder / TENSORS_FILE
    sizes: Counter[str] = Counter()
    with open_tensors(path) as file:
        for name in file.keys():  # noqa: SIM118 (it is not a dict)
            part = next((part for part, names in _PARTS.items() if re.fullmatch(names, name)), _EXTRA)
            sizes[part] += file.get_tensor(name).nbytes
    parts = {part: sizes[part] for part in (*_PARTS, _EXTRA) if part in sizes}
    parts["names and description"] = path.stat().st_size - sum(sizes.values()) + _size_of(folder / CONFIG_FILE)
    if optimizer := sum(_size_of(file) for file in folder.iterdir() if _OPTIMIZER.fullmatch(file.name)):
        parts["optimizer"] = optimizer
    return parts


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
