"""The same binary under every torch: `make test-torches` runs this file under the oldest supported torch and the newest.

It needs torch and pytest alone. VBLORA_SITE names the folder that must hold the vblora that is imported: the one copy that
all runs share.
"""

import hashlib
import os
from pathlib import Path

import pytest
import torch

import vblora
from vblora import reference
from vblora.native import LIBRARY


def test_it_is_the_shared_binary(capsys):
    binary = LIBRARY
    if site := os.environ.get("VBLORA_SITE"):
        assert binary.is_relative_to(Path(site).resolve())
    digest = hashlib.sha256(binary.read_bytes()).hexdigest()
    info = vblora.build_info()
    with capsys.disabled():
        print(
            f"\nvblora {info['version']}, {digest[:16]}, built with torch {info['built_with_torch']} (CUDA {info['cuda']}),"
            f" runs under torch {torch.__version__} (CUDA {torch.version.cuda or 'none'})"
        )


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator)
    bank = torch.randn(9, 16, generator=generator)
    candidates = torch.stack([torch.randperm(9, generator=generator)[:5] for _ in range(6)]).to(torch.int32)
    return logits.requires_grad_(), bank.requires_grad_(), candidates


def test_forward_and_backward(problem):
    logits, bank, candidates = problem
    results = {}
    for name, admixture in {"native": torch.ops.vblora.admixture, "reference": reference.admixture}.items():
        subvectors, indices, weights = admixture(logits, bank, candidates, 2)
        loss = subvectors.square().sum() + weights[:, 0].sum()
        results[name] = (subvectors, indices, weights, *torch.autograd.grad(loss, (logits, bank)))
    torch.testing.assert_close(results["native"], results["reference"])


def test_admixture_backward(problem):
    logits, bank, candidates = problem
    subvectors, indices, weights = torch.ops.vblora.admixture(logits, bank, candidates, 3)
    subvectors.sum().backward()
    gradients = torch.ops.vblora.admixture_backward(
        torch.ones_like(subvectors), None, indices, weights.detach(), bank.detach(), candidates, 5, True, True
    )
    torch.testing.assert_close(gradients, (logits.grad, bank.grad))


def test_compose(problem):
    logits, bank, candidates = (tensor.detach() for tensor in problem)
    subvectors, indices, weights = torch.ops.vblora.admixture(logits, bank, candidates, 2)
    vectors = candidates.gather(1, indices.long())
    torch.testing.assert_close(torch.ops.vblora.compose(bank, vectors, weights), subvectors)
    torch.testing.assert_close(reference.compose(bank, vectors, weights), subvectors)


def test_draw_logits():
    drawn = {}
    for name, draw in {"native": torch.ops.vblora.draw_logits_, "reference": reference.draw_logits_}.items():
        drawn[name] = torch.empty(6, 20), torch.empty(6, 20, dtype=torch.int16)
        draw(*drawn[name], 500, -7, 0.02)
        assert drawn[name][0]._version == 1
    assert all(map(torch.equal, drawn["native"], drawn["reference"]))


@pytest.mark.parametrize("operator", ["admixture", "admixture_backward", "compose", "draw_logits_", "draw_uniform_"])
def test_a_cuda_build_has_cuda_operators(operator):
    # Under a torch without CUDA, too: it is one binary.
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"vblora::{operator}", "CUDA")
    assert registered == (vblora.build_info()["cuda"] != "none")


def test_a_bad_argument_is_named(problem):
    logits, bank, candidates = problem
    with pytest.raises(Exception, match="`k` is 6"):
        torch.ops.vblora.admixture(logits, bank, candidates, 6)


def test_running_out_of_memory_says_so():
    # In torch's words, which accelerate's find_executable_batch_size looks for; before 2.13, torch keeps them to itself.
    logits, bank = torch.zeros(2**22, 1), torch.zeros(1, 2**22)  # 64 TiB of sub-vectors
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory"):
        torch.ops.vblora.admixture(logits, bank, None, 1)
