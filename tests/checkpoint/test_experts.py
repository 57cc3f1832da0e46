"""Files for PEFT of mixture-of-experts models, in which PEFT takes some layers for experts."""

import copy
import warnings

import peft
import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import vblora
from tests.small_models import relative_error

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = torch.arange(7)[None]


def adapted(base, targets):
    torch.manual_seed(0)
    config = vblora.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    return vblora.inject(copy.deepcopy(base), config).eval()


def as_peft_reads(base, folder):
    """PEFT's output with the adapter of a file."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(IDS).logits


def deepseek():
    """A model whose first block is dense, with layers that are called as experts were before they were fused."""
    torch.manual_seed(0)
    experts = {"moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    attention = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    sizes = SIZES | experts | attention | {"num_hidden_layers": 2, "n_group": 1, "topk_group": 1}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, num_key_value_heads=2)).eval()


@pytest.mark.filterwarnings("ignore:Found missing adapter keys", "ignore:Unsupported layer type")
def test_layers_that_peft_takes_for_experts_are_warned_of(tmp_path):
    base = deepseek()
    model = adapted(base, ["gate_proj", "up_proj", "down_proj"])
    with pytest.warns(
        vblora.VBLoRAWarning, match=r"DeepseekV3ForCausalLM fuses its experts, .*layers\.0\.mlp\.gate_proj"
    ):
        vblora.save(model, tmp_path, form="lora")
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(vblora.load(copy.deepcopy(base), tmp_path).eval()(IDS).logits, expected)
        misread = relative_error(as_peft_reads(base, tmp_path), expected)
    assert misread > 1e-3, "PEFT reads the file as it was written: the warning is no longer needed"


@pytest.mark.parametrize("name", ["attention of experts", "no experts"])
def test_others_are_not_warned_of(name, tmp_path):
    torch.manual_seed(0)
    if name == "no experts":
        base, targets = LlamaForCausalLM(LlamaConfig(**SIZES)).eval(), ["gate_proj", "down_proj"]
    else:
        base = Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, num_experts=4, num_key_value_heads=2)).eval()
        targets = ["q_proj", "v_proj"]
    model = adapted(base, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error", vblora.VBLoRAWarning)
        vblora.save(model, tmp_path, form="lora")
    with torch.no_grad():
        assert relative_error(as_peft_reads(base, tmp_path), model(IDS).logits) < 1e-5
