"""An accelerated PEFT model is PEFT's model: each test does the same to both, and compares."""

import copy
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.vblora import Linear, VBLoRAModel
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.small_models import ComposedRows, bert, gpt2, llama, relative_error
from vblora import reference
from vblora.integrations.peft import AcceleratedLinear, accelerate, restore

SIZES = {"r": 3, "num_vectors": 20, "vector_length": 8, "init_vector_bank_bound": 0.5}
IDS = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(0))
TARGETS = {bert: ["query", "value", "intermediate.dense"], llama: "all-linear", gpt2: ["c_attn", "mlp.c_proj"]}
MODELS = [
    (bert, {"modules_to_save": ["classifier"]}),
    (bert, {"target_modules": ["query", "value"], "bias": "vblora_only", "vblora_dropout": 0.2}),
    (llama, {}),
    (gpt2, {"bias": "all", "fan_in_fan_out": True}),
]
EXACT = 1e-12  # float64: another order of the same sums
CARELESS = "ignore:(fan_in_fan_out|Already unmerged|Adapter .* was active|Careful, disabling|.*gradient_checkpointing)"
pytestmark = pytest.mark.filterwarnings(CARELESS)


def shake(model):
    """Moves what trains, adapters that are not active included, to where each row's choice is clear."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "vblora_" in name:
            nn.init.normal_(parameter, std=1.0 if "logits" in name else 0.3)
    return model


def make_peft(make=bert, dtype=torch.float64, autocast_adapter_dtype=True, **choice):
    torch.manual_seed(0)
    choice = {"target_modules": TARGETS[make]} | SIZES | choice
    base = make().to(dtype)
    return shake(peft.get_peft_model(base, peft.VBLoRAConfig(**choice), autocast_adapter_dtype=autocast_adapter_dtype))


def pair(*args, **kwargs):
    theirs = make_peft(*args, **kwargs)
    return theirs, accelerate(copy.deepcopy(theirs))


def run(model):
    labels = torch.tensor([0, 1, 0]) if "Bert" in type(model.get_base_model()).__name__ else IDS
    return model(input_ids=IDS, labels=labels)


@torch.no_grad()
def output(model):
    return run(model.eval()).logits


def assert_same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert list(one) == list(other)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


def assert_same_outputs(theirs, ours, error=EXACT):
    assert relative_error(output(ours), output(theirs)) < error


def assert_same_step(theirs, ours, error=EXACT):
    """Outputs of a training step and all gradients."""
    results = []
    for model in (theirs, ours):
        torch.manual_seed(1)  # of dropout
        model.zero_grad()
        results.append(run(model.train()))
        results[-1].loss.backward()
    assert relative_error(results[1].logits, results[0].logits) < error
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        assert parameter.requires_grad == parameters[name].requires_grad, name
        if parameter.grad is None:
            assert parameters[name].grad is None, name
        elif not parameter.grad.any():
            assert not parameters[name].grad.any(), name
        else:
            assert relative_error(parameters[name].grad, parameter.grad) < error, name


class Operators(TorchDispatchMode):
    """Counts what is computed, and of that, the numbers that Python asks for: for those a device has to be waited for."""

    VIEWS = (torch.ops.aten.detach.default, torch.ops.aten._unsafe_view.default)  # beside those that say so

    def __init__(self) -> None:
        super().__init__()
        self.count = self.syncs = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view and function not in self.VIEWS
        self.syncs += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


# --- what is computed


@pytest.mark.parametrize("topk", [1, 2, 3, 4])
@pytest.mark.parametrize(("make", "choice"), MODELS)
def test_outputs_and_gradients(make, choice, topk):
    theirs, ours = pair(make, topk=topk, **choice)
    assert_same_state(theirs, ours)
    assert_same_outputs(theirs, ours)
    assert_same_step(theirs, ours)
    base = theirs.get_base_model()
    with theirs.disable_adapter():
        without = output(theirs)
    assert relative_error(output(theirs), without) > 1e-3, "the adapter matters"
    layers = sum(isinstance(module, Linear) for module in base.modules())
    with ComposedRows() as composed:
        run(ours)
    assert composed.calls == layers
    with ComposedRows() as composed:
        run(theirs)
    assert composed.calls == 0


def test_training_goes_the_same_way():
    theirs, ours = pair(bert, modules_to_save=["classifier"], target_modules=["query", "value"])
    before = {name: parameter.clone() for name, parameter in ours.named_parameters()}
    losses = []
    for model in (theirs.train(), ours.train()):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses.append([])
        for _ in range(5):
            loss = run(model).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[0][-1] < losses[0][0]
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    theirs, ours = pair(llama)
    for model in (theirs, ours):
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.get_base_model().enable_input_require_grads()
    assert_same_step(theirs, ours)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, autocast_adapter_dtype):
    theirs, ours = pair(bert, dtype, autocast_adapter_dtype)
    adapter = next(p for name, p in ours.named_parameters() if "logits" in name)
    assert adapter.dtype == (torch.float32 if autocast_adapter_dtype else dtype)
    assert run(ours).logits.dtype == dtype
    rounding = 8 * torch.finfo(dtype).eps
    assert_same_outputs(theirs, ours, rounding)
    for merged in (theirs, ours):
        merged.merge_adapter()
    assert_same_outputs(theirs, ours, rounding)


def test_autocast():
    theirs, ours = pair(bert, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_outputs(theirs, ours, 0.03)
        assert_same_step(theirs, ours, 0.1)


@torch.no_grad()
def test_forward_mode():
    slopes = []
    for model in pair(bert):
        values = {name: parameter for name, parameter in model.eval().named_parameters() if "vblora_" in name}
        tangents = {name: torch.ones_like(value) * value.abs() for name, value in values.items()}
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            given = {name: forward_ad.make_dual(value, tangents[name]) for name, value in values.items()}
            logits = torch.func.functional_call(model, given, kwargs={"input_ids": IDS}).logits
            slopes.append(forward_ad.unpack_dual(logits).tangent)
    assert relative_error(slopes[1], slopes[0]) < EXACT


def test_parameters_of_several_dtypes():
    """PEFT casts logits to the type of their layer, and the bank, which all share, to that of the last."""
    theirs, ours = pair(bert, torch.float32)
    for model in (theirs, ours):
        model.base_model.vblora_vector_bank.double()
    for layer, other in zip(layers_of(theirs), layers_of(ours), strict=True):
        for factor, expected in zip(
            other._get_lora_matrices("default"), layer._get_lora_matrices("default"), strict=True
        ):
            assert factor.dtype == expected.dtype == torch.float64
            assert relative_error(factor, expected) < 1e-6


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, Linear)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(value):
    theirs, ours = pair(bert, topk=3)
    for model in (theirs.eval(), ours.eval()):
        layer = layers_of(model)[0]
        with torch.no_grad():
            layer.vblora_logits_A["default"][1, 2, :18] = value  # two are left: -inf is among the best three
            layer.vblora_logits_B["default"][0, 1, 4] = value
            layer.vblora_logits_B["default"][2, 1] = value
    one, other = (layers_of(model)[0]._get_lora_matrices("default") for model in (theirs, ours))
    for factor, expected in zip(other, one, strict=True):
        torch.testing.assert_close(factor, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_ties_go_to_the_lowest_index():
    _, ours = pair(bert, topk=2)
    layer = layers_of(ours)[0]
    bank = layer.vblora_vector_bank["default"]
    with torch.no_grad():
        for logits in (layer.vblora_logits_A["default"], layer.vblora_logits_B["default"]):
            logits.copy_(logits.round())
            logits[1] = 0
    A, B = layer._get_lora_matrices("default")
    expected = [
        reference.admixture(logits["default"].flatten(0, 1), bank, None, 2)[0]
        for logits in (layer.vblora_logits_A, layer.vblora_logits_B)
    ]
    assert relative_error(A, expected[0].view(3, -1)) < EXACT
    assert relative_error(B, expected[1].view(-1, 3, 8).transpose(1, 2).reshape(-1, 3)) < EXACT
    assert relative_error(A[1].view(-1, 8), bank[:2].mean(0).expand(4, 8)) < EXACT


def test_generate():
    theirs, ours = pair(llama)
    one, other = (model.eval().generate(IDS, max_new_tokens=6, do_sample=False) for model in (theirs, ours))
    assert torch.equal(one, other)


def test_meta_device():
    theirs = make_peft(bert).to("meta")
    assert accelerate(theirs)(input_ids=IDS.to("meta")).logits.shape == (3, 2)


# --- what it is for


def test_operators_of_a_layer():
    """The factors and their gradients, in training; docs/peft.md says these numbers."""
    counts = []
    for model in pair(bert):
        layer = layers_of(model.train())[0]
        gradients = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 32), (32, 3))]
        with Operators() as operators:
            torch.autograd.backward(layer._get_lora_matrices("default"), gradients)
        counts.append((operators.count, operators.syncs))
    assert counts == [(31, 1), (6, 0)]
    grads = [logits["default"].grad for logits in (layer.vblora_logits_A, layer.vblora_logits_B)]
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 1  # parts of one tensor, not copies


@pytest.mark.parametrize("make", [bert, llama])
def test_compile(make):
    theirs, ours = pair(make, torch.float32)
    for model in (theirs.eval(), ours.eval()):
        model.get_base_model().config.use_cache = False
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=graphs)
    with torch.no_grad():
        assert relative_error(run(compiled).logits, output(theirs)) < 1e-5

    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    expected = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    ours.train(), theirs.train()
    graphs.frame_count = 0
    for _ in range(3):
        losses = [run(compiled).loss, run(theirs).loss]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
        for loss, step in zip(losses, (optimizer, expected), strict=True):
            loss.backward()
            step.step()
            step.zero_grad()
    assert graphs.frame_count == 1  # for all layers and all steps
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        run(torch.compile(theirs, fullgraph=True, backend="eager"))


# --- merging


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize(("make", "choice"), MODELS)
def test_merge(make, choice, safe_merge, training, tmp_path):
    theirs, ours = pair(make, **choice | {"bias": "none"})
    before, weights = output(theirs), copy.deepcopy(ours.state_dict())
    for model in (theirs, ours):
        model.train(training)  # merging has no dropout
        model.merge_adapter(safe_merge=safe_merge)
    assert relative_error(output(ours), before) < 1e-10
    assert_close_states(theirs, ours)
    for model in (theirs, ours):
        model.unmerge_adapter()
    assert all(torch.allclose(value, weights[name], atol=1e-12) for name, value in ours.state_dict().items())
    one, other = (model.merge_and_unload(safe_merge=safe_merge) for model in (theirs, ours))
    assert not any(isinstance(module, Linear) for module in other.modules())
    assert_close_states(one, other)
    one.save_pretrained(tmp_path / "merged")
    again = type(one).from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    assert relative_error(again(input_ids=IDS).logits, before) < 1e-10


def assert_close_states(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert list(one) == list(other)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_safe_merge_refuses_nan():
    _, ours = pair(bert)
    layer = layers_of(ours)[1]
    weight = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.vblora_logits_A["default"][0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)


def test_unload():
    theirs, ours = pair(bert)
    one, other = theirs.unload(), ours.unload()
    assert_same_state(one, other)


# --- several adapters

OTHER = SIZES | {"r": 2, "num_vectors": 12, "vector_length": 16, "topk": 3}


def two_adapters(**choice):
    """The second one, of other sizes, has layers that the first one has, and layers that it has not."""
    models = pair(bert, target_modules=["query", "value"], **choice)
    for model in models:
        torch.manual_seed(2)
        model.add_adapter("other", peft.VBLoRAConfig(target_modules=["value", "intermediate.dense"], **OTHER))
        torch.manual_seed(3)
        shake(model)
    return models


def test_layers_of_an_adapter_that_is_added_are_accelerated():
    _, ours = two_adapters()
    assert len(layers_of(ours)) == 6
    assert all(type(layer) is AcceleratedLinear for layer in layers_of(ours))


@pytest.mark.parametrize("active", ["default", "other", ["default", "other"], ["other", "default"]])
def test_active_adapters(active):
    theirs, ours = two_adapters()
    outputs = [output(ours)]
    for model in (theirs, ours):
        model.base_model.set_adapter(active)
    assert ours.active_adapters == theirs.active_adapters
    assert_same_outputs(theirs, ours)
    assert_same_step(theirs, ours)
    with theirs.disable_adapter(), ours.disable_adapter():
        assert_same_outputs(theirs, ours)
        outputs.append(output(ours))
    assert_same_outputs(theirs, ours)
    assert relative_error(*outputs) > 1e-3
    for model in (theirs, ours):
        model.merge_adapter()
    assert_same_outputs(theirs, ours)
    assert_close_states(theirs, ours)
    with theirs.disable_adapter(), ours.disable_adapter():  # this unmerges
        assert relative_error(output(ours), outputs[1]) < 1e-10
    assert_same_outputs(theirs, ours)


def test_merging_one_of_two():
    theirs, ours = two_adapters()
    for model in (theirs, ours):
        model.merge_adapter(["other"])
    assert_same_outputs(theirs, ours)
    assert_close_states(theirs, ours)
    for model in (theirs, ours):
        with pytest.raises(ValueError, match="other"):
            model.delete_adapter("other")
        model.unmerge_adapter()
    assert_same_outputs(theirs, ours)


@pytest.mark.parametrize("deleted", ["default", "other"])
def test_delete_adapter(deleted):
    theirs, ours = two_adapters()
    for model in (theirs, ours):
        model.delete_adapter(deleted)
        with pytest.raises(ValueError, match="does not exist"):
            model.delete_adapter(deleted)
    assert not any(name.endswith(f".{deleted}") for name in ours.state_dict())
    assert_same_state(theirs, ours)
    assert_same_outputs(theirs, ours)
    if deleted == "other":
        assert_same_step(theirs, ours)
    for model in (theirs, ours):
        torch.manual_seed(4)
        model.add_adapter(deleted, peft.VBLoRAConfig(target_modules=["key"], **SIZES))
        model.set_adapter(deleted)
        shake(model)
    for name, parameter in theirs.named_parameters():
        ours.get_parameter(name).data.copy_(parameter.data)
    assert_same_step(theirs, ours)


def test_all_layers_share_the_bank():
    _, ours = two_adapters()
    for layer in layers_of(ours):
        for adapter in layer.vblora_logits_A:
            assert layer.vblora_vector_bank[adapter] is ours.base_model.vblora_vector_bank[adapter]
    assert ours.base_model.vblora_vector_bank["other"].shape == (12, 16)
    assert layers_of(ours)[0].vblora_logits_A["default"].shape == (3, 32 // 8, 20)
    assert layers_of(ours)[0].vblora_logits_B["default"].shape == (32 // 8, 3, 20)


@pytest.mark.parametrize("save_only_topk_weights", [False, True])
def test_counts_of_parameters(save_only_topk_weights):
    theirs, ours = pair(bert, save_only_topk_weights=save_only_topk_weights)
    assert ours.get_nb_savable_parameters() == theirs.get_nb_savable_parameters()
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


# --- files


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("save_only_topk_weights", [False, True])
@pytest.mark.parametrize(("make", "choice"), MODELS)
def test_files(make, choice, save_only_topk_weights, low_cpu_mem_usage, tmp_path):
    dtype = torch.float32 if save_only_topk_weights else torch.float64  # PEFT reads the former as nothing else
    theirs, ours = pair(make, dtype, save_only_topk_weights=save_only_topk_weights, **choice)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any("topk_weights" in name for name in one) == save_only_topk_weights

    torch.manual_seed(0)
    base = make().to(dtype)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "ours", low_cpu_mem_usage=low_cpu_mem_usage)
    error = 1e-5 if save_only_topk_weights else EXACT
    assert relative_error(output(accelerate(loaded)), output(theirs)) < error
    if choice.get("bias", "none") == "none":  # PEFT has biases of one adapter only
        loaded.load_adapter(tmp_path / "theirs", "again", low_cpu_mem_usage=low_cpu_mem_usage)
        loaded.set_adapter("again")
        assert relative_error(output(loaded), output(theirs)) < error


# --- what is refused

FOUND = "Found infinity values in VB-LoRA logits"


@pytest.fixture
def compact(tmp_path):
    """A folder that nobody can train from."""
    make_peft(bert, torch.float32, save_only_topk_weights=True).save_pretrained(tmp_path)
    return tmp_path


def test_training_from_the_k_best_is_refused(compact):
    model = accelerate(peft.PeftModel.from_pretrained(bert(), compact))
    output(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=FOUND):
            run(model.train())
    output(model)
    model.eval().merge_adapter()
    model.unmerge_adapter()
    for fullgraph in (False, True):
        torch._dynamo.reset()
        with pytest.raises(RuntimeError):
            run(torch.compile(model.train(), backend="eager", fullgraph=fullgraph))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_training_from_the_k_best_is_refused_when_they_are_loaded_later(compact, low_cpu_mem_usage):
    model = accelerate(make_peft(bert, torch.float32))
    run(model.train())
    model.load_adapter(compact, "compact", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    run(model.train())
    model.set_adapter("compact")
    with pytest.raises(RuntimeError, match=FOUND):
        run(model)
    for again in (pickle.loads(pickle.dumps(model)), restore(copy.deepcopy(model))):
        with pytest.raises(RuntimeError, match=FOUND):
            run(again)

    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items() if "logits" in name}
    again = copy.deepcopy(model)
    again.load_state_dict(state, strict=False)
    run(again)
    for layer in layers_of(model):
        layer.reset_vblora_logits("compact", 0.1)
    run(model)
    with Operators() as operators:
        layers_of(model)[0](torch.randn(2, 32))
    assert operators.syncs == 0


@pytest.mark.parametrize("version", ["0.20.0", "0.22.0", "1.0.0.dev0", "0.210.1"])
def test_unknown_versions_are_refused(version, monkeypatch):
    model = make_peft(bert)
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(RuntimeError, match=rf"peft {version} .*0\.21\.\*"):
        accelerate(model)
    assert all(type(layer) is Linear for layer in layers_of(model))


def test_models_without_vblora_layers_are_refused():
    lora = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"]))
    for model in (bert(), lora):
        with pytest.raises(ValueError, match="no VB-LoRA layer"):
            accelerate(model)
        restore(model)


def test_layers_of_somebody_elses_are_refused():
    class Mine(Linear):
        pass

    model = make_peft(bert)
    layers_of(model)[3].__class__ = Mine
    with pytest.raises(TypeError, match=r"layer.*Mine"):
        accelerate(model)
    assert all(type(layer) is not AcceleratedLinear for layer in layers_of(model))


# --- what it does to the model


def test_restore_gives_pefts_own_code_back():
    theirs, ours = two_adapters()
    attributes = [set(vars(module)) for module in theirs.modules()]
    assert accelerate(ours) is ours
    assert [set(vars(module)) for module in restore(ours).modules()] == attributes
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]
    assert type(ours.base_model) is VBLoRAModel
    with ComposedRows() as composed:
        assert_same_step(theirs, ours)
    assert composed.calls == 0
    assert_same_step(theirs, accelerate(ours))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied):
    theirs, ours = two_adapters()
    again = copied(ours)
    assert_same_state(ours, again)
    assert all(type(layer) is AcceleratedLinear for layer in layers_of(again))
    for layer in layers_of(again):
        for adapter in layer.vblora_logits_A:
            assert layer.vblora_vector_bank[adapter] is again.base_model.vblora_vector_bank[adapter]
    assert_same_step(theirs, again)
    assert not any(parameter.grad is not None for parameter in ours.parameters())


def test_requires_grad_follows_the_active_adapter():
    theirs, ours = two_adapters()
    for active in ("other", "default"):
        for model in (theirs, ours):
            model.set_adapter(active)
        trained = {name for name, p in ours.named_parameters() if p.requires_grad}
        assert trained == {name for name, p in theirs.named_parameters() if p.requires_grad}
        assert all(name.endswith(active) for name in trained if "vblora_" in name)


@pytest.mark.slow
def test_plugin_that_runs_pefts_own_tests(tmp_path):
    (tmp_path / "test_one.py").write_text(
        "import peft\n"
        "import torch\n"
        "def test_accelerated():\n"
        "    config = peft.VBLoRAConfig(target_modules=['0'], vector_length=2, num_vectors=4)\n"
        "    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 6)), config)\n"
        "    assert type(model.base_model.model[0]).__name__ == 'AcceleratedLinear'\n"
        "    model(torch.ones(1, 4))\n"
        "def test_nothing(): pass\n"
    )
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])])}
    script = (
        "import sys, pytest\n"
        "for name in ('nothing', 'accelerated'):\n"
        "    options = ['-q', '-p', 'accelerate_peft', '-p', 'no:cacheprovider', '-k', name]\n"
        "    print('exit status', int(pytest.main([*options, sys.argv[1]])))\n"
    )
    command = [sys.executable, "-c", script, tmp_path]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    nothing, accelerated = done.stdout.split("exit status 1\n")
    assert "0 injections, 0 pairs of factors" in nothing, done.stdout
    assert "1 injections, 1 pairs of factors" in accelerated, done.stdout
    assert accelerated.endswith("exit status 0\n")
