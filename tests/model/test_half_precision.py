"""Half precision: of the base model, under autocast, and the warning about casting the adapter itself."""

import copy
import dataclasses
import warnings

import pytest
import torch

import vblora
from tests.small_models import Net, relative_error

CONFIG = vblora.VBLoRAConfig(target_modules=["up", "down"], r=2, num_vectors=16, vector_length=8, seed=3)
LOGITS = r"`logits` and `bank\.vectors` are half precision now.*Rounded logits choose other.*before vblora\.inject"
pytestmark = pytest.mark.usefixtures("one_thread")


def injected(net=None, **choice):
    torch.manual_seed(0)
    return vblora.inject(net or Net(blocks=2), CONFIG, **choice)


@pytest.mark.parametrize(
    "cast",
    [
        lambda net: net.half(),
        lambda net: net.bfloat16(),
        lambda net: net.to(torch.bfloat16),
        lambda net: net.vblora.to(dtype=torch.float16),
        lambda net: torch.nn.Sequential(net).half(),
    ],
)
def test_a_cast_of_the_adapter_is_warned_of_once(cast):
    net = injected()
    with pytest.warns(UserWarning, match=LOGITS) as seen:
        cast(net)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.to("cpu")
    assert net.vblora.default.logits.dtype in (torch.float16, torch.bfloat16)


def test_the_warning_is_true():
    """Rounded logits select other vectors."""
    config = dataclasses.replace(CONFIG, num_vectors=256, num_candidates=None)
    adapter = vblora.inject(Net(blocks=4), config).vblora.default
    chosen = torch.ops.vblora.admixture(adapter.logits, adapter.bank.vectors, adapter.candidates, 2)[1]
    rounded = adapter.logits.bfloat16().float()
    other = torch.ops.vblora.admixture(rounded, adapter.bank.vectors, adapter.candidates, 2)[1]
    assert not torch.equal(chosen, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_base_is_no_reason_to_warn(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = injected(Net(blocks=1).to(dtype))
        net.to("cpu").double().float()
        copy.deepcopy(net)
    assert net.vblora.default.logits.dtype == torch.float32


def test_a_bank_in_half_precision_is_warned_of():
    with pytest.warns(UserWarning, match=LOGITS):
        injected(bank=vblora.VectorBank(16, 8, dtype=torch.bfloat16))


def test_a_deployed_adapter_has_no_logits_to_warn_of(tmp_path):
    vblora.save(injected(), tmp_path, form="deploy")
    net = vblora.load(Net(blocks=2), tmp_path)
    with pytest.warns(UserWarning, match=r"the adapter's `bank\.vectors` is half precision") as seen:
        net.bfloat16()
    assert "choose" not in str(seen[0].message)


def test_trains_in_float16_with_a_gradient_scaler():
    """As on a GPU without bfloat16: gradients are scaled, and a step with an infinite one is skipped."""
    net, x = injected(), torch.randn(16, 16)
    whole = copy.deepcopy(net)
    wanted = torch.randn(16, 3)
    optimizer = torch.optim.AdamW(vblora.parameter_groups(net, lr_bank=0.05, lr_logits=0.05))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    losses, scales = [], []
    start = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for step in range(60):
        with torch.autocast("cpu", dtype=torch.float16):
            output = net(x)
        loss = (output.float() - wanted).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
        if step == 0:  # it overflowed, so nothing changed
            assert scales[0] < 2.0**40
            assert all(torch.equal(parameter, start[name]) for name, parameter in net.named_parameters())
    assert output.dtype == torch.float16
    assert losses[-1] < 0.7 * losses[0] and min(scales) > 1
    assert net.vblora.default.logits.dtype == torch.float32 and net.vblora.default.logits.isfinite().all()
    # The gradients equal those without autocast, up to float16's precision.
    reference = torch.autograd.grad((whole(x) - wanted).square().mean(), whole.vblora.default.bank.vectors)[0]
    with torch.autocast("cpu", dtype=torch.float16):
        output = whole(x)
    loss = (output.float() - wanted).square().mean() * 256
    halved = torch.autograd.grad(loss, whole.vblora.default.bank.vectors)[0] / 256
    assert relative_error(halved, reference) < 2e-2


def test_factors_follow_layers_that_are_cast_alone():
    net = injected(Net(blocks=2).bfloat16())
    torch.nn.init.normal_(net.vblora.default.bank.vectors)
    x = torch.randn(3, 16)
    with torch.no_grad():
        net(x.bfloat16())
        for part in (net.embed, net.blocks, net.head):
            part.float()
        assert relative_error(net(x), injected_again(net)(x)) < 1e-6


def injected_again(net: Net) -> Net:
    other = injected()
    other.load_state_dict(net.state_dict())
    return other
