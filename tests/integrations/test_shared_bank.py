"""One bank trained on several tasks by `SharedBankTrainer`, against loops written by hand."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

import vblora
from tests.small_models import bert, llama
from vblora import files
from vblora.integrations.shared_bank import OneTaskBatches, SharedBankTrainer, bank_of, save_shared

CONFIG = {"r": 2, "num_vectors": 24, "vector_length": 16, "target_modules": "all-linear", "num_candidates": 16}


def make_models(seed: int = 0, **fields) -> dict[str, nn.Module]:
    """A classifier of three classes and a regression that share a bank."""
    torch.manual_seed(seed)
    bank = vblora.VectorBank(24, 16)
    models = {"classes": bert(num_labels=3), "score": bert(num_labels=1)}
    for number, model in enumerate(models.values()):
        vblora.inject(
            model, vblora.VBLoRAConfig(seed=number, modules_to_save=["classifier"], **CONFIG | fields), bank=bank
        )
    return models


def make_rows(count: int, labels: list[float] | list[int], seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": torch.tensor(labels[int(row[0]) % len(labels)])} for row in ids]


DATA = {"classes": make_rows(11, [0, 1, 2], 0), "score": make_rows(6, [-0.5, 1.5], 1)}


def stack(rows: list[dict]) -> dict:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def make_trainer(
    models: dict[str, nn.Module], folder: Path, data: dict | None = None, **arguments
) -> SharedBankTrainer:
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none"}
    settings |= {"use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant", "logging_strategy": "no"}
    return SharedBankTrainer(
        models,
        TrainingArguments(str(folder), **settings | arguments),
        train_dataset=data or DATA,
        data_collator=stack,
        eval_dataset=data or DATA,
    )


def parameters_of(models: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": p for name, model in models.items() for key, p in model.named_parameters() if p.requires_grad
    }


def assert_same_parameters(models: dict[str, nn.Module], others: dict[str, nn.Module]) -> None:
    one, two = parameters_of(models), parameters_of(others)
    assert one.keys() == two.keys() and len(one) > 4
    for name, parameter in one.items():
        assert torch.equal(parameter, two[name]), name


def test_each_batch_is_of_one_task_and_an_epoch_has_every_row_once():
    batches = OneTaskBatches([11, 6], 4, seed=3)
    epochs = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        epochs.append(list(batches))
        assert len(epochs[-1]) == len(batches) == 5
        assert sorted(row for batch in epochs[-1] for row in batch) == list(range(17))
        assert all(max(batch) < 11 or min(batch) >= 11 for batch in epochs[-1])
        assert sorted(map(len, epochs[-1])) == [2, 3, 4, 4, 4]
    assert epochs[0] != epochs[1]


def test_trains_as_a_loop_by_hand_does(tmp_path):
    models, by_hand = make_models(), make_models()
    make_trainer(models, tmp_path).train()

    groups = vblora.parameter_groups(nn.ModuleList(by_hand.values()))
    assert [len(group["params"]) for group in groups] == [1, 2, 4]  # one bank, logits of two adapters, two heads
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rows = [(name, row) for name in by_hand for row in DATA[name]]
    batches = OneTaskBatches([11, 6], 4, seed=42)
    for model in by_hand.values():
        model.train()
    for epoch in range(2):
        batches.set_epoch(epoch)
        for batch in batches:
            name = rows[batch[0]][0]
            by_hand[name](**stack([rows[index][1] for index in batch])).loss.backward()
            nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_parameters(models, by_hand)
    assert not torch.equal(
        models["score"].vblora.default.bank.vectors, make_models()["score"].vblora.default.bank.vectors
    )


def test_saves_one_bank_and_an_adapter_for_each_task(tmp_path):
    models = make_models()
    trainer = make_trainer(models, tmp_path / "run")
    trainer.train()
    trainer.save_model(tmp_path / "shared")
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == ["bank.safetensors", "classes", "score"]
    save_shared(models, tmp_path / "deployed", form="deploy")
    ids = DATA["score"][0]["input_ids"][None]
    for folder in (tmp_path / "shared", tmp_path / "deployed"):
        bank = vblora.VectorBank.from_file(folder / "bank.safetensors")
        for name, model in models.items():
            with pytest.raises(ValueError, match="its vector bank is in a file of its own"):
                vblora.load(bert(num_labels=model.num_labels), folder / name)
            loaded = vblora.load(vblora.eject(copy.deepcopy(model)), folder / name, bank=bank)
            assert loaded.vblora.default.bank is bank
            assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


def test_a_save_that_fails_leaves_the_old_bank_and_its_adapters(tmp_path, monkeypatch):
    models = make_models()
    save_shared(models, tmp_path)
    bank = bank_of(models)
    before, file = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}, bank.file
    with torch.no_grad():
        bank.vectors.add_(1)

    def fail(path):
        if path.parent.name == "score":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_shared(models, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before and bank.file is file


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, interrupted, resumed = make_models(), make_models(), make_models(seed=0)
    make_trainer(whole, tmp_path / "whole").train()
    make_trainer(interrupted, tmp_path / "run", save_strategy="steps", save_steps=3, max_steps=7).train()
    make_trainer(resumed, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert_same_parameters(resumed, whole)


def test_evaluates_each_task_and_loads_the_best(tmp_path):
    models = make_models()
    trainer = make_trainer(
        models, tmp_path, eval_strategy="epoch", save_strategy="epoch", num_train_epochs=3, learning_rate=1.0,
        load_best_model_at_end=True, metric_for_best_model="eval_score_loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    found = [entry["eval_score_loss"] for entry in trainer.state.log_history if "eval_score_loss" in entry]
    assert len(found) == 3 and len(set(found)) == 3
    assert trainer.evaluate()["eval_score_loss"] == max(found)
    with torch.no_grad():
        batch = stack(DATA["score"])
        assert models["score"].eval()(**batch).loss.item() == pytest.approx(max(found))


def test_warns_of_each_task_whose_rows_used_up_their_candidates(tmp_path):
    with pytest.warns(vblora.VBLoRAWarning, match="sub-vectors have used up their 3 candidates") as caught:
        make_trainer(make_models(num_candidates=3), tmp_path).train()
    assert len(caught) == 2


def test_language_models_share_a_bank_with_classifiers(tmp_path):
    torch.manual_seed(0)
    bank = vblora.VectorBank(24, 16)
    models = {"text": llama(), "classes": bert(num_labels=3)}
    for model in models.values():
        vblora.inject(model, vblora.VBLoRAConfig(seed=0, **CONFIG), bank=bank)
    before = bank.vectors.detach().clone()
    text = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in DATA["classes"]]
    make_trainer(models, tmp_path, {"text": text, "classes": DATA["classes"]}, gradient_accumulation_steps=2).train()
    assert not torch.equal(bank.vectors, before)


def refused(tmp_path, match, models=None, error=ValueError, **arguments):
    given = {"train_dataset": DATA, "data_collator": stack} | arguments
    with pytest.raises(error, match=match):
        SharedBankTrainer(models or make_models(), TrainingArguments(str(tmp_path), report_to="none"), **given)


def test_what_is_no_shared_bank_is_refused_by_name(tmp_path):
    one, other = make_models(), make_models(seed=1)
    refused(tmp_path, "has 1, but a shared bank takes at least two", {"score": one["score"]})
    refused(tmp_path, r"`models\['classes'\]` and `models\['score'\]` have different banks",
            {"classes": one["classes"], "score": other["score"]})  # fmt: skip
    refused(tmp_path, "the name 'a/b', which cannot name a folder", {"a/b": one["score"], "classes": one["classes"]})
    refused(tmp_path, "`train_dataset` is for 'score', but `models` has 'classes', 'score'",
            train_dataset={"score": DATA["score"]})  # fmt: skip
    refused(tmp_path, "`eval_dataset` is for 'x'", eval_dataset={"x": []})
    refused(tmp_path, "the data set 'score' has no length", train_dataset=DATA | {"score": iter([])})
    lora = vblora.inject(bert(), vblora.LoraConfig(r=2, target_modules="all-linear"))
    refused(tmp_path, "is not a VB-LoRA adapter", {"classes": lora, "score": one["score"]})
    one["score"].vblora.default.bank.requires_grad_(False)
    refused(tmp_path, "the bank of `models` is frozen", one)
    with pytest.raises(ValueError, match="which includes the bank"):
        save_shared(other, tmp_path / "x", form="peft")
    assert not (tmp_path / "x").exists()
