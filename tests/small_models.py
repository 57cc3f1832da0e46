"""Small models with random weights, and what tests ask of any of them."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import vblora  # noqa: F401  # its operators


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """A residual network whose blocks are recomputed in backward if told so."""

    def __init__(self, width: int = 16, blocks: int = 24, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 3)
        self.reentrant = reentrant  # None: no checkpointing

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


MIXING = (torch.ops.vblora.admixture.default, torch.ops.vblora.admixture_parts.default)


class ComposedRows(TorchDispatchMode):
    """Counts the sub-vectors composed within it, and the calls that composed them."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in MIXING:
            self.rows += args[0].shape[0]
            self.calls += 1
        return function(*args, **(kwargs or {}))


class Made(TorchDispatchMode):
    """Notes the shapes of the tensors that operators make within it: neither views of others nor what is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else [out]
        if not any(value.alias_info for value in function._schema.returns):
            self.shapes += [tuple(tensor.shape) for tensor in made if torch.is_tensor(tensor)]
        return out


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def bert(**overrides):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**sizes | overrides))


def llama(**overrides):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes | overrides))


def gpt2(**overrides):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes | overrides))
