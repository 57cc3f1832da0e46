"""Training that would train nothing, or lose what it trained, is refused or warned of; the head of a task trains and is saved."""

import warnings

import peft
import pytest
import torch
from torch import nn

import vblora
from tests.small_models import Net, bert, relative_error

SIZES = {"num_vectors": 16, "vector_length": 8}
IDS = torch.arange(12).view(2, 6)


def ours(**fields) -> vblora.VBLoRAConfig:
    return vblora.VBLoRAConfig(**SIZES | fields)


def adapted_net() -> Net:
    return vblora.inject(Net(blocks=2), ours(target_modules=["up", "down"], modules_to_save=["head"]))


def test_groups_of_a_merged_adapter_are_refused():
    net = vblora.merge(adapted_net())
    with pytest.raises(ValueError, match=r"'default' is merged .* no gradient. Call vblora.unmerge"):
        vblora.parameter_groups(net)
    assert vblora.parameter_groups(vblora.unmerge(net))
    vblora.merge(net, release=True)
    with pytest.raises(ValueError, match="load the base model again"):
        vblora.parameter_groups(net)


def test_a_training_forward_of_a_merged_adapter_is_warned_of_once():
    net = adapted_net()
    net(torch.randn(2, 16))
    vblora.merge(net)
    with pytest.warns(vblora.VBLoRAWarning, match="the model is in training mode, but adapter 'default' is merged"):
        net(torch.randn(2, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(torch.randn(2, 16))
        with torch.no_grad():
            net(torch.randn(2, 16))
        vblora.unmerge(net)(torch.randn(2, 16))


def test_an_adapter_loaded_for_inference_has_no_groups(tmp_path):
    vblora.save(vblora.inject(Net(blocks=2), ours(target_modules=["up"])), tmp_path)
    net = vblora.load(Net(blocks=2), tmp_path)
    with pytest.raises(ValueError, match=r"no parameter of adapter 'default' .* is_trainable=True"):
        vblora.parameter_groups(net)
    net.head.requires_grad_(True)
    with pytest.warns(vblora.VBLoRAWarning, match="no parameter of adapter 'default'"):
        assert [group["name"] for group in vblora.parameter_groups(net)] == ["other"]
    with pytest.warns(vblora.VBLoRAWarning, match="the model trains, but no parameter of adapter 'default'"):
        net(torch.randn(2, 16))


def test_training_that_trains_is_not_warned_of():
    net = adapted_net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = torch.optim.AdamW(vblora.parameter_groups(net))
        net(torch.randn(2, 16)).sum().backward()
        optimizer.step()


@pytest.fixture
def encoder(tmp_path):
    """The folder of a BERT without the head of a classifier."""
    torch.manual_seed(0)
    bert().bert.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def classifier(folder) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_new_head_that_does_not_train_is_warned_of(encoder, tmp_path):
    with pytest.warns(
        vblora.VBLoRAWarning, match=r"`classifier` got random weights .*modules_to_save=\[\"classifier\"\]"
    ):
        model = vblora.inject(classifier(encoder), ours())
    vblora.save(model, tmp_path / "adapter")
    with pytest.warns(vblora.VBLoRAWarning, match="`classifier` got random weights"):
        vblora.load(classifier(encoder), tmp_path / "adapter")


def test_a_head_that_was_loaded_or_trains_is_not_warned_of(encoder, tmp_path):
    model = classifier(encoder)
    model.save_pretrained(tmp_path / "whole")
    with warnings.catch_warnings():
        warnings.simplefilter("error", vblora.VBLoRAWarning)
        vblora.inject(classifier(tmp_path / "whole"), ours())
        vblora.inject(model, ours(modules_to_save=["classifier"]))
        vblora.inject(model, ours(target_modules=["key"]), adapter_name="other")  # beside a head that trains
        vblora.inject(bert(), ours())  # random, all of it


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_the_head_of_a_task_type_trains_and_is_saved(encoder, tmp_path, task):
    model = vblora.inject(classifier(encoder), ours(task_type=task))
    optimizer = torch.optim.AdamW(vblora.parameter_groups(model))
    before = model.classifier.weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    assert relative_error(model.classifier.weight, before) > 1e-3
    vblora.save(model, tmp_path / "adapter")
    torch.manual_seed(99)
    again = vblora.load(classifier(encoder), tmp_path / "adapter")
    torch.testing.assert_close(again.eval()(IDS).logits, model.eval()(IDS).logits)


def test_peft_reads_the_head_of_a_task_type(encoder, tmp_path):
    model = vblora.inject(classifier(encoder), ours(task_type="SEQ_CLS", num_candidates=None))
    with torch.no_grad():
        model.classifier.weight.normal_()
    vblora.save(model, tmp_path / "adapter", form="peft")
    again = peft.PeftModel.from_pretrained(classifier(encoder), tmp_path / "adapter")
    assert isinstance(again, peft.PeftModelForSequenceClassification)
    torch.testing.assert_close(again.eval()(IDS).logits, model.eval()(IDS).logits, atol=1e-5, rtol=1e-5)


def test_heads_of_other_names_train_too():
    from transformers import BertForQuestionAnswering, XLNetConfig, XLNetForSequenceClassification

    answers = vblora.inject(BertForQuestionAnswering(bert().config), ours(task_type="QUESTION_ANS"))
    assert answers.qa_outputs.weight.requires_grad
    xlnet = XLNetForSequenceClassification(XLNetConfig(vocab_size=50, d_model=32, n_layer=1, n_head=4, d_inner=64))
    vblora.inject(xlnet, ours(task_type="SEQ_CLS", target_modules=["layer_1"]))
    assert xlnet.logits_proj.weight.requires_grad and xlnet.sequence_summary.summary.weight.requires_grad
    with pytest.warns(vblora.VBLoRAWarning, match="has no head called classifier or score"):
        vblora.inject(nn.Sequential(nn.Linear(8, 8)), ours(task_type="SEQ_CLS", target_modules=["0"]))


def test_inference_mode_freezes_the_adapter():
    net = vblora.inject(Net(blocks=2), ours(target_modules=["up"], modules_to_save=["head"], inference_mode=True))
    assert not any(parameter.requires_grad for parameter in net.parameters())
