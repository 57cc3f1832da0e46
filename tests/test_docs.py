"""Every Python example in the documentation runs, with small models in the place of those from the hub."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from json import dumps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import vblora
from tests.small_models import bert, llama
from vblora.finetune import demo

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

DOCS = Path(__file__).parents[1] / "docs"
TEXTS = ["the film is good and warm", "a very bad film"] * 4


def blocks(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
PAGES = [page for page in PAGES if blocks(page)]


def config(**fields: Any) -> vblora.VBLoRAConfig:
    return vblora.VBLoRAConfig(
        **{"num_vectors": 16, "vector_length": 16, "target_modules": ["q_proj", "v_proj"]} | fields
    )


def causal_lm(*_: object, quantization_config: object = None, **__: object) -> nn.Module:
    model = llama(
        vocab_size=30522, hidden_size=192, intermediate_size=384, num_attention_heads=3, num_key_value_heads=3
    )
    if quantization_config is not None:
        from transformers.integrations import replace_with_bnb_linear

        model.config.quantization_config = quantization_config
        model = replace_with_bnb_linear(model, quantization_config=quantization_config)
    return model


def tokenizer(*_: object, **__: object) -> transformers.PreTrainedTokenizerBase:
    made = transformers.PreTrainedTokenizerFast.from_pretrained(demo.find_model())
    made.eos_token, made.pad_token = "[SEP]", "[PAD]"
    made.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return made


def save_users(base: Callable[[], nn.Module]) -> None:
    """Deployed adapters that share a bank, with the names of docs/serving.md."""
    vblora.VectorBank(16, 16, 0.5).save("bank.safetensors")
    for user in ("user-17", "user-4"):
        model = vblora.inject(base(), config(), bank="bank.safetensors", freeze_bank=True)
        vblora.save(model, Path("adapters", user), form="deploy")


def adapted() -> dict[str, Any]:
    model = vblora.inject(llama(), config(num_vectors=300, seed=0))
    optimizer = torch.optim.AdamW(vblora.parameter_groups(model))
    ids = torch.randint(3, 50, (2, 6))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    models = {name: llama() for name in ("fresh", "other", "base")}
    return models | {"model": model, "optimizer": optimizer, "config": config(num_vectors=300)}


def classifier() -> dict[str, Any]:
    from datasets import Dataset

    Dataset.from_dict({"text": TEXTS, "label": ["good", "bad"] * 4}).to_csv("reviews.csv")
    return {}


def chat() -> dict[str, Any]:
    from datasets import Dataset

    turns = [[{"role": "user", "content": "hello"}, {"role": "assistant", "content": text}] for text in TEXTS]
    Dataset.from_dict({"messages": turns}).to_json("chats.jsonl")
    return {}


def pairs() -> dict[str, Any]:
    from datasets import Dataset
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    data = [(torch.randn(2, 8), torch.randn(2, 4))]
    vblora.save(vblora.inject(causal_lm(), config(vector_length=32)), "sft-adapter")
    preferences = {"prompt": ["the film"] * 4, "chosen": [" is good"] * 4, "rejected": [" is bad"] * 4}
    return {
        "model": causal_lm(),
        "tokenizer": tokenizer(),
        "preferences": Dataset.from_dict(preferences),
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "pairs": Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]}),
        "loss": MultipleNegativesRankingLoss,
        "torch": torch,
        "net": nn.Sequential(nn.Linear(8, 4)),
        "config": vblora.VBLoRAConfig(num_vectors=8, vector_length=4, target_modules="all-linear"),
        "data": data,
    }


def processes() -> dict[str, Any]:
    from accelerate import Accelerator
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = llama()
    model.layers = model.model.layers
    data = torch.utils.data.DataLoader([0, 1])
    return {
        "model": model,
        "config": config(),
        "rank": 0,
        "DistributedDataParallel": DistributedDataParallel,
        "fully_shard": fully_shard,
        "accelerator": Accelerator(cpu=True),
        "data": data,
    }


def four_methods() -> dict[str, Any]:
    return {"model": llama(hidden_size=64, num_key_value_heads=4)}


def peft_model() -> dict[str, Any]:
    import peft

    return {"peft": peft, "model": llama(hidden_size=256, intermediate_size=256, num_key_value_heads=4)}


def lightning() -> dict[str, Any]:
    pytest.importorskip("lightning")  # make test-trainers has it
    given = {"make_base_model": lambda: nn.Sequential(nn.Linear(8, 4))}
    settings = {"num_vectors": 8, "vector_length": 4, "target_modules": "all-linear"}
    data = torch.utils.data.TensorDataset(torch.randn(2, 8), torch.randn(2, 4))
    return given | {"config": vblora.VBLoRAConfig(**settings), "data": torch.utils.data.DataLoader(data)}


def diffusion() -> dict[str, Any]:
    diffusers = pytest.importorskip("diffusers")  # make test-trainers has it
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"block_out_channels": (64,), "cross_attention_dim": 64, "layers_per_block": 1, "norm_num_groups": 8}
    pipelines = [SimpleNamespace(unet=diffusers.UNet2DConditionModel(**sizes, **blocks)) for _ in range(2)]
    return dict(zip(("pipeline", "other"), pipelines, strict=True))


def shared_bank() -> dict[str, Any]:
    from datasets import Dataset

    sizes = {"num_labels": 2, "hidden_size": 64, "num_attention_heads": 4}
    models = {name: bert(**sizes) for name in ("reviews", "topics")}
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": label} for label in (0, 1)])
    given = {"models": models, "fresh": bert(**sizes), "model": bert(**sizes)}
    given |= {"collate": transformers.default_data_collator}
    return given | {"reviews": rows, "topics": rows}


def several() -> dict[str, Any]:
    vblora.save(vblora.inject(llama(), config()), "my-adapter")
    return {"model": llama(), "config": config(), "other_config": config(r=2)}


def serving() -> dict[str, Any]:
    class Storage:
        @staticmethod
        def download_directory(name: str, folder: Path) -> None:
            folder.mkdir(parents=True)

    def post(_url: str, json: dict[str, Any]) -> Any:
        return SimpleNamespace(raise_for_status=lambda: dumps(json))

    save_users(lambda: llama(vocab_size=30522))
    given = {"tokenizer": tokenizer(), "prompts": TEXTS[:3], "Path": Path, "cache": Path("cache"), "s3": Storage}
    given["requests"] = SimpleNamespace(post=post)
    return given | {"model": llama(vocab_size=30522)}


# What a page's examples take for granted, made anew before each of them.
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "adapters.md": several,
    "candidates.md": adapted,
    "checkpoints.md": adapted,
    "how-to/chat.md": chat,
    "how-to/classifier.md": classifier,
    "how-to/diffusers.md": diffusion,
    "how-to/distributed.md": processes,
    "how-to/lightning.md": lightning,
    "how-to/merge-and-export.md": adapted,
    "how-to/save-and-resume.md": adapted,
    "how-to/trainers.md": pairs,
    "methods.md": four_methods,
    "peft.md": peft_model,
    "serving.md": serving,
    "sharing-a-bank.md": shared_bank,
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and tokenizers without a network: the names in the examples are of small models here."""
    encoder = demo.find_model()
    for auto in (transformers.AutoModelForSequenceClassification,):
        own = auto.from_pretrained
        monkeypatch.setattr(auto, "from_pretrained", lambda _name, own=own, **given: own(encoder, **given))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", tokenizer)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", causal_lm)
    import sentence_transformers
    import trl

    class Encoder(sentence_transformers.SentenceTransformer):
        def __init__(self, *_: object) -> None:
            super().__init__(str(encoder), device="cpu", local_files_only=True)

    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", Encoder)
    for arguments in ("SFTConfig", "DPOConfig"):
        monkeypatch.setattr(trl, arguments, partial(getattr(trl, arguments), use_cpu=True))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if "fully_shard" in "".join(blocks(page)):
        request.getfixturevalue("one_process")
    request.getfixturevalue("hub")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"torch": torch, "nn": nn, "vblora": vblora}
    for number, code in enumerate(blocks(page)):
        if page in GIVEN:
            names |= GIVEN[page]()
        exec(compile(code, f"{page}, example {number}", "exec"), names)
