"""Serves several adapters of one language model in one batch: trains a small model to greet three people by name.

python examples/serving.py
"""

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import vblora
from vblora.serving import AdapterStore

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, default=Path("adapters"), help="folder for the adapters and their bank")
parser.add_argument("--quick", action="store_true", help="train for two steps only")
arguments = parser.parse_args()
logging.set_verbosity_error()
arguments.output.mkdir(parents=True, exist_ok=True)
bank_file = arguments.output / "bank.safetensors"


def load_base():
    """A small random model of characters, in place of the one that you serve."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 10, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(initializer_range=0.2, **sizes, **tokens))


def encode(*texts: str) -> torch.Tensor:
    return torch.tensor([list(text.encode()) for text in texts])


def train(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    optimizer = torch.optim.AdamW(vblora.parameter_groups(model), weight_decay=0.0)
    for _ in range(2 if arguments.quick else 150):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


config = vblora.VBLoRAConfig(r=4, num_vectors=256, vector_length=64, target_modules="all-linear", seed=0)
names = ["Grace", "Linus", "Radia"]
texts = {name: f"> Hello {name}!\n" for name in names}

# One adapter learns all texts. The others share its bank, which is frozen, so their files contain only indices and weights.
model = vblora.inject(load_base(), config)
train(model, encode(*texts.values()))
model.vblora.default.bank.save(bank_file)
for name in names:
    model = vblora.inject(load_base(), config, bank=bank_file, freeze_bank=True)
    loss = train(model, encode(texts[name]))
    vblora.save(model, arguments.output / name, form="deploy")
    size = sum(file.stat().st_size for file in (arguments.output / name).iterdir())
    print(f"{name}: loss {loss:.3f}, {size / 1024:.0f} KiB")

model = load_base().eval()
store = AdapterStore(model, arguments.output, bank=bank_file)
users = ["Linus", "Grace", None, "Radia"]  # None: the base model
replies = model.generate(
    encode("> ").repeat(len(users), 1), adapter_names=users, max_new_tokens=20, do_sample=False, eos_token_id=10
)
for user, reply in zip(users, replies, strict=True):
    print(f"{user}: {bytes(reply.tolist()).rstrip(bytes(1))!r}")
print(store.stats())
