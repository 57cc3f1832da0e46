"""diffusers' denoisers: layers adapted by their names, files that load back, and what would leave out the updates."""

import copy

import pytest
import torch

import vblora
from tests.small_models import relative_error

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = vblora.VBLoRAConfig(
    r=2,
    num_vectors=32,
    vector_length=8,
    init_vector_bank_bound=0.5,
    target_modules=["to_q", "to_k", "to_v", "to_out.0"],
)
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
STATES = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
TIMES = torch.tensor([1, 2])


def unet():
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def transformer():
    heads = {"attention_head_dim": 8, "num_attention_heads": 2}
    widths = {"caption_projection_dim": 16, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, **heads, **widths
    )


def denoised(model, **choice):
    if isinstance(model, diffusers.UNet2DConditionModel):
        return model(NOISE, TIMES, STATES, **choice).sample
    return model(NOISE, encoder_hidden_states=STATES, pooled_projections=STATES[:, 0], timestep=TIMES, **choice).sample


def trained(base):
    model = vblora.inject(copy.deepcopy(base), CONFIG)
    model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(vblora.parameter_groups(model.train()), weight_decay=0.0)
    for _ in range(3):
        (denoised(model) - NOISE.flip(0)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("make", [unet, transformer])
@torch.no_grad()
def test_files_load_back(make, tmp_path):
    torch.manual_seed(0)
    base = make().eval()
    with torch.enable_grad():
        model = trained(base)
    expected = denoised(model)
    assert relative_error(denoised(base), expected) > 0.05
    vblora.save(model, tmp_path / "adapter")
    assert torch.equal(denoised(vblora.load(copy.deepcopy(base), tmp_path / "adapter")), expected)

    with pytest.raises(ValueError, match=r"To write the adapter: vblora\.save"):
        model.save_pretrained(tmp_path / "whole")
    vblora.merge(model).save_pretrained(tmp_path / "merged")
    merged = type(base).from_pretrained(tmp_path / "merged")
    assert relative_error(denoised(merged), expected) < 1e-5


@torch.no_grad()
def test_diffusers_loads_an_export_as_lora(tmp_path):
    torch.manual_seed(0)
    base = unet().eval()
    with torch.enable_grad():
        model = trained(base)
    vblora.save(model, tmp_path, form="lora")
    base.load_lora_adapter(tmp_path, weight_name="adapter_model.safetensors", prefix="base_model.model")
    assert relative_error(denoised(base), denoised(model)) < 1e-5


@torch.no_grad()
def test_what_would_leave_out_the_updates_is_refused():
    model = vblora.inject(unet().eval(), CONFIG)
    expected = denoised(model)
    with pytest.raises(ValueError, match=r"Call vblora\.merge\(model\) first"):
        model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r'`cross_attention_kwargs` has a "scale" of 0\.5'):
        denoised(model, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(denoised(model, cross_attention_kwargs={"scale": 1.0}), expected)
    vblora.merge(model)
    model.fuse_qkv_projections()
    assert relative_error(denoised(model), expected) < 1e-5
    model.unfuse_qkv_projections()
    vblora.eject(model)
    assert not any("fuse_projections" in vars(module) for module in model.modules())
    denoised(model, cross_attention_kwargs={"scale": 0.5})
