"""A training step with our LoRA beside one with PEFT's of the same rank, layers and dtype, in turn in one process.

    python benchmarks/lora.py --threads 2

Both are the same model with the same parameters, AdamW included. Each round times a step of both, first the one, then the other,
in turns; the ratio is the median of the rounds' ratios, with their quartiles. Below 1 ours is the faster one. "one sequence" has
next to no base model to compute. `--vera` does the same with VeRA, r=256.
"""

import argparse
import copy
import itertools
import statistics
import tempfile
import time
from contextlib import nullcontext

import peft
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import vblora
from vblora.cli import demo


def minilm() -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(demo.find_model(), num_labels=2, dtype=torch.float32)


def llama() -> nn.Module:
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 768}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes))


MODELS = {"all-MiniLM-L6-v2": minilm, "Llama, 4 layers of 256": llama}
BATCHES = {"one sequence of 8": (1, 8), "16 of 32": (16, 32), "16 of 64": (16, 64)}


class Training:
    """One model, its optimizer, and a batch to train on."""

    def __init__(self, model: nn.Module, groups: list, batch: int, length: int, dtype: torch.dtype) -> None:
        self.model = model.train()
        self.dtype = dtype
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3)
        ids = torch.randint(3, 500, (batch, length), generator=torch.Generator().manual_seed(0))
        causal = model.config.model_type == "llama"
        self.batch = {"input_ids": ids, "labels": ids if causal else ids[:, 0] % 2}

    def seconds(self) -> float:
        start = time.perf_counter()
        with nullcontext() if self.dtype == torch.float32 else torch.autocast("cpu", self.dtype):
            loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def pair(base: nn.Module, config: peft.PeftConfig, batch: int, length: int, dtype: torch.dtype) -> list[Training]:
    theirs = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder, save_embedding_layers=False)
        ours = vblora.load(copy.deepcopy(base), folder, is_trainable=True)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    both = [Training(theirs, trained, batch, length, dtype)]
    both.append(Training(ours, vblora.parameter_groups(ours, lr_factors=1e-3, lr_vectors=1e-3), batch, length, dtype))
    outputs = [one.model.eval()(**one.batch).logits for one in both]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for one in both:
        one.model.train()
    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--r", type=int, nargs="+", default=[8])
    parser.add_argument("--vera", action="store_true", help="VeRA, r=256, in place of LoRA")
    parser.add_argument("--autocast", action="store_true", help="to bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = torch.bfloat16 if arguments.autocast else torch.float32
    if arguments.vera:
        configs = [peft.VeraConfig(r=256, target_modules="all-linear")]
    else:
        configs = [peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear") for r in arguments.r]

    print(f"torch {torch.__version__}, peft {peft.__version__}, CPU, threads: {arguments.threads}, {dtype}, AdamW")
    print("| model | method | batch | PEFT | ours | ours / PEFT | quartiles |")
    print("|---|---|---|---|---|---|---|")
    for (title, make), config, (name, size) in itertools.product(MODELS.items(), configs, BATCHES.items()):
        torch.manual_seed(0)
        both = pair(make(), config, *size, dtype)
        times = []
        for round_ in range(-3, arguments.rounds):  # the first three warm up
            order = (0, 1) if round_ % 2 else (1, 0)
            seconds = {which: both[which].seconds() for which in order}
            if round_ >= 0:
                times.append((seconds[0], seconds[1]))
        milliseconds = [statistics.median(column) * 1e3 for column in zip(*times, strict=True)]
        low, middle, high = statistics.quantiles([ours / theirs for theirs, ours in times], n=4)
        method = f"{config.peft_type.value} r={config.r}"
        print(
            f"| {title} | {method} | {name} | {milliseconds[0]:.1f} ms | {milliseconds[1]:.1f} ms "
            f"| **{middle:.2f}** | {low:.2f} to {high:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
