"""The body of `/load_lora_adapter_from_tensors`, by the schema of SGLang 0.5.23 and what its unpickler allows."""

import base64
import io
import json
import pickle

import peft
import pytest
import torch

import vblora
from tests.small_models import llama, relative_error
from vblora.integrations.sglang import load_request

CONFIGS = {
    "vblora": vblora.VBLoRAConfig(
        r=4, num_vectors=24, vector_length=16, target_modules="all-linear", init_vector_bank_bound=0.3, scaling=2.0
    ),
    "lora": vblora.LoraConfig(r=3, lora_alpha=12, use_rslora=True, target_modules="all-linear"),
    "vera": vblora.VeraConfig(r=8, target_modules="all-linear"),
    "tied": vblora.TiedLoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"]),
}


class Unpickler(pickle.Unpickler):
    """Allows of what SGLang's allows no more than tensors need."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        if (module, name) in {("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")}:
            return super().find_class(module, name)
        raise AssertionError(f"{module}.{name} is not needed for tensors")


def received(request: dict, process: int = 0) -> dict[str, torch.Tensor]:
    """What a process of SGLang gets of a body that went through JSON."""
    data = json.loads(json.dumps(request))["serialized_named_tensors"][process]
    return Unpickler(io.BytesIO(base64.b64decode(data, validate=True))).load()


@pytest.fixture
def base():
    torch.manual_seed(0)
    return llama().eval()


@pytest.mark.parametrize("method", CONFIGS)
def test_sglang_gets_the_same_update_as_lora(base, method, tmp_path):
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = vblora.inject(base, CONFIGS[method])
    with torch.no_grad():
        for parameter in model.vblora["default"].parameters():
            parameter.normal_(std=0.2)
    vblora.save(model, tmp_path, form="deploy")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits

    request = load_request(tmp_path, "user-17", tp_size=2)
    assert request.keys() == {"lora_name", "config_dict", "serialized_named_tensors", "pinned"}
    assert request["lora_name"] == "user-17" and request["pinned"] is False
    assert len(request["serialized_named_tensors"]) == 2
    config = request["config_dict"]
    assert config["peft_type"] == "LORA" and all("." in name for name in config["target_modules"])
    tensors = received(request, 1)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert len(base64.b64decode(request["serialized_named_tensors"][0])) < size + 2000 * len(tensors)

    plain = llama().eval()
    plain.load_state_dict(state)
    # SGLang's factor of the update is lora_alpha / r, whatever else the config says.
    wrapped = peft.get_peft_model(plain, peft.LoraConfig(**config, init_lora_weights=False))
    peft.set_peft_model_state_dict(wrapped, tensors)
    with torch.no_grad():
        assert relative_error(wrapped(input_ids=ids).logits, expected) < 1e-5
        with wrapped.disable_adapter():
            assert relative_error(wrapped(input_ids=ids).logits, expected) > 1e-3


def test_half_precision_halves_the_request(base, tmp_path):
    vblora.save(vblora.inject(base, CONFIGS["vblora"]), tmp_path, form="deploy")
    full, half = received(load_request(tmp_path, "a")), received(load_request(tmp_path, "a", dtype=torch.bfloat16))
    for name, tensor in half.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, full[name].bfloat16())


def test_a_shared_bank(base, tmp_path):
    vblora.VectorBank(24, 16, 0.3).save(tmp_path / "bank.safetensors")
    model = vblora.inject(base, CONFIGS["vblora"], bank=tmp_path / "bank.safetensors", freeze_bank=True)
    vblora.save(model, tmp_path / "a", form="deploy")
    assert received(load_request(tmp_path / "a", "a", bank=tmp_path / "bank.safetensors"))
    with pytest.raises(ValueError, match=r"a cannot be served: .*its vector bank is in a file of its own"):
        load_request(tmp_path / "a", "a")


def test_what_sglang_would_pass_over_is_refused(base, tmp_path):
    for name, targets in {"v": ["v_proj"], "q": ["q_proj"], "k": ["q_proj", "k_proj"]}.items():
        model = vblora.inject(llama(), vblora.LoraConfig(r=2, target_modules=targets))
        vblora.save(model, tmp_path / name)
        with pytest.raises(ValueError, match=r"which SGLang needs beside it"):
            load_request(tmp_path / name, name)
    head = vblora.inject(base, vblora.LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["lm_head"]))
    vblora.save(head, tmp_path / "head")
    with pytest.raises(ValueError, match=r"it trained `lm_head\.weight`"):
        load_request(tmp_path / "head", "head")
    with pytest.raises(ValueError, match="`tp_size` is 0"):
        load_request(tmp_path / "v", "v", tp_size=0)
    with pytest.raises(FileNotFoundError):
        load_request(tmp_path / "nowhere", "x")
