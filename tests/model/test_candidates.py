"""Training with candidates equals dense training, step for step and bit for bit, while no row is exhausted."""

import itertools
import subprocess
import sys
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

import vblora
from tests.sentences import batches, encoder
from vblora.adapters import Target, VBLoRAAdapter
from vblora.model.candidates import moves_untouched

CONFIG = {
    "r": 4,
    "vector_length": 64,
    "target_modules": ["query", "value"],
    "modules_to_save": ["classifier"],
    "seed": 5,
}


pytestmark = pytest.mark.usefixtures("device", "one_thread")


class Lion(torch.optim.Optimizer):
    """Chen et al., arXiv 2302.06675, algorithm 2."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - lr * group["weight_decay"]).sub_((beta1 * m + (1 - beta1) * p.grad).sign(), alpha=lr)
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


class Run:
    """A model in training."""

    def __init__(self, num_candidates, make_optimizer, *, num_vectors=1024, decay=0.0, accumulate=1, scheduled=False):
        config = vblora.VBLoRAConfig(**CONFIG, num_vectors=num_vectors, num_candidates=num_candidates)
        model = encoder()
        torch.manual_seed(1)  # for the bank
        self.model = vblora.inject(model, config).train()
        groups = vblora.parameter_groups(self.model)
        for group in groups:
            group["weight_decay"] = decay
        self.optimizer = make_optimizer(groups)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 / (1 + step / 50)) if scheduled else None
        self.accumulate = accumulate
        self.batches = itertools.cycle(batches())
        self.losses, self.exhausted = [], []

    @property
    def adapter(self):
        return self.model.vblora.default

    def train(self, steps):
        for _ in range(steps):
            for _ in range(self.accumulate):
                loss = self.model(**next(self.batches)).loss
                loss.backward()
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())
            self.exhausted.append(vblora.stats(self.model).exhausted)
        return self


SGD_LR = {"bank": 0.1, "logits": 3e3, "other": 0.1}
# So few steps that rows use at most two thirds of 128 candidates: none is exhausted with another machine's rounding either.
OPTIMIZERS = {
    "AdamW": (lambda groups: torch.optim.AdamW(groups), {}, 100),
    "AdamW, accumulated, scheduled": (
        lambda groups: torch.optim.AdamW(groups),
        {"accumulate": 2, "scheduled": True},
        50,
    ),
    "AdamW, decayed": (lambda groups: torch.optim.AdamW(groups), {"decay": 0.1}, 75),
    "AdamW, amsgrad": (lambda groups: torch.optim.AdamW(groups, amsgrad=True), {}, 50),
    "SGD with momentum": (
        lambda groups: torch.optim.SGD([g | {"lr": SGD_LR[g["name"]]} for g in groups], momentum=0.9),
        {},
        100,
    ),
    "Lion": (lambda groups: Lion([g | {"lr": 0.1 * g["lr"]} for g in groups]), {"decay": 0.1}, 50),
}


def selected(adapter):
    """For each row, how far down its initial order training has selected."""
    initial = adapter.initial()
    touched = initial.logits != adapter.logits.detach()
    return (touched * torch.arange(1, touched.shape[1] + 1)).amax(1)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_is_dense_training_to_the_bit(name):
    make, options, steps = OPTIMIZERS[name]
    dense = Run(None, make, **options).train(steps)
    few = Run(128, make, **options).train(steps)
    assert few.adapter.logits.shape[1] == 128 < dense.adapter.logits.shape[1] == 1024
    assert few.exhausted[-1] == 0
    assert few.losses == dense.losses
    assert few.losses[0] != few.losses[-1]
    assert torch.equal(few.adapter.bank.vectors, dense.adapter.bank.vectors)
    assert torch.equal(few.adapter.logits, dense.adapter.logits.gather(1, few.adapter.candidates.long()))
    if not options.get("decay"):
        assert selected(few.adapter).max() > 2 * few.adapter.topk  # rows did change their selection
    chosen = torch.zeros_like(dense.adapter.logits, dtype=torch.bool).scatter_(1, few.adapter.candidates.long(), True)
    moved = (dense.adapter.logits != dense.adapter.initial().logits) & ~chosen
    assert not moved.any() or options.get("decay")


@pytest.mark.slow
def test_the_count_rises_before_the_equality_breaks():
    make = OPTIMIZERS["AdamW"][0]
    dense = Run(None, make).train(60)
    for num_candidates in (3, 4, 6):
        few = Run(num_candidates, make).train(60)
        broken = [step for step in range(60) if few.losses[step] != dense.losses[step]]
        counted = [step for step in range(60) if few.exhausted[step]]
        assert counted, num_candidates
        if broken:
            assert counted[0] <= broken[0]
        assert few.exhausted == sorted(few.exhausted)  # rows stay exhausted
        if num_candidates == 3:
            assert broken  # this test would notice


@pytest.mark.slow
def test_gradient_clipping_and_fused_steps_are_equal_to_rounding():
    def clipped(groups):
        optimizer = torch.optim.AdamW(groups, fused=True)
        parameters = [p for group in groups for p in group["params"]]
        optimizer.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(parameters, 0.1) and None)
        return optimizer

    dense, few = (Run(m, clipped).train(30) for m in (None, 96))
    assert few.exhausted[-1] == 0
    torch.testing.assert_close(torch.tensor(few.losses), torch.tensor(dense.losses), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW", "AdamW, amsgrad", "SGD with momentum"])
def test_growing_goes_on_as_if_there_had_been_more_from_the_start(name):
    make, options, _ = OPTIMIZERS[name]
    from_start = Run(96, make, **options).train(40)
    grown = Run(48, make, **options).train(20)
    assert grown.exhausted[-1] == 0
    parameter = grown.adapter.logits
    vblora.grow(grown.model, 96, grown.optimizer)
    assert grown.adapter.logits is parameter
    grown.train(20)
    assert grown.losses == from_start.losses
    for ours, theirs in zip(grown.adapter.rows, from_start.adapter.rows, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    states = [run.optimizer.state[run.adapter.logits] for run in (grown, from_start)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(torch.as_tensor(states[0][n]), torch.as_tensor(states[1][n])) for n in states[0])


def small(num_vectors=40, num_candidates=8, seed=3, **choice):
    layer = vblora.VBLinear(
        16, 16, r=2, vector_length=8, num_vectors=num_vectors, num_candidates=num_candidates, seed=seed, **choice
    )
    torch.nn.init.normal_(
        layer.adapter.bank.vectors, generator=torch.Generator(layer.adapter.bank.vectors.device).manual_seed(0)
    )
    return layer


def test_growing_with_a_gradient_under_way():
    layer = small()
    layer(torch.ones(1, 16)).sum().backward()
    before = layer.adapter.logits.grad.clone()
    vblora.grow(layer, 20)
    assert torch.equal(layer.adapter.logits.grad, torch.nn.functional.pad(before, (0, 12)))
    layer(torch.ones(1, 16)).sum().backward()
    assert torch.equal(layer.adapter.logits.grad[:, :8], 2 * before)


def test_growing_in_a_loop_that_keeps_its_loss():
    """The graph's node for the logits would refuse their next gradient, whose size differs."""
    layer = vblora.VBLinear(16, 16, num_candidates=6, seed=1)
    optimizer = torch.optim.AdamW(vblora.parameter_groups(layer))
    loss = None
    for step in range(3):
        if step == 1:
            with pytest.raises(ValueError, match="del loss"):
                vblora.grow(layer, 12, optimizer)
            assert layer.adapter.logits.shape[1] == 6
            loss = None
            vblora.grow(layer, 12, optimizer)
        loss = layer(torch.randn(3, 16)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert layer.adapter.logits.grad.shape[1] == 12


def test_growing_extends_the_optimizers_state_or_is_refused():
    layer = small()
    optimizer = torch.optim.Rprop(vblora.parameter_groups(layer, lr_logits=0.25))
    layer(torch.ones(1, 16)).sum().backward()
    optimizer.step()
    state = optimizer.state[layer.adapter.logits]
    state["average"] = layer.adapter.logits.detach().clone()  # as some optimizers keep one
    with pytest.raises(ValueError, match="state `average` differs between logits that were never selected"):
        vblora.grow(layer, 20, optimizer)
    assert layer.adapter.logits.shape[1] == state["step_size"].shape[1] == 8
    del state["average"]
    vblora.grow(layer, 20, optimizer)
    assert state["step_size"].shape[1] == 20 and state["step_size"][:, 8:].eq(0.25).all()
    assert state["prev"].shape[1] == 20 and not state["prev"][:, 8:].any()


def test_growing_to_all_is_dense():
    layer, dense = small(), small(num_candidates=None)
    vblora.grow(layer, 40)
    for ours, theirs in zip(layer.adapter.compose(torch.float32), dense.adapter.compose(torch.float32), strict=True):
        assert torch.equal(ours.A, theirs.A) and torch.equal(ours.B, theirs.B)
    assert torch.equal(layer.adapter.logits, dense.adapter.logits.gather(1, layer.adapter.candidates.long()))
    assert torch.equal(layer.adapter.initial().logits, layer.adapter.logits)


@pytest.mark.parametrize(
    ("spoil", "num_candidates", "message"),
    [
        (lambda a: None, 8, "`num_candidates` is 8.*above the current 8"),
        (lambda a: None, 41, "`num_candidates` is 41.*at most `num_vectors`, 40"),
        (lambda a: setattr(a, "seed", None), 16, "no seed"),
        (lambda a: setattr(a, "seed", 4), 16, "not those that its seed draws"),
    ],
)
def test_growing_is_refused(spoil, num_candidates, message):
    layer = small()
    spoil(layer.adapter)
    before = layer.adapter.logits.detach().clone()
    with pytest.raises(ValueError, match=message):
        vblora.grow(layer, num_candidates)
    assert torch.equal(layer.adapter.logits, before)


def test_growing_a_dense_adapter_is_refused():
    with pytest.raises(ValueError, match="no candidates"):
        vblora.grow(small(num_candidates=None), 41)


def test_as_many_candidates_as_vectors_is_dense():
    for num_candidates in (None, 40, 41, 128):
        adapter = small(num_candidates=num_candidates).adapter
        assert adapter.candidates is None and adapter.exhausted is None and adapter.logits.shape[1] == 40


def test_a_seed_is_a_start():
    ours, theirs, other = small().adapter, small().adapter, small(seed=4).adapter
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.candidates, theirs.candidates)
    assert not torch.equal(ours.logits, other.logits)
    torch.manual_seed(0)
    one = small(seed=None).adapter
    two = small(seed=None).adapter
    torch.manual_seed(0)
    three = small(seed=None).adapter
    assert one.seed == three.seed != two.seed


def test_the_initial_logits_are_normal_of_the_given_deviation():
    adapter = small(num_vectors=4000, num_candidates=None, init_logits_std=0.3).adapter
    assert abs(adapter.logits.std().item() / 0.3 - 1) < 0.02
    sorted_rows, candidates = adapter.initial(50)[:2]
    assert torch.equal(sorted_rows, adapter.logits.topk(50).values)
    assert torch.equal(adapter.logits.gather(1, candidates.long()), sorted_rows)


def test_only_training_exhausts():
    layer = small()
    with torch.no_grad():
        layer.adapter.logits[0] = 0.0  # all equal: the selected ones are no larger than the last candidate
        layer(torch.ones(1, 16))
    assert not layer.adapter.exhausted.any()
    layer(torch.ones(1, 16))
    assert layer.adapter.exhausted.tolist() == [True] + [False] * 7
    assert vblora.stats(layer) == (8, 40, 8, 1)
    with torch.no_grad():
        layer.adapter.logits[0, 0] = layer.adapter.logits[0, 1] = 5.0
    layer(torch.ones(1, 16))
    assert vblora.stats(layer).exhausted == 1
    layer.adapter.reset_parameters()
    assert vblora.stats(layer).exhausted == 0
    assert torch.equal(layer.adapter.logits, small().adapter.logits)
    with pytest.warns(vblora.VBLoRAWarning, match="`topk` is 1"):
        one = small(topk=1, num_candidates=1)
    one(torch.ones(1, 16))
    assert vblora.stats(one).exhausted == 0  # its logits never train


def test_a_compiled_step_counts_too():
    torch._dynamo.reset()
    layer = small()
    with torch.no_grad():
        layer.adapter.logits[0] = 0.0
    torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.ones(1, 16)).sum().backward()
    assert vblora.stats(layer).exhausted == 1


def test_a_state_dict_brings_the_seed_along():
    ours, theirs = small(seed=1), small(seed=2)
    theirs.load_state_dict(ours.state_dict())
    assert theirs.adapter.seed == 1
    vblora.grow(theirs, 12)
    assert torch.equal(theirs.adapter.candidates, ours.adapter.initial(12).candidates)


def test_a_model_made_on_the_meta_device_can_be_started_later():
    with torch.device("meta"):
        layer = vblora.VBLinear(16, 16, r=2, vector_length=8, num_vectors=40, num_candidates=8, seed=3)
    layer.to_empty(device="cpu")
    layer.adapter.reset_parameters()
    assert torch.equal(layer.adapter.logits, small().adapter.logits)
    assert torch.equal(layer.adapter.candidates, small().adapter.candidates)


MEMORY = """
import resource, torch, vblora
from vblora.adapters import Target, VBLoRAAdapter
targets = [Target(f"{i}.{name}", *widths) for i in range(32) for name, widths in
           {**dict.fromkeys("qkvo", (4096, 4096)), **dict.fromkeys("gu", (4096, 11008)), "d": (11008, 4096)}.items()]
bank = vblora.VectorBank(2048, 256)
VBLoRAAdapter(targets[:1], bank)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
adapter = VBLoRAAdapter(targets, bank, seed=0)
assert adapter.logits.shape == (39_040, 128), adapter.logits.shape
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB there")
def test_llamas_layout_starts_within_200_mib():
    printed = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout
    assert int(printed) < 200 * 1024  # dense logits alone would be 305 MiB


# Optimizers


def parameters_of(layer):
    return [layer.adapter.logits]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: torch.optim.AdamW(p, weight_decay=0.1), None),
        (lambda p: torch.optim.SGD(p, momentum=0.9, weight_decay=0.1), None),
        (lambda p: torch.optim.Adam(p), None),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "Adam adds `weight_decay`=0.1"),
        (lambda p: torch.optim.NAdam(p, weight_decay=0.1), "NAdam adds"),
        (lambda p: torch.optim.NAdam(p, weight_decay=0.1, decoupled_weight_decay=True), None),
        (lambda p: torch.optim.RMSprop(p, weight_decay=0.1), "RMSprop adds"),
        (lambda p: torch.optim.Adafactor(p), "Adafactor scales"),
        (lambda p: Lion(p, weight_decay=0.1), None),
    ],
)
def test_optimizers_that_move_what_was_never_selected_are_known(make, reason):
    layer = small()
    optimizer = make(parameters_of(layer))
    found = moves_untouched(layer, optimizer)
    assert found is None if reason is None else reason in found
    # ... and it is true: untouched logits keep their values, or all logits of a row scale by the same factor. (Under Adafactor,
    # the touched logits differ.)
    for _ in range(5):
        layer(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = layer.adapter.logits.detach()[:, -3:].double()
    factors = after / layer.adapter.initial().logits[:, -3:].double()
    alike = (factors - factors.mean(1, keepdim=True)).abs().max() < 1e-5
    assert alike == (reason is None or found.startswith("Adafactor"))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["coupled", "decoupled"])
def test_the_trainer_is_told(optimizer, tmp_path):
    from transformers import Trainer, TrainingArguments

    from vblora.integrations.transformers import VBLoRACallback

    run = Run(2, lambda g: torch.optim.Adam(g) if optimizer == "coupled" else torch.optim.AdamW(g), decay=0.1)
    settings = TrainingArguments(
        tmp_path, max_steps=12, logging_steps=4, report_to="none", save_strategy="no", use_cpu=True
    )
    rows = [{n: t[i] for n, t in batch.items()} for batch in batches() for i in range(4)]
    trainer = Trainer(
        run.model, settings, train_dataset=rows, optimizers=(run.optimizer, None), callbacks=[VBLoRACallback()]
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    messages = [str(w.message) for w in caught if "candidates" in str(w.message)]
    coupled = [m for m in messages if "Adam adds `weight_decay`=0.1" in m]
    exhausted = [m for m in messages if "sub-vectors have used up their 2 candidates" in m and "num_candidates=4" in m]
    assert len(coupled) == (optimizer == "coupled")
    assert len(exhausted) == 1


def test_candidates_of_targets_are_rows_of_one_draw():
    # A layer's rows do not depend on the layers after it.
    bank = vblora.VectorBank(40, 8)
    one = VBLoRAAdapter([Target("a", 16, 8)], bank, num_candidates=8, seed=1)
    two = VBLoRAAdapter([Target("a", 16, 8), Target("b", 8, 8)], bank, num_candidates=8, seed=1)
    assert torch.equal(one.logits, two.logits[: one.num_subvectors])
