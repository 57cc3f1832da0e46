"""Prints the tables of docs/cuda.md: registers, occupancy and instructions of the kernels that train a Llama-2-7B adapter."""

from __future__ import annotations

import tempfile
from pathlib import Path

from . import counts, occupancy, toolkit

INSTANCES = (
    "admixture_kernel<float, 2, unsigned long, 8>",
    "admixture_kernel<float, 2, unsigned long, 32>",
    "compose_kernel<float, 2>",
    counts.ROWS_KERNEL.format(counts.MANY_RUNS),
    "backward_bank_kernel<bf16, float>",
    "backward_popular_kernel<bf16, float>",
)


def main() -> None:
    kernels = [kernel for unit in toolkit.translation_units() for kernel in toolkit.compile_kernels(unit).kernels]
    with tempfile.TemporaryDirectory() as folder:
        share = occupancy.calculator(Path(folder))
        print("| kernel | registers |", " | ".join(f"sm_{arch}" for arch in toolkit.architectures()), "|")
        print("|---|---|" + "---|" * len(toolkit.architectures()))
        for instance in INSTANCES:
            found = {kernel.arch: kernel for kernel in kernels if kernel.instance == instance}
            registers = sorted({kernel.registers for kernel in found.values()})
            shares = [f"{share(found[arch]):.0%}" for arch in toolkit.architectures()]
            print(f"| `{instance}` | {registers[0]} to {registers[-1]} |", " | ".join(shares), "|")
    print()
    counts.main()


if __name__ == "__main__":
    main()
