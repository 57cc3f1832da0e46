"""``vblora info``: what an adapter's folder holds, and how large each part is."""

import argparse
import re
from collections import Counter
from pathlib import Path

from .folders import add_adapter, add_bank, need, read_adapter

# Parts by what their tensors are called: ours, then PEFT's.
_PARTS = {
    "vector bank": r"bank\..*|base_model\.vblora_vector_bank",
    "indices": r"indices|.*_topk_indices",
    "weights": r"weights|.*_topk_weights",
    "logits": r"logits|logits\..*|.*\.vblora_logits_[AB]",
    "candidates": r"candidates|exhausted",
    "projections": r"[AB]|base_model\.vera_[AB]",
    "vectors": r"[deuv]|.*\.vera_lambda_[bd]",
    "factors": r"factors|.*\.lora_([AB]\.weight|embedding_[AB])",
}
_BESIDE = "beside: biases, modules_to_save"
_OPTIMIZER = re.compile(r"optimi[sz]er.*\.(pt|pth|bin|safetensors)")
# What a config says beyond which layers it is for, and how an adapter began.
_LEFT_OUT = frozenset(
    {
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        *("init", "init_logits_std", "init_vector_bank_bound", "init_weights", "init_lora_weights", "d_initial"),
    }
)
_SHOWN_TARGETS = 8


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("info", help="say what an adapter holds", description=__doc__.partition(": ")[2])
    parser.set_defaults(run=run)
    add_adapter(parser, "folder")
    add_bank(parser)


def run(arguments: argparse.Namespace) -> int:
    need("rich")
    adapter = read_adapter("FOLDER", arguments.folder, arguments.bank)
    _print(arguments.folder, adapter)
    return 0


def _print(folder: Path, adapter) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..checkpoint import folder as files
    from ..checkpoint.vblora import VBLoRAContents

    contents = adapter.contents
    table = Table(title=str(folder), show_header=False)
    table.add_row("form", _form(folder, contents))
    table.add_row("base model", adapter.base_model or "not said")
    table.add_row("method", files.METHOD_NAMES[contents.config.method])
    for name, value in contents.config.to_dict().items():
        if name not in _LEFT_OUT:
            table.add_row(name, str(value))
    names = [f"{t.name} ({_kind(t.kind)}{t.in_features or '?'} -> {t.out_features})" for t in contents.targets]
    more = f"\n... and {len(names) - _SHOWN_TARGETS} more" if len(names) > _SHOWN_TARGETS else ""
    table.add_row(f"{len(names)} layers", "\n".join(names[:_SHOWN_TARGETS]) + more)
    if isinstance(contents, VBLoRAContents):
        table.add_row("sub-vectors", f"{contents.num_rows:,}")
    if adapter.bank_file is not None:
        table.add_row("bank file", f"{adapter.bank_file.name}, SHA-256 {adapter.bank_file.sha256}")
    table.add_section()
    sizes = sizes_by_part(folder)
    for part, size in sizes.items():
        table.add_row(part, f"{size:,} bytes")
    table.add_row("[bold]all[/bold]", f"[bold]{sum(sizes.values()):,} bytes[/bold]")
    console = Console()
    if not console.is_terminal:
        console.width = 160  # of a file or a pipe nothing is known
    console.print(table)


def _kind(kind: str) -> str:
    return "" if kind == "linear" else f"{kind} "


def _form(folder: Path, contents) -> str:
    import json

    from safetensors import safe_open

    from ..checkpoint import folder as files
    from ..checkpoint import native

    with safe_open(folder / files.TENSORS_FILE, framework="pt") as file:
        metadata = file.metadata() or {}
    if native.METADATA in metadata:
        form = json.loads(metadata[native.METADATA])["form"]
        return f"vblora, {form}: " + ("training goes on from it" if form == "resume" else "for inference")
    if contents.config.method != "vblora":
        return "PEFT: training goes on from it"
    return (
        "PEFT, all logits: training goes on from it"
        if contents.is_trainable
        else "PEFT, save_only_topk_weights: for inference"
    )


def sizes_by_part(folder: Path) -> dict[str, int]:
    """Bytes of each part of an adapter's folder that there is, by its name."""
    from safetensors import safe_open

    from ..checkpoint import folder as files

    path = folder / files.TENSORS_FILE
    sizes = Counter()
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            part = next((part for part, names in _PARTS.items() if re.fullmatch(names, name)), _BESIDE)
            sizes[part] += file.get_tensor(name).nbytes
    parts = {part: sizes[part] for part in (*_PARTS, _BESIDE) if part in sizes}
    parts["names and description"] = path.stat().st_size - sum(sizes.values()) + _size_of(folder / files.CONFIG_FILE)
    if optimizer := sum(_size_of(file) for file in folder.iterdir() if _OPTIMIZER.fullmatch(file.name)):
        parts["optimizer"] = optimizer
    return parts


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
