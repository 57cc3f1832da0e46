"""The size of adapters on disk: our forms, PEFT's, and LoRA, for Llama-2-7B and for the demo's model.

    python benchmarks/sizes.py

Writes each of them into a temporary folder and looks at the files. No model is loaded: an adapter is written from what it is.
Trained logits are made up, since how many of a row are touched is what counts: 31 on average, as docs/candidates.md measures.
PEFT's forms are written by us; tests hold them to be what PEFT writes.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import vblora
from vblora.adapters import Target
from vblora.adapters.subvectors import rows_of_factors
from vblora.adapters.vblora_rows import draw_rows
from vblora.checkpoint.folder import encode, write
from vblora.checkpoint.packing import pack_prefixes
from vblora.checkpoint.vblora import VBLoRAContents

_MEAN_TOUCHED = 31
_FILES = ("adapter_model.safetensors", "adapter_config.json")


def llama() -> tuple[str, tuple[Target, ...], vblora.VBLoRAConfig]:
    widths = {
        **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
        **{f"mlp.{name}_proj": (4096, 11008) for name in ("gate", "up")},
        "mlp.down_proj": (11008, 4096),
    }
    targets = [Target(f"model.layers.{i}.{name}", *width) for i in range(32) for name, width in widths.items()]
    config = vblora.VBLoRAConfig(r=4, num_vectors=2048, vector_length=256, topk=2, target_modules="all-linear")
    return "Llama-2-7B, all linear layers, r=4, h=2048, b=256", tuple(targets), config


def minilm() -> tuple[str, tuple[Target, ...], vblora.VBLoRAConfig]:
    widths = {
        **{f"attention.self.{name}": (384, 384) for name in ("query", "key", "value")},
        "attention.output.dense": (384, 384),
        "intermediate.dense": (384, 1536),
        "output.dense": (1536, 384),
    }
    targets = [Target(f"bert.encoder.layer.{i}.{name}", *width) for i in range(6) for name, width in widths.items()]
    targets.append(Target("bert.pooler.dense", 384, 384))
    config = vblora.VBLoRAConfig(r=4, num_vectors=90, vector_length=128, topk=2, target_modules="all-linear")
    return "all-MiniLM-L6-v2, all linear layers, r=4, h=90, b=128, without its head", tuple(targets), config


def trained(targets: tuple[Target, ...], config: vblora.VBLoRAConfig) -> VBLoRAContents:
    torch.manual_seed(0)
    bank = torch.randn(config.num_vectors, config.vector_length) / 50
    sizes = rows_of_factors(targets, config.r, config.vector_length)
    dense = config.num_candidates is None or config.num_candidates >= config.num_vectors
    columns = None if dense else config.num_candidates
    drawn = draw_rows(sizes, config.num_vectors, columns, seed=0, std=config.init_logits_std)
    contents = VBLoRAContents(config, targets, bank, drawn)
    order = contents.initial(0)[1] if dense else None
    return replace(contents, rows=drawn._replace(logits=drawn.logits + touches(drawn.logits, order)))


def touches(logits: Tensor, order: Tensor | None) -> Tensor:
    """Random values for the first few of each row's initial order, a geometric number of them, and zeros for the rest."""
    rows, columns = logits.shape
    depth = torch.empty(rows, 1).geometric_(1 / _MEAN_TOUCHED).clamp(max=columns)
    touched = torch.randn_like(logits) * (torch.arange(columns) < depth)
    return touched if order is None else torch.zeros_like(logits).scatter_(1, order.long(), touched)


def lora_bytes(targets: tuple[Target, ...], r: int) -> int:
    return 4 * r * sum(target.in_features + target.out_features for target in targets)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for title, targets, config in (llama(), minilm()):
        contents = trained(targets, config)
        initial, candidates = contents.initial(0)
        logits = contents.rows.logits
        if not contents.has_candidates:
            logits = logits.gather(1, candidates.long())
        moments = (logits - initial.logits).where(logits != initial.logits, 0)
        lengths, values = pack_prefixes(moments)
        rows = {
            "deploy": size(contents, form="deploy"),
            "deploy, bank in int8": size(contents, form="deploy", bank_dtype=torch.int8),
            "deploy, bank in a file that adapters share": size(contents, form="deploy", shared=True),
            "resume": size(contents, form="resume"),
            "resume, with AdamW's state of the logits": size(contents, form="resume")
            + 2 * (lengths.nbytes + values.nbytes),
            "PEFT, save_only_topk_weights": size(contents, form="peft-topk"),
            "PEFT": size(contents, form="peft"),
            "LoRA r=8, float32": lora_bytes(targets, 8),
            "LoRA r=64, float32": lora_bytes(targets, 64),
        }
        print(f"\n{title}: {contents.num_rows:,} sub-vectors, {lengths.float().mean():.0f} logits touched on average\n")
        print("| form | size | of PEFT's dense form |\n|---|---|---|")
        for name, count in rows.items():
            text = f"{count / 2**20:,.2f} MiB" if count >= 2**20 else f"{count / 2**10:,.0f} KiB"
            print(f"| {name} | {text} | {count / rows['PEFT']:.1%} |")


def size(contents: VBLoRAContents, *, shared: bool = False, **options: object) -> int:
    with tempfile.TemporaryDirectory() as folder:
        bank = vblora.VectorBank(*contents.bank.shape)
        if shared:
            bank.vectors.data = contents.bank
            bank.save(Path(folder, "bank.safetensors"))
            options["bank_file"] = vblora.VectorBank.from_file(Path(folder, "bank.safetensors")).file
        write(encode(contents, folder, **options))
        return sum(Path(folder, name).stat().st_size for name in _FILES)


if __name__ == "__main__":
    main()
