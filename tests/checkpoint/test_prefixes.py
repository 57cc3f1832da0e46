"""An adapter of an encoder loads into the model around it, and back; what does not fit is refused."""

import warnings

import pytest
import torch
from torch import nn

import vblora
from tests.small_models import bert

IDS = torch.arange(12).view(2, 6)
CONFIGS = [
    vblora.VBLoRAConfig(target_modules=["query", "value"], num_vectors=16, vector_length=8),
    vblora.LoraConfig(target_modules=r"(bert\.)?encoder.*(query|key)", layers_to_transform=None),
    vblora.VeraConfig(target_modules=["dense"], r=4, exclude_modules=["pooler"]),
]


def trained(model: nn.Module, config) -> nn.Module:
    torch.manual_seed(1)
    vblora.inject(model.eval(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return bert().eval()


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = classifier()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
@pytest.mark.parametrize("form", ["resume", "lora"])
def test_from_the_encoder_to_the_model_around_it_and_back(config, form, tmp_path):
    encoder = trained(classifier().bert, config)
    expected = encoder(IDS).last_hidden_state
    vblora.save(encoder, tmp_path / "encoder", form=form)
    around = vblora.load(classifier(), tmp_path / "encoder")
    torch.testing.assert_close(around.bert(IDS).last_hidden_state, expected)
    further = vblora.load(Around(), tmp_path / "encoder")
    torch.testing.assert_close(further.inner.bert(IDS).last_hidden_state, expected)
    vblora.save(around, tmp_path / "around", form=form)
    back = vblora.load(classifier().bert, tmp_path / "around")
    torch.testing.assert_close(back(IDS).last_hidden_state, expected)
    vblora.load(encoder, tmp_path / "around") if form == "resume" else None  # over the one that it has
    torch.testing.assert_close(encoder(IDS).last_hidden_state, expected)


def test_a_head_is_left_out_of_the_encoder_with_a_warning(tmp_path):
    fields = {"num_vectors": 16, "vector_length": 8, "bias": "vblora_only", "modules_to_save": ["classifier", "pooler"]}
    model = trained(classifier(), vblora.VBLoRAConfig(**fields))
    vblora.save(model, tmp_path)
    with pytest.warns(
        vblora.VBLoRAWarning, match="holds `classifier.bias`, `classifier.weight`, which the model does not"
    ):
        encoder = vblora.load(classifier().bert, tmp_path)
    torch.testing.assert_close(encoder(IDS).pooler_output, model.bert(IDS).pooler_output)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = vblora.load(classifier(), tmp_path)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


def test_two_models_that_fit_are_refused(tmp_path):
    vblora.save(trained(classifier().bert, CONFIGS[0]), tmp_path)
    both = nn.ModuleDict({"a": classifier(), "b": classifier()})
    pair = Around()
    pair.other = both["b"]
    with pytest.raises(ValueError, match=r"several parts of the model: .*`inner.bert.` or `other.bert.`"):
        vblora.load(pair, tmp_path)


def test_a_model_under_two_names_is_one_part(tmp_path):
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = self.right = classifier().bert

        def forward(self, ids):
            return self.left(ids)[1] - 2 * self.right(ids)[1]

    encoder = trained(classifier().bert, vblora.LoraConfig(target_modules=["query"]))
    vblora.save(encoder, tmp_path)
    loaded = vblora.load(Siamese().eval(), tmp_path)
    torch.testing.assert_close(loaded(IDS), -encoder(IDS)[1])
