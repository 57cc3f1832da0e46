"""Damaged adapter folders: each loads to an adapter that is valid, or is refused by name and leaves the model as it was."""

import copy
import json
import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import vblora
from tests.small_models import Net, relative_error
from vblora.checkpoint.folder import CONFIG_FILE, TENSORS_FILE
from vblora.checkpoint.save_load import contents_of
from vblora.model.lookup import attached_adapter

MUTATIONS = 2000
TARGETS = ["embed", "up", "down"]
VBLORA = vblora.VBLoRAConfig(
    r=2, num_vectors=12, vector_length=8, num_candidates=6, init_vector_bank_bound=1.0, target_modules=TARGETS, seed=3
)
VERA = vblora.VeraConfig(r=3, projection_prng_key=5, save_projection=False, target_modules=TARGETS)
LORA = vblora.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["head"], bias="all")
TIED_LORA = vblora.TiedLoraConfig(r=2, target_modules=TARGETS, modules_to_save=["head"])
CASES = [
    (VBLORA, "resume", {}),
    (VBLORA, "deploy", {}),
    (VBLORA, "deploy", {"bank_dtype": torch.int8}),
    (VBLORA, "peft", {}),
    (VBLORA, "peft-topk", {}),
    (VBLORA, "lora", {}),
    (VERA, "resume", {}),
    (VERA, "deploy", {}),
    (VERA, "peft", {}),
    (VERA, "lora", {}),
    (TIED_LORA, "resume", {}),
    (TIED_LORA, "deploy", {}),
    (TIED_LORA, "lora", {}),
    (LORA, "resume", {}),
    (LORA, "deploy", {}),
    (LORA, "peft", {}),
]
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
# Any kind of JSON value, and those that a careless reader takes for another kind.
JSON_VALUES = [
    None, True, False, 0, 1, 2, -1, 7, 2**31, 2**63, 10**30, 0.5, 2.0, 1e300, math.nan, math.inf, "", "x", "16", "(",
    "\ud800", "linear", "convolution", "resume", "lora", [], [[]], [1], ["embed"], ["x", 1], [None], [["embed", 16, 16]],
    {}, {"x": 1}, {"x": "y"}, {"name": 1, "sha256": []},
]  # fmt: skip
NUMBERS = [0.0, -0.0, 1.0, -1.0, 7.0, 1e-30, -300.0, 1e30, math.nan, math.inf, -math.inf]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int32, torch.bool]


@dataclass
class Folder:
    """The two files of an adapter folder. The tensors' file is an 8-byte length, a JSON header, and the tensors' bytes."""

    config: bytes | None
    tensors: bytes | None

    def header(self) -> dict:
        return json.loads(self.tensors[8 : 8 + int.from_bytes(self.tensors[:8], "little")])

    def set_header(self, header: dict) -> None:
        data = self.tensors[8 + int.from_bytes(self.tensors[:8], "little") :]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.tensors = len(text).to_bytes(8, "little") + text + data

    def write(self, path: Path) -> None:
        for name, data in ((CONFIG_FILE, self.config), (TENSORS_FILE, self.tensors)):
            if data is None:
                (path / name).unlink(missing_ok=True)
            else:
                (path / name).write_bytes(data)


# Mutations


def mutate_bytes(folder: Folder, draw: random.Random) -> None:
    name = draw.choice(["config", "tensors"])
    data = bytearray(getattr(folder, name))
    place = draw.randrange(len(data)) if draw.random() < 0.5 else draw.randrange(min(len(data), 400))
    match draw.randrange(6):
        case 0:
            data[place] ^= 1 << draw.randrange(8)
        case 1:
            del data[place:]
        case 2:
            del data[place : place + draw.randrange(1, 9)]
        case 3:
            data[place:place] = draw.randbytes(draw.randrange(1, 9))
        case 4:
            data[place : place + 8] = draw.randbytes(8)
        case 5:
            data = draw.choice([None, bytearray(), bytearray(b"[" * 50_000), bytearray(b"1" * 6_000), bytearray(b"[]")])
    setattr(folder, name, None if data is None else bytes(data))


def mutate_header(folder: Folder, draw: random.Random) -> None:
    header = folder.header()
    if draw.random() < 0.1:
        header["__metadata__"] = draw.choice([None, {}, {"format": "pt"}, {"vblora": "{}"}, {"vblora": "[]"}, []])
    else:
        mutate_json(header, draw)
    folder.set_header(header)


def mutate_metadata(folder: Folder, draw: random.Random) -> None:
    """The description in a file of ours, the config file in one of PEFT's."""
    header = folder.header()
    own = "vblora" in header["__metadata__"]
    values = json.loads(header["__metadata__"]["vblora"] if own else folder.config)
    for _ in range(draw.choice([1, 1, 1, 2])):
        mutate_json(values, draw)
    text = json.dumps(draw.choice(JSON_VALUES) if draw.random() < 0.03 else values)
    if draw.random() < 0.03:
        text = draw.choice(["[" * 50_000, "1" * 6_000, "", "{", '{"version": 1, "version": 1}'])
    if own:
        header["__metadata__"]["vblora"] = text
        folder.set_header(header)
    else:
        folder.config = text.encode()


def mutate_json(values: dict | list, draw: random.Random) -> None:
    """Sets, removes, adds or repeats one value, at any depth."""
    while True:
        keys = list(values) if isinstance(values, dict) else list(range(len(values)))
        key = draw.choice(keys) if keys else None
        if key is None or not isinstance(values[key], (dict, list)) or draw.random() < 0.3:
            break
        values = values[key]
    action = draw.random()
    if key is None or action > 0.9:
        value = copy.deepcopy(draw.choice(JSON_VALUES) if key is None else values[key])
        if isinstance(values, dict):
            values[draw.choice(["x", "r", "embed", "revision"])] = value
        else:
            values.append(value)
    elif action > 0.75:
        del values[key]
    else:
        values[key] = copy.deepcopy(draw.choice(JSON_VALUES))


def mutate_tensors(folder: Folder, draw: random.Random) -> None:
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load(folder.tensors).items()}
    metadata = folder.header()["__metadata__"]
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    match draw.randrange(8):
        case 0 | 1 | 2 if tensor.numel():
            flat = tensor.flatten()
            number = draw.choice(NUMBERS)
            if not tensor.is_floating_point():
                number = draw.choice([0, 1, -1, 100, 255])
            for _ in range(draw.choice([1, 1, len(flat)])):
                flat[draw.randrange(len(flat))] = torch.tensor(number).to(tensor.dtype)
            tensors[name] = flat.view(tensor.shape)
        case 3:
            tensors[name] = tensor.to(draw.choice(DTYPES))
        case 4:
            sizes = [(0,), (), (1, *tensor.shape), tensor.shape[::-1], (*tensor.shape[:-1], 3), (tensor.numel(),)]
            tensors[name] = torch.ones(draw.choice(sizes)).to(tensor.dtype)
        case 5:
            del tensors[name]
        case 6:
            tensors[draw.choice(["x", name + "x", "beside.x", "base_model.model.x", "bank.x"])] = tensor.clone()
        case _:
            other = draw.choice(sorted(tensors))
            tensors[name], tensors[other] = tensors[other], tensors[name]
    folder.tensors = safetensors.torch.save({n: t.contiguous() for n, t in tensors.items()}, metadata)


KINDS: list[Callable[[Folder, random.Random], None]] = [mutate_bytes, mutate_header, mutate_metadata, mutate_tensors]


# What must hold afterwards


def snapshot(model: nn.Module) -> tuple[dict[str, type], dict[str, tuple[bool, Tensor]]]:
    modules = {name: type(module) for name, module in model.named_modules()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return modules, {name: (tensor.requires_grad, tensor.detach().clone()) for name, tensor in tensors.items()}


def is_unchanged(model: nn.Module, before: tuple[dict[str, type], dict[str, tuple[bool, Tensor]]]) -> bool:
    modules, tensors = snapshot(model)
    return (
        modules == before[0]
        and tensors.keys() == before[1].keys()
        and all(grad == before[1][n][0] and torch.equal(t, before[1][n][1]) for n, (grad, t) in tensors.items())
    )


def check_valid(model: nn.Module, net: Net) -> None:
    """The adapter holds no invalid number, and the model computes its update: compared to float64, in plain PyTorch."""
    for name, tensor in model.state_dict().items():
        assert not tensor.isnan().any(), name
        if name.startswith("vblora."):
            assert (tensor.isfinite() | (name.endswith(".logits") & tensor.isneginf())).all(), name
    contents = contents_of(attached_adapter(model))
    contents.check()
    with torch.no_grad():
        actual = model.eval()(X)  # without dropout
        state = {name: tensor.double() for name, tensor in {**net.state_dict(), **contents.extra_parameters}.items()}
        largest = max(tensor.abs().max() for tensor in state.values())
        for target, factors in contents.all_factors(torch.float32):
            A, B = factors.folded()[:2]
            largest = max(largest, A.abs().max(), B.abs().max())
            state[f"{target.name}.weight"] = state[f"{target.name}.weight"] + B.double().T @ A.double()
        expected = torch.func.functional_call(copy.deepcopy(net).double(), state, (X.double(),))
    if largest < 1e3:  # beyond, float32 may overflow
        assert relative_error(actual.double(), expected) < 1e-3


def load(model: nn.Module, path: Path) -> str | None:
    """The message of a refusal, or None. Any other error is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the config file is not what the tensors' file says
        try:
            vblora.load(model, path)
        except (ValueError, FileNotFoundError) as error:
            return str(error)
    return None


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net(blocks=1)


@pytest.fixture(scope="module")
def folders(net, tmp_path_factory) -> list[Folder]:
    """One of each method and form, of adapters that have trained."""
    found = []
    for config, form, options in CASES:
        torch.manual_seed(1)
        model = vblora.inject(copy.deepcopy(net), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        path = tmp_path_factory.mktemp("adapter")
        vblora.save(model, path, form=form, **options)
        found.append(Folder((path / CONFIG_FILE).read_bytes(), (path / TENSORS_FILE).read_bytes()))
    return found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("over", [False, True], ids=["into a base model", "over an adapter"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_mutated_folder_is_valid_or_refused(kind, over, net, folders, tmp_path):
    """``MUTATIONS`` in all. A failure prints the number of the mutation, which seeds it."""
    outcomes = {"loaded": 0, "refused": 0}
    path = tmp_path / "adapter"
    path.mkdir()
    models = [copy.deepcopy(net) for _ in CASES]
    for number in range(MUTATIONS // (2 * len(KINDS))):
        case = number % len(CASES)
        model, draw = models[case], random.Random(f"{kind.__name__} {over} {number}")
        if over and not hasattr(model, "vblora"):
            copy.copy(folders[case]).write(path)
            vblora.load(model, path)
        folder = copy.copy(folders[case])
        kind(folder, draw)
        folder.write(path)
        before = snapshot(model)
        print(f"{kind.__name__} {number}, {CASES[case][0].method}, {CASES[case][1]}")
        message = load(model, path)
        if message is None:
            outcomes["loaded"] += 1
            check_valid(model, net)
            models[case] = copy.deepcopy(net)
        else:
            outcomes["refused"] += 1
            assert str(path / CONFIG_FILE) in message or str(path / TENSORS_FILE) in message
            assert is_unchanged(model, before)
    print(outcomes)
    assert min(outcomes.values()) > 10
