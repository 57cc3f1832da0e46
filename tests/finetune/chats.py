"""A tiny language model, its tokenizer with a chat template, and texts that it can learn."""

import json
import random
from pathlib import Path

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
WORDS = ["the", "film", "cat", "dog", "is", "good", "bad", "warm", "dull", "says", "hello", "what", "who", "?", "."]
WORDS += ["user", "assistant", "system"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{m.role}} {{m.content}} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def make_tokenizer():
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_model(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"vocab_size": len(SPECIAL) + len(WORDS), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 5}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).save_pretrained(folder)
    return folder


def make_pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        subject, kind = generator.choice(["film", "cat", "dog"]), generator.choice(["good", "bad", "warm", "dull"])
        rows.append({"prompt": f"what is {kind} {subject} ?", "completion": f"the {subject} is {kind} ."})
    return rows


def make_chats(count: int) -> list[dict[str, list]]:
    def message(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    return [
        {
            "messages": [
                message("user", row["prompt"]),
                message("assistant", row["completion"]),
                message("user", f"who says {index % 5}"),
                message("assistant", "hello ."),
            ]
        }
        for index, row in enumerate(make_pairs(count))
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
