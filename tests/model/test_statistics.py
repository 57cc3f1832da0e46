"""Normalization layers with running statistics are frozen with the base model, unless ``modules_to_save`` trains them."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import vblora
from tests.small_models import relative_error
from tests.test_architectures import build, inputs, outputs

CONFIG = {"num_vectors": 16, "vector_length": 8, "init_vector_bank_bound": 0.5}
KINDS = {
    "BatchNorm1d": (lambda: nn.Linear(8, 16), nn.BatchNorm1d, (4, 8)),
    "BatchNorm2d": (lambda: nn.Conv2d(8, 16, 1), nn.BatchNorm2d, (4, 8, 3, 3)),
    "InstanceNorm1d": (
        lambda: nn.Conv1d(8, 16, 1),
        lambda n: nn.InstanceNorm1d(n, affine=True, track_running_stats=True),
        (4, 8, 5),
    ),
}


class Network(nn.Module):
    def __init__(self, kind: str = "BatchNorm1d") -> None:
        super().__init__()
        torch.manual_seed(0)
        layer, norm, shape = KINDS[kind]
        self.up, self.norm, self.shape = layer(), norm(16), shape
        for _ in range(20):
            self(self.batch())

    def batch(self):
        return 1 + 2 * torch.randn(self.shape)

    def forward(self, x):
        return self.norm(self.up(x))


def trained(net: nn.Module, steps: int = 3) -> nn.Module:
    groups = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(groups, lr=0.1)
    for _ in range(steps):
        net.train()(net.batch()).square().mean().backward()
        optimizer.step()
    return net.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_do_not_change_and_a_reload_is_the_trained_model(kind, tmp_path):
    base = Network(kind)
    net = copy.deepcopy(base)
    with pytest.warns(vblora.VBLoRAWarning, match=r"`norm` stay in evaluation mode.*`modules_to_save`"):
        vblora.inject(net, vblora.VBLoRAConfig(**CONFIG, target_modules=["up"]))
    x = net.batch()
    assert net.train().norm.training is False and net.up.training
    assert torch.equal(net(x), net.eval()(x))  # it trains what it will compute
    trained(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vblora.save(net, tmp_path)
        again = vblora.load(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(again(x), net(x)) and not torch.equal(net(x), base.eval()(x))
    with vblora.disabled(net):
        assert torch.equal(net(x), base(x))
    vblora.eject(net)
    assert torch.equal(net(x), base(x)) and net.train().norm.training and "train" not in vars(net.norm)


def test_a_layer_that_is_saved_trains_while_its_adapter_is_active(tmp_path):
    base = Network()
    net = copy.deepcopy(base)
    vblora.inject(net, vblora.VBLoRAConfig(**CONFIG, target_modules=["up"], modules_to_save=["norm"]))
    before = net.norm.running_mean.clone()
    assert net.train().norm.training
    trained(net)
    assert not torch.equal(net.norm.running_mean, before)
    vblora.save(net, tmp_path)
    x = net.batch()
    assert torch.equal(vblora.load(copy.deepcopy(base), tmp_path).eval()(x), net(x))
    vblora.inject(net, vblora.VBLoRAConfig(**CONFIG, target_modules=["up"]), adapter_name="other")
    net.train()
    vblora.set_adapter(net, "other")
    assert not net.norm.training and torch.equal(net.norm.running_mean, before)
    vblora.set_adapter(net, "default")
    assert net.norm.training and not net.eval().norm.training
    assert torch.equal(vblora.eject(net)(x), base.eval()(x))


def test_copies_and_pickles_freeze_their_own():
    net = vblora.inject(Network(), vblora.VBLoRAConfig(**CONFIG, target_modules=["up"]))
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        assert other.train().up.training and not other.norm.training
        vblora.eject(other)
        assert other.train().norm.training
    assert not net.train().norm.training


def test_as_in_a_model_of_transformers(tmp_path):
    """Convolution modules with BatchNorm; with PEFT the reload is 0.055 off."""
    base = build("Wav2Vec2ConformerModel")
    given = inputs(base)
    model = vblora.inject(copy.deepcopy(base), vblora.VBLoRAConfig(**CONFIG, pad=True, target_modules=["linear_q"]))
    model.train()(**given)
    vblora.save(model, tmp_path)
    loaded = vblora.load(copy.deepcopy(base), tmp_path)
    for ours, again in zip(outputs(model, given), outputs(loaded, given), strict=True):
        assert relative_error(again, ours) == 0.0


def test_statistics_that_would_stay_reset_are_not_reset():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    model[1].running_mean.fill_(3.0)
    with pytest.warns(vblora.VBLoRAWarning, match="stay in evaluation mode"):
        vblora.inject(model, vblora.VBLoRAConfig(target_modules=["0"], num_vectors=16, vector_length=8))
    for net in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"`1` is frozen.*update_bn"):
            torch.optim.swa_utils.update_bn([torch.randn(4, 8)], net)
        assert net[1].running_mean.eq(3).all()
    vblora.eject(model)
    torch.optim.swa_utils.update_bn([torch.randn(4, 8)], model)
    assert not model[1].running_mean.eq(3).any()


def test_a_layer_that_replaced_a_frozen_one_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    with pytest.warns(vblora.VBLoRAWarning, match="stay in evaluation mode"):
        vblora.inject(model, vblora.VBLoRAConfig(target_modules=["0"], num_vectors=16, vector_length=8))
    model(torch.randn(4, 8)).sum().backward()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for use in (
        lambda: model(torch.randn(4, 8)),
        lambda: vblora.parameter_groups(model),
        lambda: vblora.save(model, tmp_path),
    ):
        with pytest.raises(ValueError, match=r"something replaced `1` after vblora.inject, such as SyncBatchNorm"):
            use()
    vblora.eject(model)
    vblora.inject(model, vblora.VBLoRAConfig(target_modules=["0"], num_vectors=16, vector_length=8)).eval()
    vblora.save(model, tmp_path)
