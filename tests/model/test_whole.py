"""Whole models: a merged one is written as a plain one, an injected one is refused; state dicts of the adapter alone."""

import copy
import io

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from transformers import BertConfig, BertModel, LlamaForCausalLM, PreTrainedModel

import vblora
from tests.small_models import bert, gpt2, llama, relative_error
from vblora.serving import AdapterStore

IDS = torch.arange(12).view(2, 6)
SIZES = {"num_vectors": 16, "vector_length": 8, "init_vector_bank_bound": 0.5}


def injected(model=bert, **fields) -> nn.Module:
    torch.manual_seed(0)
    return vblora.inject(model().eval(), vblora.VBLoRAConfig(**SIZES | fields))


def test_an_injected_model_is_not_written(tmp_path):
    model = injected()
    for call in (model.save_pretrained, model.bert.save_pretrained):
        with pytest.raises(
            ValueError, match=r"vblora.save\(model, directory\).*vblora.merge\(model\), then model.save_pret"
        ):
            call(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("make", [bert, gpt2, llama])
def test_a_merged_model_is_written_as_a_plain_one(make, release, tmp_path):
    plain_names = set(make().state_dict())
    model = injected(make, target_modules="all-linear", modules_to_save=["classifier"] if make is bert else None)
    adapted = model(IDS).logits
    vblora.merge(model, release=release)
    names, expected = list(model.state_dict()), model(IDS).logits
    assert relative_error(expected, adapted) < 1e-5
    model.save_pretrained(tmp_path)
    assert list(model.state_dict()) == names and torch.equal(model(IDS).logits, expected)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and set(again.state_dict()) == plain_names
    torch.testing.assert_close(again.eval()(IDS).logits, expected)


@pytest.mark.parametrize("form", ["resume", "peft"])
def test_a_merged_model_is_not_written_beside_an_adapter(form, tmp_path):
    model = injected(llama)
    vblora.save(model, tmp_path, form=form)
    files = sorted(tmp_path.iterdir())
    vblora.merge(model)
    for give in (lambda: model.save_pretrained(tmp_path), lambda: model.save_pretrained(save_directory=str(tmp_path))):
        with pytest.raises(
            ValueError, match=r"`save_directory` holds an adapter: .*adapter_config\.json.*another folder"
        ):
            give()
    assert sorted(tmp_path.iterdir()) == files
    model.save_pretrained(tmp_path / "merged")
    found = LlamaForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
    torch.testing.assert_close(found, model(IDS).logits)


def test_an_adapter_beside_a_model_is_warned_of(tmp_path, recwarn):
    llama().save_pretrained(tmp_path / "base")
    model = injected(llama)
    with pytest.warns(vblora.VBLoRAWarning, match="holds a model beside the adapter.*folder of its own") as caught:
        vblora.save(model, tmp_path / "base")
    assert caught[0].filename == __file__
    recwarn.clear()
    for _ in range(2):
        vblora.save(model, tmp_path / "own")
        (tmp_path / "own" / "config.json").write_text("{}")
    assert not recwarn.list


def test_a_state_dict_that_is_given_gets_the_base_names(tmp_path):
    model = vblora.merge(injected())
    model.save_pretrained(tmp_path, state_dict=model.state_dict())  # as a Trainer does
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again.eval()(IDS).logits, model(IDS).logits)


def test_a_model_without_an_active_adapter_is_its_base_model(tmp_path):
    model = injected()
    vblora.set_adapter(model, [])
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path).eval()(IDS).logits, bert().eval()(IDS).logits)


def test_copies_and_ejected_models_write_themselves(tmp_path):
    model = injected()
    other = vblora.merge(copy.deepcopy(model))
    other.save_pretrained(tmp_path / "copy")
    torch.testing.assert_close(type(model).from_pretrained(tmp_path / "copy").eval()(IDS).logits, other(IDS).logits)
    vblora.eject(model).save_pretrained(tmp_path / "ejected")
    assert "save_pretrained" not in vars(model) and "save_pretrained" not in vars(model.bert)


def test_tied_embeddings_that_merging_parted_are_refused(tmp_path):
    model = injected(lambda: llama(tie_word_embeddings=True), target_modules=["embed_tokens"], pad=True)
    vblora.merge(model)
    with pytest.raises(ValueError, match="tie_word_embeddings = False first"):
        model.save_pretrained(tmp_path)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path).eval()(IDS).logits, model(IDS).logits)


class Outer(PreTrainedModel):
    """A model of transformers that is given its encoder."""

    config_class = BertConfig
    _supports_sdpa = True

    def __init__(self, config: BertConfig, encoder: nn.Module | None = None) -> None:
        super().__init__(config)
        self.encoder = BertModel(config) if encoder is None else encoder
        self.head = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(self, ids):
        return self.head(self.encoder(ids)[1])


class Shared(nn.Module, PyTorchModelHubMixin):
    """A model with the ``save_pretrained`` of huggingface_hub."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = bert().eval() if inner is None else inner

    def forward(self, ids):
        return self.inner(ids).logits


@pytest.mark.parametrize("as_trainer", [False, True])
def test_a_model_around_an_injected_one_is_not_written_either(as_trainer, tmp_path):
    encoder = vblora.inject(bert().bert, vblora.VBLoRAConfig(**SIZES))
    outer = Outer(encoder.config, encoder)
    given = {"state_dict": outer.state_dict()} if as_trainer else {}
    with pytest.raises(
        ValueError, match=r"vblora.save\(model, directory\).*vblora.merge\(model\), then model.save_pret"
    ):
        outer.save_pretrained(tmp_path / "model", **given)
    assert not (tmp_path / "model").exists()
    vblora.merge(outer)
    given = {"state_dict": outer.state_dict()} if as_trainer else {}
    outer.save_pretrained(tmp_path / "model", **given)
    again, report = Outer.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(again.eval()(IDS), outer.eval()(IDS))


def test_a_model_of_the_hubs_mixin_around_an_injected_one(tmp_path):
    shared = Shared(injected())
    with pytest.raises(ValueError, match="would write the model without its adapters"):
        shared.save_pretrained(tmp_path / "model")
    vblora.merge(shared)
    shared.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(Shared.from_pretrained(tmp_path / "model", strict=True)(IDS), shared(IDS))


def test_a_model_of_a_store_is_written_as_its_base_model(tmp_path):
    model = bert().eval()
    expected = model(IDS).logits
    (tmp_path / "adapters").mkdir()
    store = AdapterStore(model, tmp_path / "adapters")
    for module, folder in ((model, "whole"), (model.bert, "encoder")):
        module.save_pretrained(tmp_path / folder)
        _, report = type(module).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(type(model).from_pretrained(tmp_path / "whole").eval()(IDS).logits, expected)
    store.detach()
    assert "save_pretrained" not in vars(model) and "save_pretrained" not in vars(model.bert)


class Task(nn.Module):
    """A model within another, and a checkpoint of it, as Lightning's modules and trainers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = injected(modules_to_save=["classifier"], task_type="SEQ_CLS")

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["state_dict"] = vblora.adapter_state_dict(self)


def test_a_state_dict_of_the_adapter_alone_restores_it():
    task, other = Task(), Task()
    with torch.no_grad():
        for parameter in vblora.parameter_groups(task)[0]["params"] + [task.model.classifier.weight]:
            parameter.normal_()
    checkpoint = {"state_dict": task.state_dict()}
    whole = sum(tensor.numel() for tensor in checkpoint["state_dict"].values())
    task.on_save_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) < set(task.state_dict())
    assert sum(tensor.numel() for tensor in checkpoint["state_dict"].values()) < whole / 4
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    report = other.load_state_dict(torch.load(file)["state_dict"], strict=False)
    assert not report.unexpected_keys and not any("vblora" in name for name in report.missing_keys)
    assert torch.equal(other.model(IDS).logits, task.model(IDS).logits)
    with pytest.raises(ValueError, match="has no adapter"):
        vblora.adapter_state_dict(bert())


def test_a_state_dict_of_the_adapter_has_all_that_changes():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16))
    model = nn.ModuleDict({"inner": inner, "head": nn.Linear(16, 2)})
    vblora.inject(
        inner, vblora.VBLoRAConfig(r=2, num_vectors=16, vector_length=8, target_modules=["0"], modules_to_save=["1"])
    )
    other = copy.deepcopy(model)
    inner[2].bias.requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
        inner(torch.randn(4, 16))  # moves the batch statistics
    part = vblora.adapter_state_dict(model)
    others = {name for name in part if ".vblora." not in name}
    statistics = {f"inner.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert others == statistics | {"inner.1.weight", "inner.1.bias", "inner.2.bias", "head.weight", "head.bias"}
    other.load_state_dict(part, strict=False)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
