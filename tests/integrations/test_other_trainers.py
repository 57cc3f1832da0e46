"""Trainers that subclass transformers': TRL's and sentence-transformers', with their defaults and our one line."""

import copy
import math
import warnings

import pytest
import torch

import vblora
from tests.small_models import bert
from vblora.finetune import demo
from vblora.integrations.reference_model import warn_of_reference
from vblora.integrations.transformers import trainer_arguments

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

CONFIG = vblora.VBLoRAConfig(r=4, num_vectors=64, vector_length=32, target_modules="all-linear")
SETTINGS = {"max_steps": 8, "save_steps": 4, "logging_steps": 1, "report_to": "none", "use_cpu": True}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def too_low(caught):
    return [warning for warning in caught if "far below" in str(warning.message)]


def test_trls_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(demo.find_model())
    tokenizer.eos_token, tokenizer.pad_token = "[SEP]", "[PAD]"
    data = Dataset.from_dict({"text": ["the film is good and warm", "a very bad film"] * 16})
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, num_key_value_heads=2, **sizes)
    )

    def trainer_of(in_one_line=True, **choice):
        model = vblora.inject(copy.deepcopy(base), CONFIG)
        arguments = trl.SFTConfig(str(tmp_path), **SETTINGS | choice)  # gradient checkpointing and bf16 by default
        how = trainer_arguments(model) if in_one_line else {}
        return trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, **how)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        whole = trainer_of()
        whole.train()
        assert not too_low(caught)
        again = trainer_of()
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(again) == losses(whole) and len(losses(whole)) == 8
    loaded = vblora.load(copy.deepcopy(base), tmp_path / "checkpoint-8")
    assert torch.equal(loaded.vblora.default.logits, whole.model.vblora.default.logits)
    bare = trainer_of(in_one_line=False, save_strategy="no")  # saving raises
    with pytest.warns(UserWarning, match="far below"):
        bare.train()


@pytest.fixture
def preferences(tmp_path):
    """Makes the model that TRL reads its reference model from, and trains with DPO for a step: reward, loss, and the warnings
    about the reference."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(demo.find_model())
    tokenizer.eos_token, tokenizer.pad_token = "[SEP]", "[PAD]"
    texts = {"prompt": "the film", "chosen": " is good and warm", "rejected": " is very bad"}
    data = Dataset.from_dict({name: [text] * 4 for name, text in texts.items()})
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)).save_pretrained(
        tmp_path / "base"
    )
    tokenizer.save_pretrained(tmp_path / "base")

    def base():
        return LlamaForCausalLM.from_pretrained(tmp_path / "base")

    def train(model, ref_model=None, **choice):
        settings = SETTINGS | {"max_steps": 1, "save_strategy": "no", "bf16": False} | choice
        arguments = trl.DPOConfig(str(tmp_path / "out"), **settings)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = trl.DPOTrainer(
                model,
                ref_model,
                args=arguments,
                train_dataset=data,
                processing_class=tokenizer,
                **trainer_arguments(model),
            )
            trainer.train()
        first = next(entry for entry in trainer.state.log_history if "rewards/chosen" in entry)
        about = [str(warning.message) for warning in caught if "reference model" in str(warning.message)]
        return first["rewards/chosen"], first["loss"], about

    return base, train


def test_trls_reference_is_the_bare_base_model_which_is_warned_of(preferences, tmp_path):
    base, train = preferences
    config = vblora.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    vblora.save(vblora.inject(base(), config), tmp_path / "sft")

    def loaded():
        return vblora.load(base(), tmp_path / "sft", is_trainable=True)

    model = loaded()  # a living copy, which is no reference
    reward, loss, warned = train(loaded())
    assert abs(reward) > 1e-3 and abs(loss - math.log(2)) > 1e-4
    assert len(warned) == 1 and "without adapter 'default', which is already trained" in warned[0]
    assert (
        "pass `ref_model=copy.deepcopy(model)`, or set `precompute_ref_log_probs=True` in the arguments, or merge"
        in warned[0]
    )

    merged = vblora.eject(vblora.merge(loaded(), release=True))
    merged.save_pretrained(tmp_path / "base")
    fresh = vblora.inject(base(), vblora.LoraConfig(r=2, target_modules="all-linear"))  # starts from the merged model
    right = train(model, copy.deepcopy(model)), train(model, precompute_ref_log_probs=True), train(fresh)
    for reward, loss, warned in right:
        assert abs(reward) < 1e-5 and abs(loss - math.log(2)) < 1e-5
        assert not warned
    assert len(train(fresh)[-1]) == 1  # it has learned by now


def test_grpos_reference_cannot_be_passed(tmp_path):
    trl = pytest.importorskip("trl")
    vblora.save(vblora.inject(bert(), CONFIG), tmp_path / "sft")
    model = vblora.load(bert(), tmp_path / "sft", is_trainable=True)
    with pytest.warns(
        vblora.VBLoRAWarning,
        match="For a reference with it, merge the adapter into the base model and inject a new one",
    ):
        warn_of_reference(model, bert(), trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_sentence_transformers_trainer(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    def encoder():
        return sentence_transformers.SentenceTransformer(str(demo.find_model()), device="cpu", local_files_only=True)

    model = encoder()
    transformer = model[0].auto_model
    vblora.inject(transformer, vblora.VBLoRAConfig(**{**CONFIG.to_dict(), "target_modules": ["query", "value"]}))
    data = Dataset.from_dict({"anchor": ["a good film", "a bad film"] * 16, "positive": ["it is warm", "dull"] * 16})

    def trainer_of(**choice):
        arguments = sentence_transformers.SentenceTransformerTrainingArguments(str(tmp_path), **SETTINGS | choice)
        loss = MultipleNegativesRankingLoss(model)
        return sentence_transformers.SentenceTransformerTrainer(
            model, arguments, train_dataset=data, loss=loss, **trainer_arguments(model)
        )

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_of().train()
    assert not too_low(caught)
    saved = tmp_path / "checkpoint-8"
    assert not (saved / "model.safetensors").exists()
    texts = ["a film", "a long and warm story"]
    wanted = model.encode(texts)
    assert abs(wanted - encoder().encode(texts)).max() > 1e-3
    loaded = encoder()
    vblora.load(loaded[0].auto_model, saved)
    assert (loaded.encode(texts) == wanted).all()
    with pytest.raises(ValueError, match="`load_best_model_at_end` is True, but of a SentenceTransformer"):
        trainer_of(load_best_model_at_end=True, eval_strategy="no", save_strategy="best").train()

    vblora.merge(transformer, release=True)
    vblora.eject(transformer)
    model.save_pretrained(str(tmp_path / "merged"))
    merged = sentence_transformers.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert abs(merged.encode(texts) - wanted).max() < 1e-5


def test_a_cross_encoder_which_sorts_its_pairs_takes_no_names_of_adapters(tiny_model):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = sentence_transformers.CrossEncoder(str(tiny_model), num_labels=1, device="cpu", local_files_only=True)
    vblora.inject(encoder[0].auto_model, vblora.LoraConfig(task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match=r"given to `CrossEncoder.predict`, which sorts the pairs"):
        encoder.predict([("good", "bad"), ("a", "film")], adapter_names=["default", None])
