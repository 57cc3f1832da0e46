"""With the same parameters, our model and PEFT's VBLoRA model are the same function with the same gradients."""

import copy

import peft
import pytest
import torch

import vblora
from tests.small_models import bert, gpt2, llama, relative_error

SIZES = {"r": 3, "num_vectors": 20, "vector_length": 8}


def to_peft(adapter, peft_model) -> dict[str, torch.nn.Parameter]:
    """Copies our parameters into PEFT's; returns theirs by our rows: ``bank`` and ``name.A``, ``name.B``."""
    modules = dict(peft_model.base_model.model.named_modules())
    theirs = {"bank": peft_model.base_model.vblora_vector_bank["default"]}
    rows = {"bank": adapter.bank.vectors, **rows_of(adapter, adapter.logits)}
    for target in adapter.targets:
        theirs[target.name + ".A"] = modules[target.name].vblora_logits_A["default"]
        theirs[target.name + ".B"] = modules[target.name].vblora_logits_B["default"]
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(as_peft(name, rows[name], parameter.shape))
    return theirs


def rows_of(adapter, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows ``(S, h)`` as each target's A and B."""
    sizes = {}
    for target in adapter.targets:
        sizes[target.name + ".A"] = adapter.r * target.in_features // adapter.bank.vector_length
        sizes[target.name + ".B"] = adapter.r * target.out_features // adapter.bank.vector_length
    return dict(zip(sizes, values.split(list(sizes.values())), strict=True))


def as_peft(name: str, rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if name.endswith(".B"):  # (out / b, r, h) there
        return rows.view(shape[1], shape[0], shape[2]).transpose(0, 1)
    return rows.view(shape)


@pytest.mark.parametrize("topk", [1, 2, 4])
@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (bert, ["query", "value", "intermediate.dense"]),
        (llama, "all-linear"),
        (gpt2, ["c_attn", "mlp.c_proj"]),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_outputs_and_gradients_equal_pefts(make, targets, topk):
    torch.manual_seed(0)
    base = make()
    config = vblora.VBLoRAConfig(topk=topk, target_modules=targets, init_vector_bank_bound=0.5, **SIZES)
    ours = vblora.inject(copy.deepcopy(base), config)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.VBLoRAConfig(topk=topk, target_modules=targets, init_vector_bank_bound=0.5, **SIZES)
    )
    parameters = to_peft(ours.vblora.default, theirs)
    assert len(parameters) == 1 + 2 * len(ours.vblora.default.targets)

    ids = torch.randint(3, 50, (3, 9))
    labels = torch.tensor([0, 1, 0]) if make is bert else ids
    results = [model.train()(input_ids=ids, labels=labels) for model in (ours, theirs, base.train())]
    assert relative_error(results[0].logits, results[1].logits) < 1e-6
    assert relative_error(results[2].logits, results[1].logits) > 1e-3  # the adapter matters

    for result in results[:2]:
        result.loss.backward()
    grads = {
        "bank": ours.vblora.default.bank.vectors.grad,
        **rows_of(ours.vblora.default, ours.vblora.default.logits.grad),
    }
    for name, parameter in parameters.items():
        if topk == 1 and name != "bank":
            assert not grads[name].any() and not parameter.grad.any()
            continue
        assert relative_error(as_peft(name, grads[name], parameter.shape), parameter.grad) < 1e-5, name


def test_same_targets_as_peft_by_default():
    for make in (bert, llama, gpt2):
        model = make()
        ours = vblora.inject(make(), vblora.VBLoRAConfig(**SIZES))
        theirs = peft.get_peft_model(model, peft.VBLoRAConfig(fan_in_fan_out=make is gpt2, **SIZES))
        assert {t.name for t in ours.vblora.default.targets} == set(theirs.base_model.targeted_module_names)


@pytest.mark.parametrize(
    "choice",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "layers.1.mlp.up_proj"]},
        {"target_modules": r".*layers\.0\..*(q|v)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "gate_proj"], "modules_to_save": ["mlp"]},
    ],
)
def test_same_targets_as_peft_when_chosen(choice):
    ours = vblora.inject(llama(), vblora.VBLoRAConfig(**SIZES, **choice))
    theirs = peft.get_peft_model(llama(), peft.VBLoRAConfig(**SIZES, **choice))
    assert {t.name for t in ours.vblora.default.targets} == set(theirs.base_model.targeted_module_names)
