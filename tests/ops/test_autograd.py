"""admixture in autograd: correct gradients, only those that are needed, and no second derivatives."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vblora import ops, reference

from .cases import DTYPES, Case, assert_close, assert_same_bits, make_inputs

pytestmark = pytest.mark.backends("cpu", "cuda")  # the emulated operators are kernels only


class Calls(TorchDispatchMode):
    """The operators called, with their arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = [argument.name for argument in func._schema.arguments]
        self.seen.append((func._schema.name, dict(zip(names, args, strict=False)) | (kwargs or {})))
        return func(*args, **(kwargs or {}))

    def of(self, name: str) -> list[dict]:
        return [arguments for called, arguments in self.seen if called == f"vblora::{name}"]


def inputs_and_leaves(backend, generator, case=None):
    case = case or Case(torch.float32, rows=20, columns=30, length=12, k=3)
    inputs = make_inputs(case, generator, backend.device)
    return inputs, inputs.logits.requires_grad_(), inputs.bank.requires_grad_()


@pytest.mark.parametrize(
    "case",
    [
        Case(torch.float64, rows=1, columns=1, length=1, k=1),
        Case(torch.float64, rows=5, columns=7, length=3, k=1),
        Case(torch.float64, rows=5, columns=7, length=4, k=3),
        Case(torch.float64, rows=5, columns=12, length=2, k=11),
        Case(torch.float64, rows=5, columns=7, length=3, k=2, candidates=torch.int16, vectors=3),
        Case(torch.float64, rows=5, columns=7, length=3, k=4, candidates=torch.int32, vectors=9),
    ],
    ids=str,
)
def test_gradcheck(backend, case, generator):
    inputs = make_inputs(case, generator, backend.device)
    # Logits at least 0.3 apart: a finite difference may not change the choice.
    steps = torch.rand(case.rows, case.columns, generator=generator).argsort(1).to(inputs.logits)
    logits, bank = (0.3 * steps).requires_grad_(), inputs.bank.requires_grad_()

    def mix(logits, bank):
        subvectors, _, weights = backend.ops.admixture(logits, bank, inputs.candidates, case.k)
        return subvectors, weights

    assert torch.autograd.gradcheck(mix, (logits, bank))
    assert torch.autograd.gradcheck(lambda logits: mix(logits, bank.detach()), (logits,))
    assert torch.autograd.gradcheck(lambda bank: mix(logits.detach(), bank), (bank,))


@pytest.mark.parametrize("out_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("candidates", [None, torch.int16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_a_loss(backend, dtype, candidates, out_dtype, generator):
    case = Case(dtype, 40, 30, 24, 3, candidates, out_dtype)
    inputs, logits, bank = inputs_and_leaves(backend, generator, case)
    subvectors, _, weights = backend.ops.admixture(logits, bank, inputs.candidates, case.k, case.out_dtype)
    torch.autograd.backward((subvectors, weights), (inputs.grad_subvectors, inputs.grad_weights))

    exact = [x.detach().cpu().double().requires_grad_() for x in (logits, bank)]
    there = None if candidates is None else inputs.candidates.cpu()
    subvectors, _, weights = reference.admixture(*exact, there, case.k)
    torch.autograd.backward(
        (subvectors, weights), (inputs.grad_subvectors.cpu().double(), inputs.grad_weights.cpu().double())
    )
    computed_in = reference.accumulation_dtype(dtype)
    for leaf, want in zip((logits, bank), exact, strict=True):
        assert_close(leaf.grad, want.grad, dtype, computed_in, magnitude=10 * want.grad)


def test_what_is_differentiable(backend, generator):
    _, logits, bank = inputs_and_leaves(backend, generator)
    for left, right in ((logits, bank), (logits.detach(), bank), (logits, bank.detach())):
        subvectors, indices, weights = backend.ops.admixture(left, right, None, 3)
        assert subvectors.requires_grad
        assert weights.requires_grad
        assert not indices.requires_grad
    results = backend.ops.admixture(logits.detach(), bank.detach(), None, 3)
    assert not any(result.requires_grad for result in results)
    with torch.no_grad():
        assert not any(result.requires_grad for result in backend.ops.admixture(logits, bank, None, 3))
    with torch.inference_mode():
        inferred = backend.ops.admixture(logits, bank, None, 3)
    for result, want in zip(inferred, results, strict=True):
        assert_same_bits(result, want)


@pytest.mark.parametrize(("train_logits", "train_bank"), [(True, True), (True, False), (False, True)])
def test_only_what_is_needed_is_computed(backend, train_logits, train_bank, generator):
    inputs, logits, bank = inputs_and_leaves(backend, generator)
    subvectors, _, weights = backend.ops.admixture(logits, bank, None, 3)
    torch.autograd.backward((subvectors, weights), (inputs.grad_subvectors, inputs.grad_weights))
    both = logits.grad, bank.grad

    logits, bank = logits.detach().requires_grad_(train_logits), bank.detach().requires_grad_(train_bank)
    with Calls() as calls:
        subvectors, _, weights = backend.ops.admixture(logits, bank, None, 3)
        torch.autograd.backward(
            (subvectors, weights) if train_logits else (subvectors,),
            (inputs.grad_subvectors, inputs.grad_weights) if train_logits else (inputs.grad_subvectors,),
        )
    (call,) = calls.of("admixture_backward")
    assert (call["need_logits"], call["need_bank"]) == (train_logits, train_bank)
    for leaf, trained, want in zip((logits, bank), (train_logits, train_bank), both, strict=True):
        if trained:
            assert_same_bits(leaf.grad, want)
        else:
            assert leaf.grad is None


def test_gradients_that_are_not_there_are_not_made_up(backend, generator):
    inputs, logits, bank = inputs_and_leaves(backend, generator)
    with Calls() as calls:
        subvectors, _, weights = backend.ops.admixture(logits, bank, None, 3)
        subvectors.backward(inputs.grad_subvectors)
    (call,) = calls.of("admixture_backward")
    assert call["grad_weights"] is None
    assert logits.grad.any()
    assert bank.grad.any()

    logits.grad = bank.grad = None
    with Calls() as calls:
        subvectors, _, weights = backend.ops.admixture(logits, bank, None, 3)
        weights.backward(inputs.grad_weights)
    (call,) = calls.of("admixture_backward")
    assert call["grad_subvectors"] is None
    assert logits.grad.any()
    assert bank.grad is None or not bank.grad.any()


def test_what_is_kept_for_backward(backend, generator):
    # The logits are most of an adapter, and backward needs none of them.
    inputs, logits, bank = inputs_and_leaves(backend, generator, Case(torch.float32, 50, 40, 12, 3, torch.int16))

    def kept(logits, bank):
        shapes = []

        def pack(tensor):
            shapes.append((tuple(tensor.shape), tensor.dtype))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            backend.ops.admixture(logits, bank, inputs.candidates, 3)
        return shapes

    assert ((50, 40), torch.float32) not in kept(logits, bank)
    assert ((50, 40), torch.int16) in kept(logits, bank)  # so the hooks do see what is saved
    assert kept(logits.detach(), bank.detach()) == []


def test_backward_may_be_repeated_and_interleaved(backend, generator):
    inputs, logits, bank = inputs_and_leaves(backend, generator)
    first, _, _ = backend.ops.admixture(logits, bank, None, 3)
    second, _, _ = backend.ops.admixture(2 * logits, bank, None, 2)
    leaves = logits, bank
    grad = inputs.grad_subvectors
    of_second = torch.autograd.grad(second, leaves, grad)
    of_first = torch.autograd.grad(first, leaves, grad, retain_graph=True)
    again = torch.autograd.grad(first, leaves, grad)
    alone = torch.autograd.grad(backend.ops.admixture(2 * logits, bank, None, 2)[0], leaves, grad)
    for result, want in zip((*again, *of_second), (*of_first, *alone), strict=True):
        assert_same_bits(result, want)


def test_a_bank_changed_before_backward_is_noticed(backend, generator):
    _, logits, bank = inputs_and_leaves(backend, generator)
    subvectors, _, _ = backend.ops.admixture(logits, bank, None, 3)
    with torch.no_grad():
        bank.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        subvectors.sum().backward()


@pytest.mark.parametrize("wanted", ["logits", "bank"])
def test_differentiating_twice_is_refused(backend, wanted, generator):
    _, logits, bank = inputs_and_leaves(backend, generator)
    leaf = {"logits": logits, "bank": bank}[wanted]
    subvectors, _, _ = backend.ops.admixture(logits, bank, None, 3)
    (grad,) = torch.autograd.grad(subvectors.square().sum(), leaf, create_graph=True)  # a first time is allowed
    with pytest.raises(RuntimeError, match="twice"):
        grad.square().sum().backward()


@pytest.mark.parametrize("index_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_gradcheck_of_compose(backend, index_dtype, generator):
    bank = torch.randn(5, 3, generator=generator, dtype=torch.float64).to(backend.device).requires_grad_()
    weights = torch.randn(4, 2, generator=generator, dtype=torch.float64).to(backend.device).requires_grad_()
    indices = torch.randint(5, (4, 2), generator=generator).to(backend.device, index_dtype)
    indices[0], indices[1, 0] = 3, 200  # one vector twice, and none
    for left, right in ((bank, weights), (bank, weights.detach()), (bank.detach(), weights)):
        assert torch.autograd.gradcheck(
            lambda *tensors: backend.ops.compose(tensors[0], indices, tensors[1]), (left, right)
        )
    assert not backend.ops.compose(bank.detach(), indices, weights.detach()).requires_grad


def test_an_index_beyond_32_bits_gets_no_gradient(backend):
    bank = torch.ones(3, 2, device=backend.device, requires_grad=True)
    weights = torch.ones(1, 2, device=backend.device, requires_grad=True)
    backend.ops.compose(bank, torch.tensor([[2**32 + 1, 2]], device=backend.device), weights).sum().backward()
    assert bank.grad.tolist() == [[0, 0], [0, 0], [1, 1]] and weights.grad.tolist() == [[0, 2]]


@pytest.mark.parametrize("candidates", [None, torch.int16])
def test_gradcheck_of_scaled_sub_vectors(backend, candidates, generator):
    vectors = candidates and 9
    case = Case(torch.float64, rows=5, columns=7, length=3, k=2, candidates=candidates, vectors=vectors)
    inputs = make_inputs(case, generator, backend.device)
    steps = torch.rand(case.rows, case.columns, generator=generator).argsort(1).to(inputs.logits)
    scales = torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0], dtype=torch.float64, device=backend.device).requires_grad_()

    def mix(logits, bank, scales):
        return ops.scaled_admixture(logits, bank, inputs.candidates, None, scales, case.k, torch.float64)

    leaves = (0.3 * steps).requires_grad_(), inputs.bank.requires_grad_(), scales
    assert torch.autograd.gradcheck(mix, leaves)
    unscaled = backend.ops.admixture(inputs.logits, inputs.bank, inputs.candidates, case.k)[0]
    torch.testing.assert_close(mix(inputs.logits, inputs.bank, scales), scales[:, None] * unscaled)


def test_scaled_sub_vectors_exhaust_like_others(backend):
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.0, 1.0]], device=backend.device)
    bank = torch.ones(3, 2, device=backend.device)
    exhausted = torch.tensor([False, False], device=backend.device)
    ops.scaled_admixture(logits, bank, None, exhausted, torch.ones(2, device=backend.device), 2, torch.float32)
    assert exhausted.tolist() == [False, True]


@pytest.mark.parametrize("candidates", [None, torch.int16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2])
def test_parts_are_one_split_and_its_gradient(backend, generator, candidates, out_dtype, ranks):
    case = Case(torch.float32, rows=20, columns=30, length=12, k=3, candidates=candidates, vectors=candidates and 40)
    inputs, logits, bank = inputs_and_leaves(backend, generator, case)
    sizes = [3, 0, 1, 7, 9] if ranks == 1 else [4, 0, 2, 6, 8]
    with torch.no_grad():  # the last logit is the largest, is as large as the third, is below it
        logits[:3, :3] = logits.max() + 1
        logits[:2, -1] = logits[0, 0] + torch.tensor([1, 0], device=backend.device)
    subvectors, _, _ = torch.ops.vblora.admixture(logits, bank, inputs.candidates, 3, out_dtype)
    expected = ops.in_parts(subvectors, sizes, ranks)
    marks = [torch.zeros(20, dtype=torch.bool, device=backend.device) for _ in range(2)]
    for mark in marks:
        mark[5] = True  # a mark stays
    parts, *_ = ops.admixture_in_parts(logits, bank, inputs.candidates, marks[0], 3, out_dtype, sizes, ranks)
    with torch.no_grad():
        ops.admixture_in_parts(logits, bank, inputs.candidates, marks[1], 3, out_dtype, sizes, ranks)
    assert torch.equal(*marks) and marks[0][[0, 1, 2, 5]].tolist() == [True, True, False, True]
    for part, wanted in zip(parts, expected, strict=True):
        assert part.is_contiguous() and part.shape[0] == ranks
        assert_same_bits(part, wanted)
    grads = [torch.randn(part.shape, generator=generator).to(backend.device, out_dtype) for part in parts]
    grads[4] = grads[4].T.contiguous().T
    for used in ([0, 1, 2, 3, 4], [3], [4, 0]):  # those of other parts are zero
        chosen = [[of[i] for i in used] for of in (parts, expected, grads)]
        ours = torch.autograd.grad(chosen[0], (logits, bank), chosen[2], retain_graph=True)
        theirs = torch.autograd.grad(chosen[1], (logits, bank), chosen[2], retain_graph=True)
        for one, other in zip(ours, theirs, strict=True):
            assert_same_bits(one, other)
    (alone,) = torch.autograd.grad(parts[3], logits, grads[3], retain_graph=True)
    assert_same_bits(alone, torch.autograd.grad(expected[3], logits, grads[3], retain_graph=True)[0])
    (twice,) = torch.autograd.grad(parts[3], bank, grads[3], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        twice.sum().backward()
    # ... nor where all that the gradient depends on is the logits' weights
    frozen, *_ = ops.admixture_in_parts(logits, bank.detach(), inputs.candidates, None, 3, out_dtype, sizes, ranks)
    (twice,) = torch.autograd.grad(frozen[3], logits, grads[3], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        twice.sum().backward()


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(
    ("parts", "begins", "message"),
    [
        ([], [], "`grad_parts` is empty"),
        ([(2, 12)], [0, 2], "`begins` has 2"),
        ([(2, 12)], [19], "`begins` holds 19 for a part of 2 rows"),
        ([(2, 12)], [-1], "`begins` holds -1"),
        ([(2, 12), (2, 12)], [0, 1], "`begins` holds 1"),
        ([(2, 11)], [0], "`grad_parts` holds a part of 22 elements, but each part must have a multiple of 12"),
    ],
)
def test_parts_are_checked(backend, generator, parts, begins, message):
    inputs, _, bank = inputs_and_leaves(backend, generator)
    _, indices, weights = torch.ops.vblora.admixture(inputs.logits, bank, None, 3)
    grads = [torch.ones(shape) for shape in parts]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vblora.admixture_backward_parts(
            grads, begins, indices, weights.detach(), bank.detach(), None, 30, True, True
        )


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sizes": [4, 15]}, "`sizes` adds up to 19, but must add up to 20"),
        ({"sizes": [4, 18]}, "`sizes` adds up to 22"),
        ({"sizes": [-2, 22]}, "`sizes` holds -2"),
        ({"sizes": [3, 17], "ranks": 2}, "`sizes` holds 3, but each size must be a multiple of `ranks`, 2"),
        ({"ranks": 0}, "`ranks` is 0"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_handed_out_in_parts_is_checked(backend, generator, changed, message, device):
    inputs, _, _ = inputs_and_leaves(backend, generator)
    assert inputs.logits.shape[0] == 20 and inputs.candidates is None
    arguments = {"sizes": [4, 16], "ranks": 1} | changed
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vblora.admixture_parts(
            inputs.logits.to(device), inputs.bank.to(device), None, None, k=3, out_dtype=None, **arguments
        )
