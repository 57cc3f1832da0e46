"""Two processes train VeRA, Tied-LoRA and LoRA like one process on the whole batch; what they save loads anywhere."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import vblora
from tests.test_distributed import ROUNDING, STEPS, base, batch, sharded, train
from tests.workers import run_in_processes

OF_ALL = {"r": 4, "target_modules": ["up", "down"], "modules_to_save": ["head"]}
CONFIGS = {
    "lora": vblora.LoraConfig(lora_alpha=6, **OF_ALL),
    "vera": vblora.VeraConfig(projection_prng_key=3, save_projection=False, **OF_ALL),
    "tied_lora": vblora.TiedLoraConfig(**OF_ALL),
}
CASES = [(how, name) for name in CONFIGS for how in ("ddp", "layers", "adapter")]


def injected(name):
    model = base()
    torch.manual_seed(1)  # LoRA's factors come from torch's generator
    return vblora.inject(model, CONFIGS[name])


def optimizer_of(model):
    return torch.optim.SGD(vblora.parameter_groups(model, lr_factors=0.1, lr_vectors=0.1, lr_other=0.1), momentum=0.9)


def train_each(cases, folder):
    results = []
    for number, (how, name) in enumerate(cases):
        model = injected(name)
        model = DistributedDataParallel(model) if how == "ddp" else sharded(model, how)
        optimizer = optimizer_of(model)
        losses, gradients = train(model, optimizer)
        if how != "ddp" or torch.distributed.get_rank() == 0:
            vblora.save(model, folder / str(number))
        with torch.no_grad():
            results.append((losses, gradients, model(batch(9)[0])))
    return results


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    returned = run_in_processes(train_each, tmp_path, CASES, tmp_path)
    for number, (how, name) in enumerate(CASES):
        model = injected(name)
        losses, gradients = train(model, optimizer_of(model))
        assert len(set(losses)) == STEPS
        with torch.no_grad():
            outputs = model(batch(9)[0])
        for theirs in (process[number] for process in returned):
            torch.testing.assert_close(theirs[0], losses, **ROUNDING, msg=f"{how} {name}")
            for ours, other in zip(gradients, theirs[1], strict=True):
                torch.testing.assert_close(other, ours, **ROUNDING)
            torch.testing.assert_close(theirs[2], outputs, **ROUNDING)
        fresh = vblora.load(base(), tmp_path / str(number))
        torch.testing.assert_close(fresh(batch(9)[0]), outputs, **ROUNDING)
