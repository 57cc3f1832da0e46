"""The memory of large CPU outputs is reused, but never while a tensor uses it, and freed by empty_cache."""

import pytest
import torch

import vblora

pytestmark = pytest.mark.backends("cpu")

ROWS, LENGTH, K = 1024, 256, 2  # 1 MiB of sub-vectors: the least that is kept
SIZES = [ROWS // 2, ROWS // 2]


def compose(bank: torch.Tensor) -> torch.Tensor:
    indices = torch.arange(ROWS * K, dtype=torch.int32).view(ROWS, K) % len(bank)
    return torch.ops.vblora.compose(bank, indices, torch.full((ROWS, K), 0.5))


def in_parts(bank: torch.Tensor) -> list[torch.Tensor]:
    logits = torch.zeros(ROWS, len(bank))
    return torch.ops.vblora.admixture_parts(logits, bank, None, None, K, None, SIZES, 2)[0]


@pytest.fixture(autouse=True)
def nothing_kept():
    vblora.empty_cache()
    yield
    vblora.empty_cache()


def test_memory_is_used_again():
    bank = torch.randn(8, LENGTH)
    first = compose(bank)
    address = first.data_ptr()
    del first
    assert compose(bank).data_ptr() == address


def test_two_at_once_have_memory_of_their_own():
    bank = torch.randn(8, LENGTH)
    compose(bank)  # leaves a block for one of them
    outputs = [compose(bank + i) for i in range(3)]
    assert len({output.data_ptr() for output in outputs}) == 3


@pytest.mark.parametrize("hold", [lambda x: x, lambda x: x[5:9], lambda x: x.detach(), lambda x: x.numpy()])
def test_not_while_something_has_it(hold):
    bank = torch.randn(8, LENGTH)
    first = compose(bank)
    held, copy = hold(first), torch.as_tensor(hold(first)).clone()
    del first
    others = [compose(bank + i) for i in (1, 2)]
    assert torch.equal(torch.as_tensor(held), copy)
    assert torch.equal(others[0], compose(bank + 1)) and torch.equal(others[1], compose(bank + 2))


def test_one_part_keeps_the_memory_of_all():
    bank = torch.randn(8, LENGTH)
    parts = in_parts(bank)
    assert parts[0].data_ptr() + parts[0].nbytes == parts[1].data_ptr()
    address, copy = parts[0].data_ptr(), parts[1].clone()
    del parts[0]
    assert not torch.equal(in_parts(bank + 1)[1], copy) and torch.equal(parts[0], copy)
    parts.clear()
    assert any(in_parts(bank)[0].data_ptr() == address for _ in range(2))


def test_another_size_takes_other_memory():
    bank = torch.randn(8, LENGTH)
    first = compose(bank)
    address = first.data_ptr()
    del first
    assert (
        torch.ops.vblora.compose(bank, torch.zeros(2 * ROWS, K, dtype=torch.int32), torch.ones(2 * ROWS, K)).data_ptr()
        != address
    )
    assert compose(bank).data_ptr() == address


def held_by_torch(function) -> int:
    """Bytes that torch's allocator has handed out while ``function`` ran and not got back."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    return sum(e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")


def test_as_much_is_kept_as_was_in_use_and_no_more_than_eight():
    bank = torch.randn(8, LENGTH)
    size = ROWS * LENGTH * 4
    assert size <= held_by_torch(lambda: [compose(bank) for _ in range(5)]) < 1.1 * size * 5
    assert held_by_torch(lambda: compose(bank)) < size
    vblora.empty_cache()

    def twelve():
        outputs = [compose(bank) for _ in range(12)]
        del outputs

    assert 8 * size <= held_by_torch(twelve) < 8.5 * size
    assert held_by_torch(vblora.empty_cache) <= -8 * size


def test_inference_mode_leaves_no_inference_tensors_behind():
    bank = torch.randn(8, LENGTH)
    with torch.inference_mode():
        address = compose(bank).data_ptr()
    again = compose(bank)
    assert again.data_ptr() == address and not again.is_inference()
    again.add_(1)


def test_gradients_of_two_steps_do_not_share():
    bank = torch.randn(2048, LENGTH, requires_grad=True)
    logits = torch.randn(ROWS, 2048).requires_grad_()
    grads = []
    for _ in range(2):
        subvectors, *_ = torch.ops.vblora.admixture(logits, bank, None, K)
        grads.append(torch.autograd.grad(subvectors.square().sum(), (logits, bank)))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()
