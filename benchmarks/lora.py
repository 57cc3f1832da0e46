"""A training step with our LoRA and with PEFT's of the same rank, layers and dtype, in turn in one process.

    python -m benchmarks.lora --threads 2

Both are the same model with the same parameters, AdamW included. Each round times a step of both, first the one, then the other,
in turns; the ratio is the median of the rounds' ratios, with their quartiles. Below 1 ours is the faster one. "one sequence" has
next to no base model to compute. `--vera` does the same with VeRA, r=256.
"""

import argparse
import copy
import itertools
import tempfile
from contextlib import nullcontext

import peft
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import vblora
from vblora.finetune import demo

from .harness import in_turn


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

    def step(self) -> None:
        with nullcontext() if self.dtype == torch.float32 else torch.autocast("cpu", self.dtype):
            loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


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
        theirs, ours = pair(make(), config, *size, dtype)
        work = {"PEFT": theirs.step, "ours": ours.step}
        times = in_turn(work, 1e-9, least=arguments.rounds, most=arguments.rounds)
        ratio = times.ratio("ours", "PEFT")
        method = f"{config.peft_type.value} r={config.r}"
        print(
            f"| {title} | {method} | {name} | {1e3 * times.median('PEFT'):.1f} ms | {1e3 * times.median('ours'):.1f} ms "
            f"| **{ratio.middle:.2f}** | {ratio.low:.2f} to {ratio.high:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
