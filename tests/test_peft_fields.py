"""PEFT's config fields and objects are taken: each has its effect, is said to have none, or is refused by name."""

import dataclasses
import json
import warnings

import peft
import pytest
import torch
from peft.tuners.lora.config import LoraRuntimeConfig

import vblora
from tests.small_models import Net

PAIRS = [(vblora.VBLoRAConfig, peft.VBLoRAConfig), (vblora.LoraConfig, peft.LoraConfig)]
PAIRS += [(vblora.VeraConfig, peft.VeraConfig)]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_every_field_of_pefts_config_is_taken(ours, theirs):
    config = theirs(r=6, target_modules=["up"], bias="none", modules_to_save=["head"], task_type="SEQ_CLS")
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taken = ours(**values)
    for name in values.keys() & {field.name for field in dataclasses.fields(ours)}:
        assert getattr(taken, name) == (["up"] if name == "target_modules" else values[name]), name


@pytest.mark.parametrize(("ours", "_theirs"), PAIRS)
def test_fields_without_effect_are_said_once(ours, _theirs):
    with pytest.warns(vblora.VBLoRAWarning, match="ignores `revision` and `base_model_name_or_path`") as caught:
        ours(revision="main", base_model_name_or_path="somewhere")
    assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.parametrize(
    "fields", [{"use_dora": True}, {"rank_pattern": {"up": 4}}, {"target_parameters": ["weight"]}, {"lora_bias": True}]
)
def test_fields_that_change_the_adapter_are_refused(fields):
    with pytest.raises(ValueError, match=f"`{next(iter(fields))}` is .* which vblora does not support"):
        vblora.LoraConfig(**fields)


def test_fields_of_lora_that_mean_nothing_alone_are_taken():
    vblora.LoraConfig(runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True))


def test_a_config_of_another_method_is_refused():
    with pytest.raises(ValueError, match="`peft_type` is 'LORA', but must be 'VBLORA'"):
        vblora.VBLoRAConfig(**peft.LoraConfig().to_dict())
    with pytest.raises(TypeError, match=r"peft.tuners.ia3.config.IA3Config; allowed are"):
        vblora.inject(Net(), peft.IA3Config(target_modules=["up"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="`task_type` is 'NONE'; allowed are None, 'SEQ_CLS'"):
        vblora.VBLoRAConfig(task_type="NONE")


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.VBLoRAConfig(r=2, num_vectors=16, vector_length=8, target_modules=["up", "down"]), vblora.VBLoRAConfig),
        (peft.LoraConfig(r=2, lora_alpha=4, target_modules={"up"}), vblora.LoraConfig),
        (peft.VeraConfig(r=2, target_modules="blocks.*up"), vblora.VeraConfig),
    ],
)
def test_a_config_object_of_pefts_is_injected(config, kind):
    net = vblora.inject(Net(blocks=2), config)
    attached = net._vblora_adapted_model.adapters["default"]
    assert type(attached.config) is kind and attached.config.r == 2
    assert {target.name for target in net.vblora.default.targets} >= {"blocks.0.up", "blocks.1.up"}


def test_save_only_topk_weights_makes_deploy_the_default(tmp_path):
    sizes = {"num_vectors": 16, "vector_length": 8, "target_modules": ["up"]}
    for folder, fields in (("all", {}), ("topk", {"save_only_topk_weights": True})):
        net = vblora.inject(Net(blocks=2), vblora.VBLoRAConfig(**sizes, **fields))
        vblora.save(net, tmp_path / folder)
        vblora.save(net, tmp_path / f"{folder}-resume", form="resume")
    forms = {path.parent.name: json.loads(path.read_text())["form"] for path in tmp_path.glob("*/adapter_config.json")}
    assert forms == {"all": "resume", "topk": "deploy", "all-resume": "resume", "topk-resume": "resume"}
    again = vblora.load(Net(blocks=2), tmp_path / "topk-resume", is_trainable=True)
    vblora.save(again, tmp_path / "again")  # the choice is in the file
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["form"] == "deploy"


def test_files_without_these_choices_are_as_before(tmp_path):
    torch.manual_seed(0)
    net = vblora.inject(Net(blocks=2), vblora.LoraConfig(target_modules=["up"], inference_mode=True))
    vblora.save(net, tmp_path)
    assert not {"task_type", "inference_mode"} & json.loads((tmp_path / "adapter_config.json").read_text()).keys()
