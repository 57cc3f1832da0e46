"""Files of VeRA, Tied-LoRA and LoRA: ours, and PEFT's of the first and the last, with peft itself on the other side."""

import copy
import json
import math
import warnings
from dataclasses import replace

import peft
import pytest
import safetensors.torch
import torch

import vblora
from tests.small_models import Net, bert, gpt2, llama, relative_error
from vblora.adapters.vera import pefts_projection
from vblora.checkpoint.folder import CONFIG_FILE, TENSORS_FILE

TARGETS = ["embed", "up", "down"]
CONFIGS = {
    "lora": vblora.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=TARGETS),
    "vera": vblora.VeraConfig(r=12, projection_prng_key=-3, target_modules=TARGETS),
    "vera, without its projection": vblora.VeraConfig(
        r=12, projection_prng_key=5, save_projection=False, target_modules=TARGETS
    ),
    "tied_lora": vblora.TiedLoraConfig(r=4, target_modules=TARGETS),
}
methods = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
on_each_device = pytest.mark.usefixtures("device")
IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1])
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Specified to not")


def shaken(model):
    """With what trains moved away from where it started."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def tensors_in(directory) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(directory / TENSORS_FILE)


def config_in(directory) -> dict:
    return json.loads((directory / CONFIG_FILE).read_text())


def rewrite(directory, change_tensors=None, **config):
    """Another folder's content with the same metadata."""
    path = directory / TENSORS_FILE
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = tensors_in(directory)
    if change_tensors:
        change_tensors(tensors)
    safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata)
    (directory / CONFIG_FILE).write_text(json.dumps(config_in(directory) | config))


# Ours


@on_each_device
@methods
@pytest.mark.parametrize("form", [None, "resume", "deploy"])
def test_round_trip_has_the_same_bits(config, form, tmp_path):
    torch.manual_seed(0)
    net = Net(blocks=2)
    config = replace(config, modules_to_save=["head"], bias="all")
    model = shaken(vblora.inject(copy.deepcopy(net), config))
    vblora.save(model, tmp_path, form=form)
    x = torch.randn(4, 16)
    loaded = vblora.load(copy.deepcopy(net), tmp_path)
    assert torch.equal(loaded(x), model(x))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    state = model.vblora.state_dict()
    assert state.keys() == loaded.vblora.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.vblora.state_dict().items())
    record = vblora.model.lookup.attached_adapter(loaded)
    assert replace(record.config, fan_in_fan_out=False) == config
    assert config_in(tmp_path)["method"] == config.method
    vblora.save(loaded, tmp_path / "again", form=form)
    assert (tmp_path / "again" / TENSORS_FILE).read_bytes() == (tmp_path / TENSORS_FILE).read_bytes()
    assert torch.equal(vblora.eject(loaded)(x), net(x))


@methods
@pytest.mark.parametrize("form", [None, "lora"])
def test_the_default_device_has_no_part_in_it(config, form, tmp_path):
    torch.manual_seed(0)
    net, x = Net(blocks=2), torch.randn(4, 16)
    model = shaken(vblora.inject(copy.deepcopy(net), config))
    with torch.device("meta"):
        vblora.save(model, tmp_path, form=form)
        loaded = vblora.load(copy.deepcopy(net), tmp_path)
    torch.testing.assert_close(loaded(x), model(x))


@on_each_device
@methods
def test_training_goes_on_from_it(config, tmp_path):
    torch.manual_seed(0)
    net, x = Net(blocks=1), torch.randn(6, 16)

    def steps(model, count):
        optimizer = torch.optim.SGD(vblora.parameter_groups(model), lr=0.1)
        for _ in range(count):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    straight = vblora.inject(copy.deepcopy(net), config)
    other = copy.deepcopy(straight)
    steps(straight, 4)
    steps(other, 2)
    vblora.save(other, tmp_path)
    resumed = vblora.load(copy.deepcopy(net), tmp_path, is_trainable=True)
    steps(resumed, 2)
    assert torch.equal(resumed(x), straight(x))


@on_each_device
@methods
def test_loading_over_an_adapter(config, tmp_path):
    net, x = Net(blocks=1), torch.randn(3, 16)
    model = shaken(vblora.inject(copy.deepcopy(net), config))
    vblora.save(model, tmp_path)
    other = shaken(vblora.inject(copy.deepcopy(net), config))
    assert not torch.equal(other(x), model(x))
    vblora.load(other, tmp_path)
    assert torch.equal(other(x), model(x))
    assert all(p.requires_grad for p in other.vblora.parameters())
    another = vblora.inject(copy.deepcopy(net), replace(config, r=config.r + 1))
    before = another(x)
    with pytest.raises(ValueError, match="another config"):
        vblora.load(another, tmp_path)
    with pytest.raises(ValueError, match="another config"):
        vblora.load(
            vblora.inject(copy.deepcopy(net), vblora.VBLoRAConfig(vector_length=8, target_modules=TARGETS)), tmp_path
        )
    assert torch.equal(another(x), before)
    vblora.load(another, tmp_path, adapter_name="second")
    vblora.set_adapter(another, "second")
    assert torch.equal(another(x), model(x))


@on_each_device
@methods
def test_layers_in_another_order(config, tmp_path):
    model = shaken(vblora.inject(Net(blocks=1), config))
    vblora.save(model, tmp_path)
    x = torch.randn(3, 16)

    class Reversed(Net):
        def __init__(self) -> None:
            super().__init__(blocks=1)
            embed, blocks, head = self.embed, self.blocks, self.head
            del self.embed, self.blocks, self.head
            self.head, self.blocks, self.embed = head, blocks, embed
            block = self.blocks[0]
            down, up = block.down, block.up
            del block.up, block.down
            block.down, block.up = down, up

    other = Reversed()
    other.load_state_dict(vblora.eject(copy.deepcopy(model)).state_dict())
    vblora.load(other, tmp_path)
    assert [t.name for t in other.vblora.default.targets] != [t.name for t in model.vblora.default.targets]
    assert torch.equal(other(x), model(x))


@on_each_device
def test_a_projection_is_left_out_only_if_its_key_draws_it(tmp_path):
    config = CONFIGS["vera, without its projection"]
    torch.manual_seed(0)
    net, x = Net(blocks=2), torch.randn(4, 16)
    model = shaken(vblora.inject(copy.deepcopy(net), config))
    vblora.save(model, tmp_path / "a")
    assert tensors_in(tmp_path / "a").keys() == {"d", "e"}
    torch.manual_seed(99)
    loaded = vblora.load(copy.deepcopy(net), tmp_path / "a")
    assert torch.equal(loaded.vblora.default.A, model.vblora.default.A)
    assert torch.equal(loaded.vblora.default.B, model.vblora.default.B)
    assert torch.equal(loaded(x), model(x))
    model.vblora.default.A[3, 2] += 1
    vblora.save(model, tmp_path / "b")
    assert tensors_in(tmp_path / "b").keys() == {"A", "B", "d", "e"}
    assert torch.equal(vblora.load(copy.deepcopy(net), tmp_path / "b")(x), model(x))
    vblora.save(shaken(vblora.inject(copy.deepcopy(net), replace(config, save_projection=True))), tmp_path / "c")
    assert tensors_in(tmp_path / "c").keys() == {"A", "B", "d", "e"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lora", lambda t: t.pop("factors"), "lacks tensor `factors`"),
        ("lora", lambda t: t.update(extra=torch.ones(1)), "unknown tensor `extra`"),
        ("lora", lambda t: t.update(factors=t["factors"][:-1]), "`factors` is"),
        ("lora", lambda t: t.update(factors=t["factors"].int()), "must be floating-point"),
        ("lora", lambda t: t["factors"].fill_(math.nan), "`factors` holds an infinite or NaN"),
        ("vera", lambda t: t.pop("A"), "lacks tensor `A`"),
        ("vera", lambda t: t.update(A=t["A"][:, 1:]), "`A` is"),
        ("vera, without its projection", lambda t: t.update(d=t["d"][1:]), "`d` is"),
        ("vera, without its projection", lambda t: t.pop("d"), "`d` is"),
        ("tied_lora", lambda t: t.update(v=t["v"][None]), "`v` is"),
        ("tied_lora", lambda t: t["u"].fill_(math.inf), "`u` holds"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(name, change, message, tmp_path):
    vblora.save(vblora.inject(Net(blocks=1), CONFIGS[name]), tmp_path)
    rewrite(tmp_path, change)
    net = Net(blocks=1)
    with pytest.raises(ValueError, match=message):
        vblora.load(net, tmp_path)
    assert not hasattr(net, "vblora")


@pytest.mark.filterwarnings("ignore:.*is not what")
@pytest.mark.parametrize("name", ["lora", "vera", "tied_lora"])
def test_sizes_that_cannot_be_are_refused(name, tmp_path):
    vblora.save(vblora.inject(Net(blocks=1), CONFIGS[name]), tmp_path)
    path = tmp_path / TENSORS_FILE
    with safetensors.safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["vblora"])
    for r in (2**31, 2**62, 2**70):
        description["config"]["r"] = r
        safetensors.torch.save_file(tensors_in(tmp_path), path, {"vblora": json.dumps(description)})
        with pytest.raises(ValueError, match=r"`r` is|, but must be"):
            vblora.load(Net(blocks=1), tmp_path)


def test_what_a_method_does_not_have_is_refused(tmp_path):
    model = vblora.inject(Net(blocks=1), CONFIGS["tied_lora"])
    for form in ("peft", "peft-topk"):
        with pytest.raises(ValueError, match=f'`form` is "{form}", which Tied-LoRA does not have'):
            vblora.save(model, tmp_path / "x", form=form)
    with pytest.raises(ValueError, match="has no bank"):
        vblora.save(model, tmp_path / "x", form="deploy", bank_dtype=torch.int8)
    assert not (tmp_path / "x").exists()
    vblora.save(model, tmp_path / "y")
    with pytest.raises(ValueError, match="has no bank"):
        vblora.load(Net(blocks=1), tmp_path / "y", bank=vblora.VectorBank(8, 8))


# Any method's update as PEFT's LoRA


@methods
def test_export_as_lora(config, tmp_path):
    torch.manual_seed(0)
    net, x = Net(blocks=2).double(), torch.randn(4, 16, dtype=torch.float64)
    model = shaken(vblora.inject(copy.deepcopy(net), config).double())
    vblora.save(model, tmp_path, form="lora")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path, autocast_adapter_dtype=False)
    assert relative_error(theirs(x), model(x)) < 1e-6
    assert relative_error(vblora.load(copy.deepcopy(net), tmp_path)(x), model(x)) < 1e-6


# PEFT's LoRA and VeRA

CASES = [
    (bert, {}),
    (bert, {"modules_to_save": ["classifier", "pooler"], "bias": "own", "target_modules": ["query", "intermediate.dense"]}),
    (bert, {"modules_to_save": ["classifier"], "bias": "all", "target_modules": ["query", "key", "value", "dense"]}),
    (llama, {"target_modules": "all-linear"}),
    (llama, {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    (gpt2, {"target_modules": ["c_attn", "mlp.c_proj"]}),
]  # fmt: skip
METHODS = {
    "lora": (vblora.LoraConfig, peft.LoraConfig, {"r": 3, "lora_alpha": 7}),
    "rslora": (vblora.LoraConfig, peft.LoraConfig, {"r": 3, "lora_alpha": 2, "use_rslora": True}),
    "vera": (vblora.VeraConfig, peft.VeraConfig, {"r": 24, "projection_prng_key": 11}),
    "vera, without its projection": (
        vblora.VeraConfig, peft.VeraConfig, {"r": 24, "projection_prng_key": 11, "save_projection": False},
    ),
}  # fmt: skip
both = pytest.mark.parametrize(("make", "choice"), CASES)
of_peft = pytest.mark.parametrize("method", METHODS)


def built(method, choice):
    """Our config and PEFT's."""
    ours, theirs, own = METHODS[method]
    choice = own | choice
    if choice.get("bias") == "own":
        choice["bias"] = f"{ours.method}_only"
    return ours(**choice), theirs(**choice)


def base_of(make):
    torch.manual_seed(0)
    return make().double().eval()


def inputs_of(make) -> dict:
    return {"input_ids": IDS, "labels": LABELS if make is bert else IDS}


def gradients(model) -> list[torch.Tensor]:
    found = [p.grad for p in model.parameters() if p.requires_grad]
    assert found and all(grad is not None for grad in found)
    return found


@of_peft
@both
def test_from_pefts_files_outputs_and_gradients(make, choice, method, tmp_path):
    base = base_of(make)
    theirs = shaken(peft.get_peft_model(copy.deepcopy(base), built(method, choice)[1]).double()).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = vblora.load(copy.deepcopy(base), tmp_path, is_trainable=True).eval()
    results = [model(**inputs_of(make)) for model in (ours, theirs, base)]
    assert relative_error(results[0].logits, results[1].logits) < 1e-12
    assert relative_error(results[2].logits, results[1].logits) > 1e-3
    for result in results[:2]:
        result.loss.backward()
    norms = [math.sqrt(sum(grad.square().sum() for grad in gradients(model))) for model in (ours, theirs)]
    assert math.isclose(*norms, rel_tol=1e-10)  # of what trains beside, too
    compare_gradients(ours, theirs)
    assert torch.equal(vblora.eject(ours)(**inputs_of(make)).logits, results[2].logits)


def compare_gradients(ours, theirs) -> None:
    """Parameter by parameter, where PEFT has its own."""
    adapter = ours.vblora.default
    modules = dict(theirs.base_model.model.named_modules())
    if hasattr(adapter, "factors"):
        parts = adapter.factors.grad.split(adapter._sizes)
        for target, A, B in zip(adapter.targets, parts[::2], parts[1::2], strict=True):
            module = modules[target.name]
            assert relative_error(A.view(adapter.r, -1), module.lora_A["default"].weight.grad) < 1e-10
            assert relative_error(B.view(adapter.r, -1).T, module.lora_B["default"].weight.grad) < 1e-10
        return
    widths = [target.out_features for target in adapter.targets]
    for target, d, e in zip(adapter.targets, adapter.d.grad, adapter.e.grad.split(widths), strict=True):
        module = modules[target.name]
        assert relative_error(d, module.vera_lambda_d["default"].grad) < 1e-10
        assert relative_error(e, module.vera_lambda_b["default"].grad) < 1e-10


@of_peft
@both
def test_peft_computes_the_same_from_our_files(make, choice, method, tmp_path):
    base = base_of(make)
    ours = shaken(vblora.inject(copy.deepcopy(base), built(method, choice)[0]).double())
    vblora.save(ours, tmp_path, form="peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False)
    theirs.double().eval()
    logits = [model(input_ids=IDS).logits for model in (theirs, ours, base)]
    assert relative_error(logits[0], logits[1]) < 1e-6  # it loads into float32
    assert relative_error(logits[2], logits[1]) > 1e-3
    known = set(built(method, choice)[1].to_dict())
    assert set(config_in(tmp_path)) <= known
    again = vblora.load(copy.deepcopy(base), tmp_path)
    assert relative_error(again(input_ids=IDS).logits, logits[1]) < 1e-12
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    one, other = tensors_in(tmp_path), tensors_in(tmp_path / "theirs")
    for name in list(other):  # with bias="all" PEFT writes a saved module's biases again
        if ".original_module." in name or (".modules_to_save." in name and name not in one):
            del other[name]
    assert {name: tensor.shape for name, tensor in one.items()} == {
        name: tensor.shape for name, tensor in other.items()
    }


def test_pefts_projection_is_replayed(tmp_path):
    """Without it in the file, as PEFT itself does; and kept in our files, where the key would draw another."""
    base = base_of(llama)
    config = peft.VeraConfig(r=16, projection_prng_key=5, save_projection=False, target_modules="all-linear")
    theirs = shaken(peft.get_peft_model(copy.deepcopy(base), config).double())
    theirs.save_pretrained(tmp_path / "a")
    ours = vblora.load(copy.deepcopy(base), tmp_path / "a")
    A, B = theirs.base_model.vera_A["default"], theirs.base_model.vera_B["default"]
    assert torch.equal(ours.vblora.default.A.double(), A.double())
    assert torch.equal(ours.vblora.default.B.double(), B.T.double())
    vblora.save(ours, tmp_path / "b")
    assert tensors_in(tmp_path / "b").keys() == {"A", "B", "d", "e"}
    vblora.save(ours, tmp_path / "c", form="peft")  # which draws it again
    assert not any("vera_A" in name for name in tensors_in(tmp_path / "c"))
    assert config_in(tmp_path / "c")["save_projection"] is False
    for name in "bc":
        again = vblora.load(copy.deepcopy(base), tmp_path / name)
        assert torch.equal(again(input_ids=IDS).logits, ours(input_ids=IDS).logits)
    A, B = pefts_projection(ours.vblora.default.targets, 16, 5)
    assert torch.equal(A, ours.vblora.default.A) and torch.equal(B, ours.vblora.default.B)


def test_a_wider_projection_of_pefts_is_sliced(tmp_path):
    """PEFT has a second adapter use the first one's projection, which may be larger than it needs."""
    base = base_of(llama)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(r=8, target_modules=["down_proj", "q_proj"]))
    theirs.add_adapter("second", peft.VeraConfig(r=8, target_modules=["q_proj"]))
    theirs.set_adapter("second")
    theirs = shaken(theirs.double()).eval()
    theirs.save_pretrained(tmp_path, selected_adapters=["second"])
    assert tensors_in(tmp_path / "second")["base_model.vera_A"].shape == (8, 64)
    ours = vblora.load(copy.deepcopy(base), tmp_path / "second")
    assert ours.vblora.default.A.shape == (8, 32)
    assert relative_error(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits) < 1e-12


def test_a_narrower_projection_is_refused(tmp_path):
    base = base_of(llama)
    peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(r=8, target_modules=["down_proj"])).save_pretrained(
        tmp_path
    )
    rewrite(tmp_path, lambda t: t.update({"base_model.vera_A": t["base_model.vera_A"][:, :50]}))
    with pytest.raises(ValueError, match=r"`base_model\.vera_A` is for inputs of up to 50, the model's are 64"):
        vblora.load(base, tmp_path)
    assert not hasattr(base, "vblora")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("lora_bias", True),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["mlp.weight"]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1]),
        ("megatron_config", {"a": 1}),
        ("of_the_future", 1),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "loftq"),
    ],
)
def test_fields_that_change_what_a_lora_means_are_refused_by_name(field, value, tmp_path):
    base = base_of(llama)
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2)).save_pretrained(tmp_path)
    rewrite(tmp_path, **{field: value})
    with pytest.raises(ValueError, match=f"`{field}`"):
        vblora.load(base, tmp_path)
    assert not hasattr(base, "vblora")


def test_every_field_of_pefts_is_known_or_refused():
    """Those that we do not have are at rest by default, or named here: a new one of another kind has to be looked at."""
    from vblora.checkpoint.peft import lora

    ours = set(vblora.LoraConfig().to_dict()) | vblora.config.PEFT_METADATA
    for name, value in peft.LoraConfig().to_dict().items():
        assert name in ours or not value or name in lora._NEUTRAL, name


@pytest.mark.parametrize("init", ["eva", "orthogonal", "gaussian", False])
def test_beginnings_that_leave_the_base_model_alone_are_read(init, tmp_path):
    base = base_of(llama)
    theirs = shaken(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2)).double())
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, init_lora_weights=init)
    ours = vblora.load(copy.deepcopy(base), tmp_path)
    assert relative_error(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits) < 1e-12


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("lora", lambda t, n: t.pop(f"{n}.lora_A.weight"), r"lacks tensor `.*lora_A\.weight`"),
        ("lora", lambda t, n: t.update({f"{n}.lora_B.weight": torch.ones(3)}), r"`.*lora_B\.weight` is \(3,\)"),
        ("lora", lambda t, n: t.update({f"{n}.lora_B.weight": torch.ones(32, 5)}), "rank 5, but `r` is 4"),
        ("lora", lambda t, n: t.update({f"{n}.lora_A.weight": torch.ones(4, 32).int()}), "int32; allowed"),
        ("lora", lambda t, n: t.update({f"{n}.lora_magnitude_vector": torch.ones(32)}), "unknown tensor"),
        ("lora", lambda t, n: t[f"{n}.lora_B.weight"].fill_(math.nan), "NaN"),
        ("lora", lambda t, n: [t.pop(name) for name in list(t)], "names no layer"),
        ("vera", lambda t, n: t.pop(f"{n}.vera_lambda_d"), "lacks tensor `.*vera_lambda_d`"),
        ("vera", lambda t, n: t.pop("base_model.vera_A"), r"lacks tensor `base_model\.vera_A`"),
        ("vera", lambda t, n: [t.pop(f"base_model.vera_{s}") for s in "AB"], r"lacks tensor `base_model\.vera_A`"),
        ("vera", lambda t, n: t.update({f"{n}.vera_lambda_d": torch.ones(3)}), "`.*vera_lambda_d` is"),
        ("vera", lambda t, n: t.update({f"{n}.vera_lambda_b": torch.ones(3, 2)}), "`.*vera_lambda_b` is"),
        ("vera", lambda t, n: t.update({f"{n}.vera_lambda_b": torch.ones(31)}), "32 -> 31 there, 32 -> 32 here"),
        ("vera", lambda t, n: t[f"{n}.vera_lambda_b"].fill_(math.inf), "infinite"),
        ("vera", lambda t, n: t["base_model.vera_B"].fill_(math.inf), "infinite"),
        ("vera", lambda t, n: t.update({"base_model.vera_B": torch.ones(31, 4)}), r"`base_model\.vera_B` is"),
        ("vera", lambda t, n: t.update({"base_model.vera_A": torch.ones(())}), r"`base_model\.vera_A` is \(\)"),
        ("vera", lambda t, n: t.update({"base_model.vera_B": torch.ones(())}), r"`base_model\.vera_B` is \(\)"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_pefts_is_refused(kind, change, message, tmp_path):
    base = base_of(llama)
    config = {"lora": peft.LoraConfig, "vera": peft.VeraConfig}[kind](r=4, target_modules=["q_proj"])
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: change(t, "base_model.model.model.layers.0.self_attn.q_proj"))
    with pytest.raises(ValueError, match=message):
        vblora.load(base, tmp_path)
    assert not hasattr(base, "vblora")


class Mixed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(11, 6)
        self.filter = torch.nn.Conv2d(1, 4, (3, 2), stride=2)

    def forward(self, ids):
        return self.filter(self.table(ids)[:, None])


def test_loras_of_embeddings_and_convolutions(tmp_path):
    torch.manual_seed(0)
    net, ids = Mixed().double(), torch.randint(0, 11, (2, 9))
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["table", "filter"], init_lora_weights=False)
    theirs = shaken(peft.get_peft_model(copy.deepcopy(net), config).double())
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    ours = vblora.load(copy.deepcopy(net), tmp_path / "a")
    assert relative_error(ours(ids), theirs(ids)) < 1e-12
    vblora.save(ours, tmp_path / "b", form="peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "b", autocast_adapter_dtype=False)
    assert relative_error(again(ids), theirs(ids)) < 1e-6
    assert relative_error(net(ids), theirs(ids)) > 1e-2
    other = Mixed().double()
    other.filter = torch.nn.Conv2d(1, 4, (2, 3), stride=2).double()
    with pytest.raises(ValueError, match="of another kernel"):
        vblora.load(other, tmp_path / "a")


def test_vera_of_embeddings_and_convolutions_is_not_pefts(tmp_path):
    model = vblora.inject(Mixed(), vblora.VeraConfig(r=4, target_modules=["table", "filter"]))
    with pytest.raises(ValueError, match='`form` is "peft", but `table` is not a linear layer'):
        vblora.save(model, tmp_path / "a", form="peft")
    shaken(model)
    vblora.save(model, tmp_path / "b")
    ids = torch.randint(0, 11, (2, 9))
    torch.manual_seed(0)
    net = vblora.eject(copy.deepcopy(model))
    assert torch.equal(vblora.load(net, tmp_path / "b")(ids), model(ids))


def test_same_defaults_as_peft():
    for ours, theirs in ((vblora.LoraConfig(), peft.LoraConfig()), (vblora.VeraConfig(), peft.VeraConfig())):
        for name, value in ours.to_dict().items():
            if name != "exclude_modules" or hasattr(theirs, name):  # PEFT's VeRA cannot
                assert getattr(theirs, name) == value, name
    for make in (bert, llama, gpt2):
        for ours, theirs in ((vblora.LoraConfig, peft.LoraConfig), (vblora.VeraConfig, peft.VeraConfig)):
            one = vblora.inject(make(), ours(r=4))
            other = peft.get_peft_model(make(), theirs(r=4, fan_in_fan_out=make is gpt2))
            assert {t.name for t in one.vblora.default.targets} == set(other.base_model.targeted_module_names)


def test_default_layers_are_pefts():
    from peft.utils import constants

    from vblora.config.default_targets import FOR_OTHERS

    for pefts in (
        constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
        constants.TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING,
    ):
        for model_type in FOR_OTHERS.keys() & pefts.keys():
            assert FOR_OTHERS[model_type] == pefts[model_type], model_type


@pytest.mark.parametrize("form", ["resume", "lora"])
@pytest.mark.parametrize(
    "config",
    [
        vblora.VBLoRAConfig(num_vectors=16, vector_length=8, target_modules=["up"], init_vector_bank_bound=1.0),
        vblora.LoraConfig(r=4, use_rslora=True, init_lora_weights=False, target_modules=["up"]),
        vblora.TiedLoraConfig(r=4, target_modules=["up"]),
    ],
    ids=lambda config: config.method,
)
def test_what_you_set_in_an_adapter_is_saved(config, form, tmp_path):
    base = Net(blocks=1)
    model = vblora.inject(copy.deepcopy(base), config)
    adapter = model.vblora.default
    if config.method == "tied_lora":
        torch.nn.init.normal_(adapter.B)
    if config.method == "vblora":
        adapter.topk = 4
    adapter.scaling *= 3
    vblora.save(model, tmp_path, form=form)
    x = torch.randn(3, 16)
    again = vblora.load(base, tmp_path)
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)
    if form == "resume" and config.method != "vblora":
        assert again.vblora.default.scaling == pytest.approx(adapter.scaling)
