"""vLLM serves adapters by name: `make test-vllm` runs this in an environment of its own, with vLLM's CPU build.

It imports nothing of the tests' package, so that it runs against an installed vblora. Each row of a batch has an adapter: in
vLLM 0.32's CPU build, a row without one gets that of another row (mended in 0.33).
"""

import asyncio
import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vblora

pytest.importorskip("vllm", reason="runs in `make test-vllm`")

PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]
TOKENS = 8
VBLORA = {"num_vectors": 32, "vector_length": 16, "target_modules": "all-linear"}
ADAPTERS: dict[str, Any] = {
    "user-1": vblora.VBLoRAConfig(r=4, **VBLORA),
    "user-2": vblora.VBLoRAConfig(r=4, **VBLORA),
    "user-3": vblora.VBLoRAConfig(r=2, topk=3, scaling=8.0, **VBLORA | {"target_modules": ["q_proj", "down_proj"]}),
    "vera": vblora.VeraConfig(r=8, target_modules="all-linear"),
    "tied": vblora.TiedLoraConfig(r=2, target_modules=["k_proj", "up_proj"]),
    "lora": vblora.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear"),
}


class World:
    """A small Llama with a tokenizer, a bank, adapters of it, and the tokens that vblora generates with each."""

    def __init__(self, root: Path) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        self.model, self.adapters, self.bank = root / "model", root / "adapters", root / "bank.safetensors"
        sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
        torch.manual_seed(0)
        self.config = LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2, initializer_range=0.3)
        self.base = LlamaForCausalLM(self.config).eval()
        self.base.save_pretrained(self.model)
        words = Tokenizer(models.WordLevel({f"w{word}": word for word in range(64)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2")
        tokenizer.save_pretrained(self.model)
        vblora.VectorBank(32, 16, 0.4).save(self.bank)
        bank = vblora.VectorBank.from_file(self.bank)
        self.expected = {}
        for name, config in ADAPTERS.items():
            shared = {"bank": bank, "freeze_bank": True} if isinstance(config, vblora.VBLoRAConfig) else {}
            model = vblora.inject(copy.deepcopy(self.base), config, **shared)
            with torch.no_grad():
                for parameter in model.vblora["default"].parameters():
                    if parameter is not bank.vectors:
                        parameter.normal_()
            vblora.save(model, self.adapters / name, form="deploy")
            self.expected[name] = [self.generate(model, prompt) for prompt in PROMPTS]
        answers = [self.generate(self.base, PROMPTS[0]), *(tokens[0] for tokens in self.expected.values())]
        assert len({tuple(answer) for answer in answers}) == len(answers)  # or a test could not tell them apart

    @staticmethod
    def generate(model: Any, prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        choice = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **choice)[0, len(prompt) :].tolist()

    def add_unsound(self) -> list[str]:
        """Folders that cannot be served, by name."""
        from transformers import LlamaConfig, LlamaForCausalLM

        shutil.copytree(self.adapters / "user-1", self.adapters / "damaged")
        file = self.adapters / "damaged" / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-40])
        (self.adapters / "empty").mkdir()
        for name, sizes in {"narrow": {"hidden_size": 32, "head_dim": 16}, "deep": {"num_hidden_layers": 3}}.items():
            other = LlamaForCausalLM(LlamaConfig(**self.config.to_dict() | sizes))
            vblora.save(vblora.inject(other, vblora.LoraConfig(r=2, target_modules=["o_proj"])), self.adapters / name)
        vblora.VectorBank(32, 16, 0.4).save(self.bank.with_name("other.safetensors"))
        other_bank = vblora.VectorBank.from_file(self.bank.with_name("other.safetensors"))
        config = vblora.VBLoRAConfig(r=4, **VBLORA)
        model = vblora.inject(copy.deepcopy(self.base), config, bank=other_bank, freeze_bank=True)
        vblora.save(model, self.adapters / "other bank", form="deploy")
        wide = vblora.inject(copy.deepcopy(self.base), vblora.LoraConfig(r=9, target_modules=["o_proj"]))
        vblora.save(wide, self.adapters / "wide")
        return ["damaged", "empty", "narrow", "deep", "other bank"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def environment(world: World) -> Iterator[None]:
    """Set before vLLM's processes start, and before this one loads vLLM's plugins."""
    own = {"VBLORA_ADAPTERS": str(world.adapters), "VBLORA_BANK": str(world.bank), "HF_HUB_OFFLINE": "1"}
    own |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_WAIT_POLICY": "passive", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        yield


@pytest.mark.usefixtures("environment")
def test_one_batch_and_eviction(world: World) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolverRegistry

    sizes = {"max_loras": 2, "max_cpu_loras": 2, "max_lora_rank": 8, "max_num_seqs": 4, "max_model_len": 64}
    engine = LLM(str(world.model), dtype="float32", enable_lora=True, enforce_eager=True, **sizes)
    resolver = LoRAResolverRegistry.get_resolver("vblora")
    requests = {}
    for number, name in enumerate(ADAPTERS, 1):
        requests[name] = asyncio.run(resolver.resolve_lora(str(world.model), name))
        requests[name].lora_int_id = number
    requests["tied"] = LoRARequest("tied", 10, os.path.relpath(world.adapters / "tied"))  # by its folder's path
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    first = world.adapters / "user-1"
    for pair in (["user-1", "user-2"], ["user-3", "vera"], ["tied", "lora"], ["user-1", "user-2"]):
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        answers = engine.generate(prompts, greedy, lora_request=[requests[name] for name in pair], use_tqdm=False)
        for row, name in enumerate(pair):
            assert list(answers[row].outputs[0].token_ids) == world.expected[name][row], name
        if first.exists():
            first.rename(first.with_name(".gone"))  # evicted by the next batches, and asked for by the last
    first.with_name(".gone").rename(first)
    engine.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def server(world: World, environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of vLLM's server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(world.model), "--served-model-name", "base", "--dtype", "float32", "--enforce-eager"]
    command += ["--enable-lora", "--max-loras", "2", "--max-cpu-loras", "2", "--max-lora-rank", "8"]
    command += ["--max-model-len", "64", "--max-num-seqs", "4"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(600):
                if process.poll() is not None or _answers(address):
                    break
                time.sleep(1)
            assert process.poll() is None and _answers(address), log.read_text()[-5000:]
            yield address
        finally:
            process.terminate()
            process.wait(60)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False


def complete(address: str, name: str, row: int = 0) -> tuple[int, list[int]]:
    """The status, and the tokens."""
    body = {"model": name, "prompt": PROMPTS[row], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    try:
        answer = post(f"{address}/v1/completions", body | {"return_token_ids": True})
    except urllib.error.HTTPError as error:
        return error.code, []
    return 200, json.loads(answer)["choices"][0]["token_ids"]


def post(address: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read()


def test_the_server_finds_adapters_by_name(world: World, server: str) -> None:
    unsound = world.add_unsound()
    for name in ADAPTERS:
        assert complete(server, name) == (200, world.expected[name][0])
    (world.adapters / "user-1").rename(world.adapters / ".gone")
    assert complete(server, "user-1", row=1) == (200, world.expected["user-1"][1])
    for name in (*unsound, "nobody", "../adapters/user-2", "user-2/", "..", "x" * 5000):
        assert complete(server, name) == (404, []), name
    assert complete(server, "wide") == (400, [])  # `max_lora_rank`, which vLLM itself checks
    (world.adapters / ".gone").rename(world.adapters / "user-1")
    assert complete(server, "user-2", row=1) == (200, world.expected["user-2"][1])
    # Who unloads a name gets what its folder holds by then.
    shutil.rmtree(world.adapters / "user-2")
    shutil.copytree(world.adapters / "lora", world.adapters / "user-2")
    assert complete(server, "user-2") == (200, world.expected["user-2"][0])
    post(f"{server}/v1/unload_lora_adapter", {"lora_name": "user-2"})
    assert complete(server, "user-2") == (200, world.expected["lora"][0])


def test_other_versions_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    from vblora.integrations.vllm import register

    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    monkeypatch.setenv("VBLORA_ADAPTERS", os.curdir)
    with pytest.raises(RuntimeError, match=r"vllm 0\.99\.1 is not known to vblora.*0\.32\.\*"):
        register()
    monkeypatch.delenv("VBLORA_ADAPTERS")
    monkeypatch.delenv("VBLORA_BANK", raising=False)
    register()  # whoever does not ask for vblora's adapters can use any version
