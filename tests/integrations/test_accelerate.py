"""With accelerate: ``prepare``, and models whose layers it has spread over devices or offloaded, as far as a CPU shows it."""

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from accelerate.state import AcceleratorState

import vblora
from tests.small_models import Net

CONFIG = {"r": 2, "num_vectors": 40, "vector_length": 8, "init_vector_bank_bound": 0.5, "seed": 3}
CONFIG |= {"target_modules": ["up", "down"], "num_candidates": 8}
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def base():
    torch.manual_seed(0)
    return Net(blocks=2)


def injected(model):
    torch.manual_seed(1)
    return vblora.inject(model, vblora.VBLoRAConfig(**CONFIG))


def train(model, optimizer=None, backward=torch.Tensor.backward):
    losses = []
    optimizer = optimizer or optimizer_of(model)
    for _ in range(3):
        loss = model(X).square().mean()
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def optimizer_of(model):
    return torch.optim.AdamW(vblora.parameter_groups(model))


@pytest.fixture(autouse=True)
def _no_state_of_others():
    """An Accelerator, and so a Trainer, leaves its settings to the next one in the process: a precision, for instance."""
    AcceleratorState._reset_state(reset_partial_state=True)


def test_prepare(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    model = injected(base())
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    losses = train(prepared, optimizer, accelerator.backward)
    assert losses == train(injected(base()))
    vblora.save(accelerator.unwrap_model(prepared), tmp_path)
    assert torch.equal(vblora.load(base(), tmp_path)(X), model(X))


@pytest.mark.parametrize("offload", ["cpu", "disk", "some"])
def test_offloaded_layers_train_as_those_that_are_there(offload, tmp_path):
    model = base()
    if offload == "cpu":
        accelerate.cpu_offload(model, torch.device("cpu"))
    elif offload == "disk":
        accelerate.disk_offload(model, tmp_path, torch.device("cpu"))
    else:
        places = {"embed": "cpu", "blocks.0": "disk", "blocks.1": "cpu", "head": "disk"}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    assert model.blocks[0].up.weight.is_meta
    injected(model)
    assert model.vblora.default.logits.device == model.vblora.default.bank.vectors.device == torch.device("cpu")
    # To rounding: a layer with accelerate's hook is not fused with its update.
    assert train(model) == pytest.approx(train(injected(base())), rel=1e-6)


def test_an_offloaded_adapter_is_refused_and_can_be_brought_back(tmp_path):
    model = injected(base()).eval()
    expected = model(X)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert model.vblora.default.logits.is_meta
    for use in (lambda: model(X), lambda: model.blocks[0].up(X), lambda: vblora.save(model, tmp_path)):
        with pytest.raises(ValueError, match="accelerate has offloaded the adapter"):
            use()
    remove_hook_from_submodules(model.vblora)
    assert model.blocks[0].up.weight.is_meta
    torch.testing.assert_close(model(X), expected)


def test_a_layer_on_another_device_takes_its_factors_there():
    model = base()
    for block in model.blocks:  # as with a device_map that parts the layers of a block
        add_hook_to_module(block.down, AlignDevicesHook("meta"))
    injected(model)
    assert model.blocks[0].up.weight.device.type == model.vblora.default.logits.device.type == "cpu"
    block = model.blocks[0]
    hidden = block.up(X)
    out = block.down(hidden)
    assert hidden.device.type == "cpu" and out.is_meta and out.shape == (8, 16)
    assert out.requires_grad  # but nothing comes back from a meta device


def test_what_trains_beside_the_adapter_cannot_be_offloaded():
    model = base()
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"`head.weight` would train, but accelerate has offloaded it"):
        vblora.inject(model, vblora.VBLoRAConfig(**CONFIG, modules_to_save=["head"]))
