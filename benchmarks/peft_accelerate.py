"""A training step of PEFT's own VB-LoRA and of the accelerated one, in turn in one process.

    python -m benchmarks.peft_accelerate --threads 2

Both are the same model with the same parameters, AdamW included. Each round times a step of both in turn;
the speed-up is the median of the rounds' ratios, with their quartiles. "one sequence" has next to no base model to compute.
"""

import argparse
import copy

import peft
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig, LlamaForCausalLM

from vblora.finetune import demo
from vblora.integrations.peft import accelerate

from .harness import in_turn

SIZES = {"r": 4, "topk": 2, "target_modules": "all-linear"}


def bert() -> tuple[nn.Module, peft.VBLoRAConfig]:
    config = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
    return AutoModelForSequenceClassification.from_config(config), peft.VBLoRAConfig(
        num_vectors=256, vector_length=64, modules_to_save=["classifier"], **SIZES
    )


def llama() -> tuple[nn.Module, peft.VBLoRAConfig]:
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=768
    )
    return LlamaForCausalLM(config), peft.VBLoRAConfig(num_vectors=2048, vector_length=256, **SIZES)


def minilm() -> tuple[nn.Module, peft.VBLoRAConfig]:
    model = AutoModelForSequenceClassification.from_pretrained(demo.find_model(), num_labels=2, dtype=torch.float32)
    return model, peft.VBLoRAConfig(num_vectors=90, vector_length=128, modules_to_save=["classifier"], **SIZES)


MODELS = {
    "BERT, 4 layers of 256, h=256, b=64": bert,
    "Llama, 4 layers of 256, h=2048, b=256": llama,
    "all-MiniLM-L6-v2, h=90, b=128": minilm,
}


class Training:
    """One model, its optimizer, and a batch to train on."""

    def __init__(self, model: nn.Module, batch: int, length: int) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=False)
        ids = torch.randint(3, 500, (batch, length), generator=torch.Generator().manual_seed(0))
        causal = isinstance(model.get_base_model(), LlamaForCausalLM)
        self.batch = {"input_ids": ids, "labels": ids if causal else ids[:, 0] % 2}

    def step(self) -> None:
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    print(
        f"torch {torch.__version__}, peft {peft.__version__}, CPU, threads: {arguments.threads}, float32, AdamW(fused=False)"
    )
    print("| model | batch | PEFT | accelerated | speed-up | quartiles |")
    print("|---|---|---|---|---|---|")
    for title, make in MODELS.items():
        torch.manual_seed(0)
        theirs = peft.get_peft_model(*make())
        for name, (batch, length) in {"one sequence of 8": (1, 8), "16 of 32": (16, 32)}.items():
            work = {
                "PEFT": Training(copy.deepcopy(theirs), batch, length).step,
                "accelerated": Training(accelerate(copy.deepcopy(theirs)), batch, length).step,
            }
            times = in_turn(work, 1e-9, least=arguments.rounds, most=arguments.rounds)
            ratio = times.ratio("PEFT", "accelerated")
            print(
                f"| {title} | {name} | {1e3 * times.median('PEFT'):.1f} ms | {1e3 * times.median('accelerated'):.1f} ms "
                f"| **{ratio.middle:.2f}** | {ratio.low:.2f} to {ratio.high:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
