"""State dicts of models whose adapters train heads of their own: whichever adapter is active, each gets its own back."""

import copy
import io
import itertools
import pickle

import accelerate
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel

import vblora
from tests.small_models import Net
from tests.workers import run_in_processes
from vblora.distributed import gather_to_cpu
from vblora.model.lookup import attached_adapter

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
CONFIG = {"r": 2, "num_vectors": 16, "vector_length": 8, "target_modules": ["up"], "seed": 3}
HEAD = {"modules_to_save": ["head"]}
HEAD_3 = {"modules_to_save": ["3"]}  # the same in a container
# No adapter, either of two, and one that replaces nothing.
STATES = [[], "default", "b", "c"]


def injected(seed: int, container: bool = False, **of_adapters) -> nn.Module:
    """A model of random tensors, the adapters' and the base model's."""
    torch.manual_seed(seed)
    model = Net(blocks=2)
    if container:
        model = nn.Sequential(model.embed, *model.blocks, model.head)
    for name, fields in (of_adapters or {"default": HEAD, "b": HEAD, "c": {}}).items():
        vblora.inject(model, vblora.VBLoRAConfig(**CONFIG | fields), adapter_name=name)
        with torch.no_grad():
            model.get_submodule("head" if not container else "3").weight.normal_()
            for extra in attached_adapter(model, name).extra.values():
                extra.replacement.normal_()
            for parameter in model.parameters():
                parameter.normal_()
    return model


def outputs(model: nn.Module) -> list[torch.Tensor]:
    """Of the model without an adapter, and with each."""
    active, found = vblora.active_adapters(model), []
    for name in [[], *model.vblora]:
        vblora.set_adapter(model, name)
        found.append(model(X).detach())
    vblora.set_adapter(model, active)
    return found


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(outputs(one), outputs(other), strict=True))


@pytest.mark.parametrize("assign", [False, True])
def test_each_gets_its_own_whichever_is_active(assign):
    model, fresh = injected(1), injected(2)
    assert not same(model, fresh)
    for saved, loaded in itertools.product(STATES, STATES):
        other = copy.deepcopy(fresh)
        vblora.set_adapter(model, saved)
        vblora.set_adapter(other, loaded)
        other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
        assert same(model, other) and vblora.active_adapters(other) == ([loaded] if loaded else []), (saved, loaded)


def test_one_of_two_has_a_head():
    model, other = (injected(seed, default={}, b=HEAD) for seed in (1, 2))
    vblora.set_adapter(model, "b")
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert same(model, other)


def test_a_single_adapter_that_is_active_needs_no_further_names():
    model, other = injected(1, default=HEAD), injected(2, default=HEAD)
    assert not any(".extra." in name or ".replaced." in name for name in model.state_dict())
    vblora.set_adapter(model, [])
    other.load_state_dict(model.state_dict())
    assert same(model, other)
    plain = other.state_dict()
    with vblora.disabled(other), pytest.raises(RuntimeError, match=r'Missing key.*"vblora.extra.default.head.weight"'):
        other.load_state_dict(plain)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_read_and_write_their_own(copied):
    model, other = injected(1), injected(2)
    again = copied(other)
    again.load_state_dict(model.state_dict())
    assert same(again, model) and not same(other, model)
    other.load_state_dict(again.state_dict())
    assert same(other, model)


def test_within_a_container_and_another_model():
    model, other = (nn.ModuleDict({"net": injected(seed, container=True, default={}, b=HEAD_3)}) for seed in (1, 2))
    assert "net.0.vblora.extra.b.3.weight" in model.state_dict()
    other.load_state_dict(model.state_dict())
    assert same(model.net, other.net)
    vblora.eject(other.net)
    assert not any("vblora" in name for name in other.state_dict())


def test_what_is_missing_unexpected_or_of_another_size_is_named():
    model = injected(1)
    state = model.state_dict()
    del state["vblora.extra.b.head.bias"]
    state["vblora.extra.a.head.bias"] = torch.zeros(3)
    with pytest.raises(
        RuntimeError,
        match=r'(?s)Missing key.*: "vblora.extra.b.head.bias"\. .*Unexpected key.*: "vblora.extra.a.head.bias"',
    ):
        model.load_state_dict(state)
    state = model.state_dict() | {"vblora.extra.b.head.bias": torch.zeros(4)}
    with pytest.raises(RuntimeError, match=r"size mismatch for vblora.extra.b.head.bias: .*\(4,\).*\(3,\)"):
        model.load_state_dict(state)
    for name in ("extra", "replaced"):
        with pytest.raises(ValueError, match="nor 'extra' or 'replaced'"):
            vblora.inject(model, vblora.VBLoRAConfig(**CONFIG), adapter_name=name)


def test_a_head_that_its_dict_lacks_does_not_become_anothers():
    model, other = injected(1), injected(2)
    vblora.set_adapter(model, "b")
    state = {name: value for name, value in model.state_dict().items() if ".extra.default." not in name}
    head = other.head.weight.clone()
    assert set(other.load_state_dict(state, strict=False).missing_keys) == {
        "vblora.extra.default.head.weight",
        "vblora.extra.default.head.bias",
    }
    assert torch.equal(other.head.weight, head)


def test_tied_tensors_stay_tied():
    config = vblora.VBLoRAConfig(**CONFIG | {"vector_length": 3}, modules_to_save=["head", "embed"])

    def tied(seed):
        torch.manual_seed(seed)
        net = Net(width=3, blocks=1)  # whose head and embedding have the same size
        net.head.weight = net.embed.weight
        vblora.inject(net, config)
        return vblora.inject(net, config, adapter_name="b")

    model, other = tied(1), tied(2)
    vblora.set_adapter(model, "b")
    other.load_state_dict(model.state_dict(), assign=True)
    vblora.set_adapter(other, "b")
    assert other.head.weight is other.embed.weight and torch.equal(other.head.weight, model.head.weight)


def test_the_state_dict_of_the_adapters_alone():
    model, other = injected(1), injected(2)
    vblora.set_adapter(model, "b")
    part = vblora.adapter_state_dict(model)
    assert set(part) == {
        name for name in model.state_dict() if name.startswith(("vblora.default.", "vblora.b.", "vblora.c."))
    } | {f"vblora.extra.{name}.head.{own}" for name in ("default", "b") for own in ("weight", "bias")}
    report = other.load_state_dict(part, strict=False)
    assert not report.unexpected_keys
    assert set(part).isdisjoint(report.missing_keys)
    for name in ("default", "b"):
        vblora.set_adapter(model, name)
        vblora.set_adapter(other, name)
        assert torch.equal(model.head.weight, other.head.weight) and torch.equal(model.head.bias, other.head.bias)


def test_a_merged_model_is_written_without_them():
    model = vblora.merge(injected(1).eval())
    state = vblora.model.whole._with_base_names(model, model.state_dict())
    expected = model(X)
    plain = Net(blocks=2)
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(X), expected)


def test_an_update_that_is_merged_into_a_head_is_no_part_of_the_head(tmp_path):
    adapters = {"default": HEAD, "b": {"target_modules": ["head"], "pad": True}}  # one trains the head, one adapts it
    model, other = (injected(seed, **adapters) for seed in (1, 2))
    vblora.set_adapter(model, ["default", "b"])
    head = model.head.weight.detach().clone()
    vblora.merge(model, "b")
    assert not torch.equal(model.head.weight, head)
    assert torch.equal(vblora.adapter_state_dict(model)["vblora.extra.default.head.weight"], head)
    vblora.save(model, tmp_path, adapter_name="default")
    vblora.load(other, tmp_path, adapter_name="default")
    vblora.set_adapter(other, "default")
    assert torch.equal(other.head.weight, head)

    other = injected(2, **adapters)
    vblora.set_adapter(other, ["default", "b"])
    vblora.merge(other, "b")
    other.load_state_dict(model.state_dict())
    assert same(vblora.unmerge(model), vblora.unmerge(other))


def test_with_accelerate(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    model, other = injected(1), injected(2)
    vblora.set_adapter(model, "b")
    accelerator.prepare(model)
    accelerator.save_state(tmp_path)
    accelerator.free_memory()
    accelerator.prepare(other)
    accelerator.load_state(tmp_path)
    assert same(model, other)


def test_an_average_takes_no_other_adapters_head():
    model = injected(1)
    average = AveragedModel(model)
    average.update_parameters(model)
    vblora.set_adapter(model, "b")
    with pytest.raises(
        ValueError, match=r"`head.weight` is adapter 'b''s in `model`, but adapter 'default''s in the average"
    ):
        average.update_parameters(model)
    vblora.set_adapter(average.module, "b")
    average.update_parameters(model)
    assert torch.equal(average.module.head.weight, model.head.weight) and int(average.n_averaged) == 2
    other = AveragedModel(injected(2))
    other.load_state_dict(average.state_dict())
    assert same(other.module, model)


def _through_fsdp2() -> bool:
    """Whether a sharded model gets another's tensors by the functions of torch.distributed.checkpoint."""
    return all(map(_through_fsdp2_as, (False, True)))


def _through_fsdp2_as(full: bool) -> bool:
    model, other = injected(1), injected(2)
    expected = model(X)
    fully_shard(model)
    fully_shard(other)
    options = StateDictOptions(full_state_dict=full)
    set_model_state_dict(other, get_model_state_dict(model, options=options), options=options)
    ours, theirs = (
        {name: gather_to_cpu(value) for name, value in each.state_dict().items() if ".extra." in name}
        for each in (model, other)
    )
    equal = [torch.equal(value, theirs[name]) for name, value in ours.items()]
    return len(equal) == 4 and all(equal) and torch.allclose(other(X), expected)


def test_sharded_by_fsdp2(tmp_path):
    assert run_in_processes(_through_fsdp2, tmp_path) == [True, True]


def test_torch_distributed_checkpoint(tmp_path):
    model, other = injected(1), injected(2)
    vblora.set_adapter(model, "b")
    torch.distributed.checkpoint.save(get_model_state_dict(model), checkpoint_id=tmp_path, no_dist=True)
    state = get_model_state_dict(other)
    torch.distributed.checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(other, state)
    assert same(model, other)


def test_through_a_file():
    model, other = injected(1), injected(2)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same(model, other)
