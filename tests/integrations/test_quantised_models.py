"""Models that transformers quantises as it loads them, with our adapters, under its Trainer."""

import copy
import dataclasses
import importlib

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig, Trainer, TrainingArguments
from transformers.trainer_utils import validate_quantization_for_training

import vblora
from tests.checkpointing import checkpointing
from tests.small_models import llama, relative_error
from vblora.integrations.transformers import VBLoRACallback

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*is an Enum subclass")]
CONFIG = vblora.VBLoRAConfig(
    target_modules="all-linear", r=4, num_vectors=32, vector_length=16, vblora_dropout=0.1, seed=3
)
IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))


def torchao_config():
    return TorchAoConfig(importlib.import_module("torchao.quantization").Int8WeightOnlyConfig())


CONFIGS = {
    "8 bits": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "4 bits": (
        "bitsandbytes",
        lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "torchao": ("torchao.quantization", torchao_config),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


@pytest.fixture(params=CONFIGS)
def load(request, folder):
    needs, config = CONFIGS[request.param]
    try:
        importlib.import_module(needs)
    except Exception as error:  # whatever keeps it from running here is the reason
        pytest.skip(f"{needs} does not import here: {type(error).__name__}: {error}")
    return lambda: AutoModelForCausalLM.from_pretrained(folder, quantization_config=config())


def injected(load, **choice):
    torch.manual_seed(1)
    return vblora.inject(load(), dataclasses.replace(CONFIG, **choice))


def rows(count=8):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 50, (9,), generator=generator) for _ in range(count)]
    return [{"input_ids": one, "labels": one} for one in ids]


def trainer_of(model, folder, **choice):
    optimizer = torch.optim.AdamW(vblora.parameter_groups(model, lr_bank=0.05, lr_logits=0.05))
    settings = {"max_steps": 8, "save_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 4} | choice
    arguments = TrainingArguments(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, **settings
    )
    return Trainer(
        model,
        arguments,
        train_dataset=rows(),
        eval_dataset=rows(2),
        optimizers=(optimizer, None),
        callbacks=[VBLoRACallback(model)],
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trains_and_resumes(load, tmp_path):
    """With evaluations in between, which shall change nothing."""
    often = {"eval_strategy": "steps", "eval_steps": 3}
    whole = trainer_of(injected(load), tmp_path / "whole", **often)
    whole.train()
    assert sum(losses(whole)[-3:]) < 0.98 * sum(losses(whole)[:3])
    again = trainer_of(injected(load), tmp_path / "again", **often)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(again) == losses(whole)
    for ours, theirs in zip(again.model.vblora.parameters(), whole.model.vblora.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    checkpoint = tmp_path / "whole" / "checkpoint-8"
    assert (checkpoint / "model.safetensors").stat().st_size < 40_000  # no base weights
    fresh = vblora.load(load(), checkpoint)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(IDS).logits, whole.model.eval()(IDS).logits)


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        checkpointing(use_reentrant=False),
        checkpointing(use_reentrant=True),
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_the_usual_options(load, options, tmp_path):
    trainer = trainer_of(injected(load), tmp_path, save_strategy="no", lr_scheduler_type="constant", **options)
    trainer.train()
    assert sum(losses(trainer)[-3:]) < 0.98 * sum(losses(trainer)[:3])


def test_the_trainer_asks_for_adapters_again_once_they_are_ejected(load, tmp_path):
    model = injected(load)
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(model)
    VBLoRACallback(model)
    validate_quantization_for_training(model)
    validate_quantization_for_training(copied := copy.deepcopy(model))
    vblora.eject(model)
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(model)
    validate_quantization_for_training(copied)  # which still has its own
    with pytest.raises(ValueError, match="no adapter"):
        VBLoRACallback(model)
    vblora.inject(model, CONFIG)
    validate_quantization_for_training(model)


def test_generates_merged_and_not(load):
    model = injected(load, init_vector_bank_bound=0.5).eval()
    with torch.no_grad():
        before = model(IDS).logits
        with vblora.disabled(model):
            base = model(IDS).logits
        tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
        with pytest.warns(UserWarning, match="14 merged weights were quantised again"):
            vblora.merge(model)
        assert relative_error(model(IDS).logits, before) < 0.5 * relative_error(base, before)
        vblora.unmerge(model)
        assert torch.equal(model(IDS).logits, before)
        assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), tokens)


def test_a_merged_model_is_saved_as_transformers_saves_it(load, tmp_path):
    model = injected(load).eval()
    VBLoRACallback(model)
    with pytest.warns(UserWarning, match="quantised again"):
        vblora.merge(model, release=True)
    vblora.eject(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert relative_error(again(IDS).logits, model(IDS).logits) < 1e-3
