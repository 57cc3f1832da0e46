"""What every test may ask for: a backend that runs the operators, a device, and a seed that a failure prints."""

from __future__ import annotations

import gc
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it

import vblora
from tests.emulation import build
from tests.tables import FILLERS, WORDS

DEVICES = ["cpu"]
if vblora.build_info()["cuda"] != "none" and torch.cuda.is_available():
    DEVICES.append("cuda")


@dataclass(frozen=True)
class Backend:
    """Where the operators run: `ops` has all operators of `torch.ops.vblora`; tensors belong on `device`."""

    name: str
    ops: Any
    device: torch.device


def _backends() -> dict[str, Backend]:
    backends = {"cpu": Backend("cpu", torch.ops.vblora, torch.device("cpu"))}
    for order in build.ORDERS:  # the CUDA kernels, run on the CPU, with a block's threads in this order
        name = f"cuda-emulated-{order}"
        backends[name] = Backend(name, build.Operators(order), torch.device("cpu"))
    if "cuda" in DEVICES:
        backends["cuda"] = Backend("cuda", torch.ops.vblora, torch.device("cuda:0"))  # as messages name it
    return backends


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "backends(*names): run on these backends only; on all there are, if not given")


def pytest_collection_finish() -> None:
    # Trainers and benchmarks collect garbage hundreds of times, which takes half a second if all that was imported is searched.
    gc.collect()
    gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("backends")
        backends = [backend for name, backend in _backends().items() if marker is None or name in marker.args]
        metafunc.parametrize("backend", backends, ids=lambda backend: backend.name)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with a tokenizer of our own words, as ``save_pretrained`` writes them."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("model")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLERS, *WORDS["fresh"], *WORDS["rotten"]]
    BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}, model_max_length=64).save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a test makes its tensors and modules if it does not say so: on each device that there is."""
    device = torch.device(request.param)
    if device.type == "cpu":  # is the default
        yield device
        return
    # Bits are compared, and torch's memory-efficient attention is not deterministic.
    with device, sdpa_kernel(SDPBackend.MATH):
        yield device


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small models are not faster on several, and far slower where the processor is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Fresh random numbers in each run, and other ones in each test. Set the variable that a failure prints to repeat it."""
    seed = request.config.stash.get(_SEED, None)
    if seed is None:
        seed = int(os.environ.get("VBLORA_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
        request.config.stash[_SEED] = seed
    print(f"VBLORA_TEST_SEED={seed}")
    # The generator looks at 32 bits of a seed, so all that tells tests and runs apart has to be in those.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {request.node.nodeid}".encode()))


_SEED = pytest.StashKey[int]()
