"""Prints the instruction set in use and a digest of all results for each case: `python -m tests.ops.print_digests SEED`."""

from __future__ import annotations

import hashlib
import sys

import torch

import vblora

from .cases import Case, bits, make_inputs, pairwise_cases


def digest(tensors: tuple[torch.Tensor, ...]) -> str:
    return hashlib.sha256(b"".join(bits(tensor).numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


def main(seed: int) -> None:
    print("instruction set", vblora.build_info()["cpu_instruction_set"], sep="\t")
    generator = torch.Generator().manual_seed(seed)
    many = Case(torch.float32, rows=3000, columns=64, length=130, k=4, candidates=torch.int16, vectors=5)
    for case in (*pairwise_cases(), many):
        inputs = make_inputs(case, generator, torch.device("cpu"))
        given = tuple(tensor for tensor in vars(inputs).values() if tensor is not None)
        forward = torch.ops.vblora.admixture(inputs.logits, inputs.bank, inputs.candidates, case.k, case.out_dtype)
        _, indices, weights = forward
        backward = torch.ops.vblora.admixture_backward(
            inputs.grad_subvectors, inputs.grad_weights, indices, weights, inputs.bank, inputs.candidates, case.columns,
            True, True,
        )  # fmt: skip
        some = torch.randint(len(inputs.bank), (case.rows, case.k), generator=generator)
        composed = torch.ops.vblora.compose(inputs.bank, some, inputs.grad_weights, case.out_dtype)
        results = {"inputs": given, "forward": forward, "backward": backward, "compose": (composed,)}
        updated = torch.randn(case.rows, 67, generator=generator).to(case.dtype)
        factors = [torch.randn(2, case.k, size, generator=generator).to(case.dtype) for size in (case.length, 67)]
        x = torch.randn(case.rows, case.length, generator=generator).to(case.dtype)
        adapters = torch.randint(-1, 2, (case.rows,), generator=generator)
        torch.ops.vblora.add_updates_(updated, x, *factors, adapters)
        results["add_updates_"] = (updated,)
        drawn = [torch.empty_like(inputs.logits)]
        torch.ops.vblora.draw_logits_(drawn[0], None, case.columns, seed, 0.02)
        if inputs.candidates is not None:
            drawn += [torch.empty_like(inputs.logits), torch.empty_like(inputs.candidates)]
            torch.ops.vblora.draw_logits_(*drawn[1:], 3 * case.columns, seed, 0.02)
        results["draw_logits_"] = tuple(drawn)
        uniform = torch.empty_like(inputs.logits)
        torch.ops.vblora.draw_uniform_(uniform, seed, 1, 0.02)
        results["draw_uniform_"] = (uniform,)
        A, B = (torch.randn(5, width, generator=generator).to(case.dtype) for width in (case.columns, 37))
        grad_y, x = torch.randn(case.rows, 37, generator=generator).to(case.dtype), inputs.logits
        grad_x = torch.zeros_like(x)
        results["low_rank"] = (grad_x, *torch.ops.vblora.low_rank_backward(grad_y, x, A, B, grad_x))
        for name, tensors in results.items():
            print(f"{case} {name}", digest(tensors), sep="\t")


if __name__ == "__main__":
    main(int(sys.argv[1]))
