"""What a config names in vain is warned of by name, and so are weights that no target reaches."""

import warnings

import pytest
import torch
from torch import nn

import vblora
from tests.small_models import Net, bert

SIZES = {"num_vectors": 16, "vector_length": 8}


def warned(model: nn.Module, **fields) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vblora.inject(model, vblora.VBLoRAConfig(**SIZES | fields))
    return [str(warning.message) for warning in caught if issubclass(warning.category, vblora.VBLoRAWarning)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["query", "valeu"]}, "`target_modules` has 'valeu', which matches nothing"),
        ({"exclude_modules": ["key", "dens"]}, "`exclude_modules` has 'dens', which"),
        ({"exclude_modules": "encoder.*query"}, "`exclude_modules` has 'encoder.*query', which"),
        ({"layers_to_transform": [0, 99]}, "`layers_to_transform` has 99, which"),
        ({"layers_to_transform": 1, "layers_pattern": ["layer", "h"]}, "`layers_pattern` has 'h', which"),
        ({"modules_to_save": ["classifier", "score"]}, "`modules_to_save` has 'score', which"),
        ({"target_modules": ["query", "word_embeddings"], "layers_to_transform": [0]}, "has 'word_embeddings', which"),
        (
            {"target_modules": ["query", "classifier"], "modules_to_save": ["classifier"]},
            "`target_modules` has 'classifier', which matches nothing in this model outside `modules_to_save`",
        ),
    ],
)
def test_each_entry_that_matches_nothing_is_named(fields, message):
    (found,) = warned(bert(), **{"target_modules": ["query", "value"]} | fields)
    assert message in found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["qeury", "valeu"]}, "matches no layer of this model"),
        ({"layers_to_transform": [98, 99]}, "leaves no layer of this model"),
        (
            {"modules_to_save": ["head", "score"]},
            "`modules_to_save` names `head` and `score`, which matches no module",
        ),
    ],
)
def test_nothing_but_such_entries_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        vblora.inject(bert(), vblora.VBLoRAConfig(**{"target_modules": ["query"]} | SIZES | fields))


def test_names_that_match_are_not_warned_of():
    fields = {"layers_to_transform": [0, 1], "layers_pattern": "layer", "exclude_modules": ["key"]}
    assert warned(bert(), target_modules=["query", "key"], modules_to_save=["classifier"], **fields) == []
    assert warned(bert()) == []  # the defaults of an architecture
    assert warned(Net(blocks=2), target_modules="all-linear", exclude_modules=["head"]) == []


def mixtral(**overrides):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 64, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes | overrides))


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "gate_up_proj"], "all-linear"])
def test_fused_experts_are_named(targets):
    model = mixtral()
    experts = {name: p for name, p in model.named_parameters() if p.dim() == 3}
    assert len(experts) == 4
    reached = {name: p for name, p in experts.items() if targets == "all-linear" or name.endswith(targets[1])}
    share = sum(p.numel() for p in reached.values()) / sum(p.numel() for p in model.parameters())
    messages = warned(model, target_modules=targets)
    (found,) = [message for message in messages if "cannot reach" in message]
    assert f"`{next(iter(reached))}` and {len(reached) - 1} more, {share:.0%} of the model's parameters" in found
    assert targets == "all-linear" or any(f"has '{targets[1]}', which" in message for message in messages)


def test_experts_beside_a_targeted_layer_are_named():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, num_experts=4))
    (found,) = warned(model, target_modules=["q_proj", "gate_proj", "up_proj"])
    assert "`model.layers.0.mlp.experts.gate_up_proj` and 1 more" in found


def test_experts_that_are_not_meant_are_not_named():
    assert warned(mixtral()) == []
    assert warned(mixtral(), target_modules=["q_proj", "v_proj"]) == []
    assert warned(mixtral(), target_modules="all-linear", exclude_modules=["experts"]) == []


def test_a_parameter_that_is_named_as_a_target_is_said_to_be_none():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj_weight = nn.Parameter(torch.randn(24, 8))
            self.out = nn.Linear(8, 8)

    messages = warned(nn.Sequential(Attention()), target_modules=["out", "in_proj_weight"])
    assert any("cannot reach `0.in_proj_weight`, " in message for message in messages)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers_to_transform": [-1]}, r"is \['query'\], but `layers_to_transform` \[-1\] leaves? no layer"),
        (
            {"layers_to_transform": 0, "layers_pattern": "blocks"},
            "but `layers_to_transform` 0 and `layers_pattern` 'blocks'",
        ),
        ({"modules_to_save": ["encoder"]}, r"but `modules_to_save` \['encoder'\]"),
        ({"target_modules": ["all-linear"]}, 'a list of names. Pass the string "all-linear" instead'),
    ],
)
def test_the_reason_why_nothing_is_left_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        vblora.inject(bert(), vblora.VBLoRAConfig(**SIZES | {"target_modules": ["query"]} | fields))
