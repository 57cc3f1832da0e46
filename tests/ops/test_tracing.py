"""The operators under PyTorch's tracers: opcheck, meta tensors, torch.compile, torch.export."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from vblora.arguments import INDEX_DTYPES

from .cases import DTYPES, Case, make_inputs

pytestmark = pytest.mark.backends("cpu", "cuda")  # the emulated operators are kernels only

CASES = [
    Case(torch.float32, rows=6, columns=9, length=5, k=2),
    Case(torch.float64, rows=1, columns=1, length=1, k=1),
    Case(torch.bfloat16, rows=6, columns=9, length=8, k=3, candidates=torch.int16, vectors=4),
    Case(torch.float16, rows=6, columns=9, length=8, k=9, candidates=torch.int32, vectors=20, out_dtype=torch.float32),
    Case(torch.float32, rows=0, columns=9, length=5, k=2, out_dtype=torch.bfloat16),
]


@pytest.fixture(scope="module")
def compiler_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("inductor")


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch, compiler_cache):
    # With a cache of our own: what an earlier run compiled could hide a change of the operators.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiler_cache))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def admixture_arguments(case, generator, device):
    inputs = make_inputs(case, generator, device)
    return inputs, (inputs.logits, inputs.bank, inputs.candidates, case.k, case.out_dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_admixture(backend, case, generator):
    inputs, arguments = admixture_arguments(case, generator, backend.device)
    inputs.logits.requires_grad_()
    inputs.bank.requires_grad_()
    torch.library.opcheck(backend.ops.admixture, arguments)


@pytest.mark.parametrize(("train_logits", "train_bank"), [(False, False), (True, False), (False, True)])
def test_opcheck_admixture_with_some_frozen(backend, train_logits, train_bank, generator):
    inputs, arguments = admixture_arguments(CASES[2], generator, backend.device)
    inputs.logits.requires_grad_(train_logits)
    inputs.bank.requires_grad_(train_bank)
    torch.library.opcheck(backend.ops.admixture, arguments)


def test_opcheck_admixture_of_strided_inputs(backend, generator):
    logits = torch.randn(9, 6, generator=generator).to(backend.device).t().requires_grad_()
    bank = torch.randn(9, 10, generator=generator).to(backend.device)[:, ::2].requires_grad_()
    torch.library.opcheck(backend.ops.admixture, (logits, bank, None, 2))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_admixture_backward(backend, case, generator):
    inputs, arguments = admixture_arguments(case, generator, backend.device)
    _, indices, weights = backend.ops.admixture(*arguments)
    rest = indices, weights, inputs.bank, inputs.candidates, case.columns
    torch.library.opcheck(
        backend.ops.admixture_backward, (inputs.grad_subvectors, inputs.grad_weights, *rest, True, True)
    )
    torch.library.opcheck(backend.ops.admixture_backward, (inputs.grad_subvectors, None, *rest, True, False))
    torch.library.opcheck(backend.ops.admixture_backward, (None, inputs.grad_weights, *rest, False, True))
    sizes = [2 * (case.rows // 2), case.rows % 2]
    exhausted = torch.zeros(case.rows, dtype=torch.bool, device=backend.device)
    for flags in (None, exhausted):
        torch.library.opcheck(
            backend.ops.admixture_parts,
            (inputs.logits, inputs.bank, inputs.candidates, flags, case.k, case.out_dtype, sizes, 1),
            test_utils=("test_schema", "test_faketensor"),  # it is for eager mode: torch cannot functionalise it
        )
    parts = [inputs.grad_subvectors[:2], inputs.grad_subvectors[2:]]
    begins = [0, parts[0].shape[0]]
    torch.library.opcheck(backend.ops.admixture_backward_parts, (parts, begins, *rest, True, False))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
def test_opcheck_compose(backend, case, index_dtype, generator):
    inputs = make_inputs(case, generator, backend.device)
    indices = torch.randint(len(inputs.bank), (case.rows, case.k), generator=generator).to(index_dtype)
    arguments = inputs.bank, indices.to(backend.device), inputs.grad_weights, case.out_dtype
    torch.library.opcheck(backend.ops.compose, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_add_updates(backend, dtype, generator):
    y, x, A, B = (
        torch.randn(shape, generator=generator).to(dtype).to(backend.device)
        for shape in ((3, 2, 5), (3, 2, 7), (4, 2, 7), (4, 2, 5))
    )
    adapters = torch.tensor([3, -1, 0], device=backend.device)
    torch.library.opcheck(backend.ops.add_updates_, (y, x, A, B, adapters))
    torch.library.opcheck(backend.ops.add_updates_, (y, x, A[0], B[0]))
    torch.library.opcheck(backend.ops.add_updates_, (y.transpose(0, 1).contiguous().transpose(0, 1), x, A, B, adapters))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_meta_tensors_have_the_results_shapes(backend, case, generator):
    inputs, arguments = admixture_arguments(case, generator, backend.device)
    results = backend.ops.admixture(*arguments)
    _, indices, weights = results
    rest = indices, weights, inputs.bank, inputs.candidates, case.columns
    calls = [(backend.ops.admixture, arguments), (backend.ops.compose, (inputs.bank, indices, weights, case.out_dtype))]
    calls += [
        (backend.ops.admixture_backward, (inputs.grad_subvectors, None, *rest, need_logits, need_bank))
        for need_logits in (True, False)
        for need_bank in (True, False)
    ]
    for operator, arguments in calls:
        real = operator(*arguments)
        meta = operator(*(x.to("meta") if torch.is_tensor(x) else x for x in arguments))
        real, meta = ((x,) if torch.is_tensor(x) else x for x in (real, meta))
        for result, want in zip(meta, real, strict=True):
            assert result.is_meta
            assert (result.shape, result.dtype, result.stride()) == (want.shape, want.dtype, want.stride())


def mix_of(backend, k, out_dtype=None):
    def mix(logits, bank, candidates, direction):
        subvectors, indices, weights = backend.ops.admixture(logits, bank, candidates, k, out_dtype)
        return subvectors.float() * direction.float(), weights.square(), indices

    return mix


def results_and_gradients(mix, inputs):
    logits, bank = inputs.logits.detach().requires_grad_(), inputs.bank.detach().requires_grad_()
    products, squares, indices = mix(logits, bank, inputs.candidates, inputs.grad_subvectors)
    (products.sum() + squares.sum()).backward()
    return products.detach(), squares.detach(), indices, logits.grad, bank.grad


@pytest.mark.parametrize(
    ("case", "compiler"),
    [
        *((case, "aot_eager") for case in CASES[:4]),
        *(pytest.param(case, "inductor", marks=pytest.mark.slow) for case in (CASES[0], CASES[3])),
    ],
    ids=str,
)
def test_compile_forward_and_backward(backend, case, compiler, generator):
    inputs = make_inputs(case, generator, backend.device)
    mix = mix_of(backend, case.k, case.out_dtype)
    compiled = torch.compile(mix, fullgraph=True, backend=compiler)
    for result, want in zip(results_and_gradients(compiled, inputs), results_and_gradients(mix, inputs), strict=True):
        torch.testing.assert_close(result, want)


def test_compile_with_sizes_that_change(backend, generator):
    counter = CompileCounterWithBackend("aot_eager")
    mix = mix_of(backend, 3)
    compiled = torch.compile(mix, fullgraph=True, dynamic=True, backend=counter)
    for rows, columns, length in ((6, 9, 5), (33, 20, 8), (7, 50, 3)):
        inputs = make_inputs(Case(torch.float32, rows, columns, length, 3), generator, backend.device)
        for result, want in zip(
            results_and_gradients(compiled, inputs), results_and_gradients(mix, inputs), strict=True
        ):
            torch.testing.assert_close(result, want)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compile_compose(backend, generator):
    bank = torch.randn(9, 5, generator=generator).to(backend.device)
    indices = torch.randint(9, (6, 2), generator=generator).to(backend.device)
    weights = torch.rand(6, 2, generator=generator).to(backend.device)
    compiled = torch.compile(lambda *x: backend.ops.compose(*x, torch.bfloat16) * 2, fullgraph=True, backend="inductor")
    assert torch.equal(
        compiled(bank, indices, weights), backend.ops.compose(bank, indices, weights, torch.bfloat16) * 2
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_export(backend, dtype, generator):
    class Mix(torch.nn.Module):
        def forward(self, logits, bank):
            return backend.ops.admixture(logits, bank, None, 2)

    inputs = make_inputs(Case(dtype, rows=6, columns=9, length=5, k=2), generator, backend.device)
    program = torch.export.export(Mix(), (inputs.logits, inputs.bank))
    assert sum(node.target is torch.ops.vblora.admixture.default for node in program.graph.nodes) == 1
    want = backend.ops.admixture(inputs.logits, inputs.bank, None, 2)
    for result, expected in zip(program.module()(inputs.logits, inputs.bank), want, strict=True):
        assert torch.equal(result, expected)
