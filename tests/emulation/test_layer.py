"""The execution layer itself: built-in functions, thread orders, kernels that hang, the log of launches."""

from __future__ import annotations

import contextlib
import subprocess

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vblora

from . import build


@pytest.mark.parametrize("switch", ["assembly", "ucontext"])
def test_built_in_functions(switch):
    process = subprocess.run([build.build(f"layer_{switch}")], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert not process.stdout


def call_everything(rows: int, columns: int, length: int, k: int, candidates: bool, order: str, seed: int = 0):
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, columns, generator=generator)
    bank = torch.randn(columns, length, generator=generator)
    grad = torch.randn(rows, length, generator=generator)
    chosen = (
        torch.randint(-1, columns + 1, (rows, columns), generator=generator, dtype=torch.int16) if candidates else None
    )
    ops = torch.ops.vblora_emulated
    with build.thread_order(order, seed):
        subvectors, indices, weights = ops.admixture(logits, bank, chosen, k)
        grads = ops.admixture_backward(grad, None, indices, weights, bank, chosen, columns, True, True)
        return subvectors, indices, weights, *grads, ops.compose(bank, indices, weights)


@pytest.mark.parametrize("candidates", [False, True])
@pytest.mark.parametrize("size", [(33, 17, 8, 2), (257, 300, 64, 5), (9, 2048, 17, 1), (40, 128, 256, 33)], ids=str)
def test_order_of_threads_does_not_matter(size, candidates):
    build.load_operators()
    expected = call_everything(*size, candidates, "ascending")
    for order, seed in (("descending", 0), ("random", 1), ("random", 2)):
        for found, wanted in zip(call_everything(*size, candidates, order, seed), expected, strict=True):
            assert torch.equal(found, wanted)


def test_launches_are_counted():
    build.load_operators()
    build.launches()
    call_everything(100, 128, 64, 2, True, "ascending")
    names = [launch.kernel for launch in build.launches()]
    assert all(name.startswith("vblora::cuda::") for name in names)
    assert sum("admixture" in name for name in names) == 1
    assert sum("backward" in name for name in names) <= 3
    assert sum("compose" in name for name in names) == 1
    assert build.launches() == []


class Calls(TorchDispatchMode):
    """The operators that would launch something: not views, and not allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "empty" not in function._schema.name:
            self.names.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", [1, 5])
def test_a_training_step_launches_the_same_few_kernels_for_any_number_of_layers(layers):
    """... and nothing of torch's beside them: no concatenation of gradients, no comparison for exhausted rows."""
    net = nn.Sequential(*(nn.Linear(32, 32) for _ in range(layers)))
    config = vblora.VBLoRAConfig(r=2, num_vectors=64, vector_length=8, num_candidates=16, target_modules="all-linear")
    adapter = vblora.inject(net, config).vblora.default
    nn.init.normal_(adapter.bank.vectors)
    with torch.no_grad():
        adapter.logits[:3, -1] = adapter.logits.max() + 1  # exhausted
    grads = []
    for emulated in (False, True):
        adapter.exhausted.zero_()
        with build.in_place_of_the_cpu_kernels() if emulated else contextlib.nullcontext():
            build.launches()
            with Calls() as calls:
                factors = [factor for pair in adapter.compose(torch.float32) for factor in pair[:2]]
                forward, ones = len(build.launches()), [torch.ones_like(factor) for factor in factors]
                torch.autograd.backward(factors, ones)
            backward = len(build.launches())
        assert adapter.exhausted.sum() == adapter.exhausted[:3].sum() == 3
        grads.append([parameter.grad for parameter in adapter.parameters()])
        adapter.zero_grad()
    assert (forward, backward) == (1, 3 if layers == 5 else 2)
    assert [name for name in calls.names if name not in ("ones_like", "detach")] == [
        "admixture_parts",
        "admixture_backward_parts",
    ]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            35,
            ["The NVIDIA driver supports CUDA 12.8, but vblora was built with CUDA 13.", "at most 12.8: set CUDA_HOME"],
        ),
        (222, ["The NVIDIA driver supports CUDA 12.8, but vblora was built with CUDA 13.", "Update the driver"]),
        (209, ["vblora was not built for this GPU", "Set TORCH_CUDA_ARCH_LIST"]),
        (710, ["A kernel launched earlier is at fault", "CUDA_LAUNCH_BLOCKING=1"]),  # a device-side assertion
        (9, []),  # an invalid configuration has another cause
    ],
)
def test_a_launch_that_fails_says_what_to_do(error, said):
    build.load_operators()
    build.fail_next_launch(error, driver=12080)
    with pytest.raises(RuntimeError, match=r"vblora: CUDA could not launch .*admixture_kernel") as refusal:
        call_everything(3, 4, 8, 2, False, "ascending")
    message = str(refusal.value)
    assert all(part in message for part in said)
    assert said or "build" not in message
    call_everything(3, 4, 8, 2, False, "ascending")  # the next launch is no failure


def test_a_failure_names_the_kernel_and_the_thread():
    process = subprocess.run(
        [build.build("faults_asan"), "shuffle_before_barrier_under_divergence"], capture_output=True, text=True
    )
    assert "shuffle_before_barrier_under_divergence, block (0, 0, 0), thread (" in process.stderr
    assert (
        "deadlock: 32 threads wait at __syncthreads; lanes 0x0000ffff of warp 0 wait for all of mask 0xffffffff"
        in process.stderr
    )
