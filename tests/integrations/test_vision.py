"""Vision transformers, transformers' and timm's: default targets, a head that trains, files that load back."""

import copy

import pytest
import torch

import vblora
from tests.small_models import ComposedRows, relative_error

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"r": 2, "num_vectors": 32, "vector_length": 16, "init_vector_bank_bound": 0.5}
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 2


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, num_labels=2, **sizes))


def timms(name="vit_tiny_patch16_224", **choice):
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=2, **{"img_size": 32, "depth": 2} | choice)


def logits_of(model):
    out = model(IMAGES)
    return getattr(out, "logits", out)


@pytest.mark.parametrize(("make", "targets", "head"), [(vit, 4, "classifier"), (timms, 2, "head")])
def test_default_targets_and_a_head(make, targets, head, tmp_path):
    torch.manual_seed(0)
    base = make()
    model = vblora.inject(copy.deepcopy(base), vblora.VBLoRAConfig(**SIZES, modules_to_save=[head]))
    assert len(model.vblora.default.targets) == targets
    optimizer = torch.optim.AdamW(vblora.parameter_groups(model), weight_decay=0.0)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(logits_of(model), LABELS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    vblora.save(model, tmp_path)
    loaded = vblora.load(base, tmp_path)
    with torch.no_grad():
        expected = logits_of(model.eval())
        assert torch.equal(logits_of(loaded.eval()), expected)
        assert relative_error(logits_of(vblora.merge(loaded)), expected) < 1e-5


def test_all_linear_leaves_out_timms_classifier():
    model = vblora.inject(timms(), vblora.VBLoRAConfig(**SIZES, target_modules="all-linear"))
    assert {t.name.rpartition(".")[2] for t in model.vblora.default.targets} == {"qkv", "proj", "fc1", "fc2"}
    with ComposedRows() as composed:
        model.forward_features(IMAGES)  # not through the model's own hooks
    assert composed.calls == 1


def test_a_model_that_reads_weights_is_warned_of():
    model = timms("eva02_tiny_patch14_224", img_size=28, depth=1)
    vblora.inject(model, vblora.VBLoRAConfig(**SIZES))
    with pytest.warns(vblora.VBLoRAWarning, match=r"read the weight of `blocks\.0\.attn\.qkv` itself"):
        model(IMAGES[..., :28, :28])
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv"):
        vblora.merge(model)
