"""Two processes train as one does on the whole batch, under DDP and FSDP2; what they save loads anywhere."""

import copy
import dataclasses
import warnings
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import vblora
from tests.small_models import MIXING, Net
from tests.workers import run_in_processes
from vblora.model import ddp_guard

CONFIG = {"r": 2, "num_vectors": 40, "vector_length": 8, "init_vector_bank_bound": 0.5, "seed": 3}
CONFIG |= {"target_modules": ["up", "down"], "modules_to_save": ["head"]}
STEPS = 3
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


CONTAINER = "a container"  # in place of `reentrant`: the model is an nn.Sequential
SCALES = "scales"  # in place of `num_candidates`: there are 4, and sub-vectors have factors


def base(reentrant=None):
    torch.manual_seed(0)
    if reentrant == CONTAINER:
        net = Net(blocks=3)
        return nn.Sequential(OrderedDict(embed=net.embed, blocks=nn.Sequential(*net.blocks), head=net.head))
    model = Net(blocks=3, reentrant=reentrant)
    if reentrant:  # what is recomputed re-entrantly needs an input with a gradient; transformers does the same
        model.embed.register_forward_hook(lambda _module, _args, output: output.requires_grad_())
    return model


def injected(reentrant=None, **choice):
    if choice.get("num_candidates") == SCALES:
        choice |= {"num_candidates": 4, "train_scales": True}
    return vblora.inject(base(reentrant), vblora.VBLoRAConfig(**CONFIG | choice))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 16, generator=generator), torch.randn(8, 3, generator=generator)


def optimizer_of(model):
    groups = vblora.parameter_groups(model, lr_logits=30.0, lr_bank=0.1, lr_other=0.1)
    return torch.optim.SGD(groups, momentum=0.9)


def train(model, optimizer, steps=range(STEPS)):
    """Losses over the whole batch, and the gradients of the last step, of one process or of all."""
    together = torch.distributed.is_initialized()
    losses, gradients = [], []
    for step in steps:
        x, y = batch(step)
        if together:
            x, y = (tensor.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()] for tensor in (x, y))
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        loss = loss.detach()
        if together:
            torch.distributed.all_reduce(loss)
            loss /= torch.distributed.get_world_size()
        losses.append(loss.item())
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [full(parameter.grad) for parameter in trained]
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


def full(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def sharded(model, how):
    """As FSDP2's users do it."""
    if how == "replicated":  # shards of each other's copies
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        fully_shard(model.vblora.default, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if how == "adapter":
        fully_shard(model.vblora.default)
    if how == "children":  # that of a container that holds the adapter is one of them
        for child in model.children():
            fully_shard(child)
    if how in ("layers", "resharded", "adapter"):
        for block in model.blocks:
            fully_shard(block)
    return fully_shard(model, reshard_after_forward=True) if how == "resharded" else fully_shard(model)


def alone(reentrant, num_candidates):
    model = injected(reentrant, num_candidates=num_candidates)
    optimizer = optimizer_of(model)
    losses, gradients = train(model, optimizer)
    with torch.no_grad():
        outputs = model(batch(9)[0])
    return model, optimizer, losses, gradients, outputs


def train_ddp(reentrant, num_candidates, folder):
    warnings.simplefilter("error")
    model = injected(reentrant, num_candidates=num_candidates)
    # Re-entrant checkpointing runs backward within backward, from each block into all logits: more than DDP expects unless told.
    wrapped = DistributedDataParallel(model, static_graph=reentrant is True)
    optimizer = optimizer_of(wrapped)
    losses, gradients = train(wrapped, optimizer)
    if torch.distributed.get_rank() == 0:
        vblora.save(wrapped, folder)
        torch.save(vblora.pack_optimizer(wrapped, optimizer), f"{folder}/optimizer.pt")
    return losses, gradients, vblora.stats(wrapped).exhausted, list(wrapped.named_module_buffers)


def train_fsdp(how, reentrant, num_candidates, folder):
    warnings.simplefilter("error")
    model = sharded(injected(reentrant, num_candidates=num_candidates), how)
    with torch.no_grad():
        model(batch(9)[0])  # which must neither leave its factors nor gathered parameters to those who come next
    optimizer = optimizer_of(model)
    losses, gradients = train(model, optimizer)
    with torch.no_grad():
        outputs = [model(batch(9)[0]) for _ in range(2)]
    assert torch.equal(*outputs)
    vblora.save(model, folder)
    packed = vblora.pack_optimizer(model, optimizer)
    if torch.distributed.get_rank() == 0:
        torch.save(packed, f"{folder}/optimizer.pt")
    exhausted = vblora.stats(model).exhausted
    if num_candidates:
        with pytest.raises(ValueError, match="the adapter is sharded"):
            vblora.grow(model, 8, optimizer)
    more = train(model, optimizer, range(STEPS, STEPS + 2))
    # Back to what was saved, and the same again.
    vblora.load(model, folder)
    vblora.unpack_optimizer(model, optimizer, torch.load(f"{folder}/optimizer.pt", weights_only=True))
    again = train(model, optimizer, range(STEPS, STEPS + 2))
    assert again[0] == more[0]
    return losses, gradients, exhausted, outputs[0]


def check(folder, returned, reentrant, num_candidates):
    model, optimizer, losses, gradients, outputs = alone(reentrant, num_candidates)
    for theirs, their_gradients, exhausted, *_ in returned:
        torch.testing.assert_close(theirs, losses, **ROUNDING)
        for ours, other in zip(gradients, their_gradients, strict=True):
            torch.testing.assert_close(other, ours, **ROUNDING)
        assert exhausted == vblora.stats(model).exhausted
    assert len(set(losses)) == STEPS
    # What was saved loads into a single process, which goes on alike.
    fresh = vblora.load(base(reentrant), folder, is_trainable=True)
    torch.testing.assert_close(fresh(batch(9)[0]), outputs, **ROUNDING)
    theirs = optimizer_of(fresh)
    vblora.unpack_optimizer(fresh, theirs, torch.load(folder / "optimizer.pt", weights_only=True))
    more = range(STEPS, STEPS + 2)
    torch.testing.assert_close(train(fresh, theirs, more), train(model, optimizer, more), **ROUNDING)


DDP = [(None, 4), (None, None), (False, 4), (True, 4), (True, SCALES)]
FSDP = [
    ("layers", None, 4),
    ("root", None, 4),
    ("adapter", None, 4),
    ("resharded", None, 4),
    ("layers", False, 4),
    ("adapter", False, 4),
    ("layers", None, None),
    ("adapter", None, SCALES),
    ("replicated", None, 4),
    ("root", CONTAINER, 4),
    ("layers", CONTAINER, 4),
    ("children", CONTAINER, 4),
]


MIXED = [True, False]


def each_case(folder):
    return {
        "ddp": [train_ddp(*case, folder / f"ddp-{number}") for number, case in enumerate(DDP)],
        "fsdp": [train_fsdp(*case, folder / f"fsdp-{number}") for number, case in enumerate(FSDP)],
        "mixed": [train_mixed(own_group) for own_group in MIXED],
    }


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What each case returns in each process. Two processes for all cases: it is their start that takes the time."""
    folder = tmp_path_factory.mktemp("together")
    return folder, run_in_processes(each_case, folder, folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", DDP)
def test_ddp(case, together):
    folder, returned = together
    number = DDP.index(case)
    returned = [ours["ddp"][number] for ours in returned]
    check(folder / f"ddp-{number}", returned, *case)
    assert [buffers for *_, buffers in returned] == [[], []]
    assert returned[0][2] > 0 or case[-1] != 4


@pytest.mark.slow
@pytest.mark.parametrize("case", FSDP)
def test_fsdp2(case, together):
    folder, returned = together
    number = FSDP.index(case)
    returned = [ours["fsdp"][number] for ours in returned]
    check(folder / f"fsdp-{number}", returned, *case[1:])
    for *_, outputs in returned:
        torch.testing.assert_close(outputs, alone(*case[1:])[-1], **ROUNDING)


def train_mixed(own_group):
    """Losses of layers in bfloat16, and the dtypes of logits that the operator got."""
    model = injected(num_candidates=4)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if own_group:
        fully_shard(model.vblora.default)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=dataclasses.replace(policy, output_dtype=torch.float32))
    with Logits() as logits:
        losses, _ = train(model, optimizer_of(model))
    return losses, logits.dtypes


class Logits(TorchDispatchMode):
    """Collects the dtypes of those that are composed."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in MIXING:
            self.dtypes.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.slow
def test_fsdp2_rounds_no_logits_of_a_group_of_their_own(together):
    _, returned = together
    losses = alone(None, 4)[2]
    for own, roots in (ours["mixed"] for ours in returned):
        assert own[1] == {torch.float32} and roots[1] == {torch.bfloat16}
        torch.testing.assert_close(own[0], losses, rtol=2e-2, atol=0)


def test_several_processes_must_be_given_a_seed(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    injected()
    with pytest.raises(ValueError, match="`seed` is None, but 2 processes train together"):
        injected(seed=None)


def test_ddp_is_told_to_leave_the_adapters_buffers_alone():
    model = Net(blocks=1)
    model._ddp_params_and_buffers_to_ignore = ["mine"]
    vblora.inject(model, vblora.VBLoRAConfig(**CONFIG | {"num_candidates": 4}))
    again = copy.deepcopy(model)
    assert model._ddp_params_and_buffers_to_ignore == ["mine", "vblora.default.candidates", "vblora.default.exhausted"]
    vblora.eject(model)
    assert model._ddp_params_and_buffers_to_ignore == ["mine"]
    assert len(again._ddp_params_and_buffers_to_ignore) == 3


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_an_adapter_that_ddp_does_not_know_is_refused(one_process):
    model = injected()
    vblora.inject(model, vblora.VBLoRAConfig(**CONFIG | {"modules_to_save": None}), adapter_name="b")
    wrapped, (x, _) = DistributedDataParallel(nn.Sequential(model)), batch(0)
    wrapped(x).sum().backward()
    vblora.set_adapter(model, "b")
    with pytest.raises(
        ValueError, match=r"adapter 'b' trains, but became active or trainable after Dist.*wrap the model anew"
    ):
        wrapped(x)
    with torch.no_grad():
        wrapped(x)
    model(x).sum().backward()  # without DDP
    again = DistributedDataParallel(wrapped.module)  # what the message says
    again(x).sum().backward()
    vblora.set_adapter(model, "default")
    wrapped(x).sum().backward()
    with pytest.raises(ValueError, match="adapter 'default' trains, but"):
        again(x)


@pytest.mark.parametrize(
    "newer", [object(), SimpleNamespace(_active_ddp_module=nn.Identity())], ids=["active", "reducer"]
)
def test_warns_once_if_a_newer_torch_does_not_tell_what_ddp_reduces(one_process, monkeypatch, recwarn, newer):
    wrapped, (x, _) = DistributedDataParallel(injected(modules_to_save=None)), batch(0)
    ddp_guard._warn_unchecked.cache_clear()
    monkeypatch.setattr(ddp_guard, "DistributedDataParallel", newer)
    for _ in range(2):
        wrapped(x).sum().backward()
    found = [str(warning.message) for warning in recwarn.list if "does not tell which" in str(warning.message)]
    assert len(found) == 1 and "wrap the model after vblora.set_adapter" in found[0]


def test_an_adapter_that_ddp_was_told_to_ignore_is_not_refused(one_process):
    model = injected(modules_to_save=None)
    model.vblora.default.requires_grad_(False)
    model.head.requires_grad_(True)  # DDP wants something that trains
    wrapped, (x, _) = DistributedDataParallel(model), batch(0)
    model.vblora.default.requires_grad_(True)
    with pytest.raises(ValueError, match="adapter 'default' trains, but became active or trainable"):
        wrapped(x)
    model._ddp_params_and_buffers_to_ignore = [name for name, _ in model.named_parameters() if "vblora" in name]
    DistributedDataParallel(model)(x).sum().backward()
