"""What adapters cost over the frozen model: training steps, peak memory, prefill and decoding, of SmolLM2-135M's shape.

Every adapter method needs the frozen model's forward, and its backward to the input embeddings. So each figure is a ratio to
that, of runs in turn in one process. ``python -m benchmarks.overhead --help`` runs parts of this.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from functools import partial
from itertools import product

import torch
from torch import nn

import vblora
from vblora.adapters.base import keeping_factors

from . import models
from .harness import Result, Row, Settings, Times, bars, held_bytes, in_turn, peak_bytes
from .inference import Decoder

SHAPES = {"1 × 32": (1, 32), "4 × 128": (4, 128)}
DTYPES = {"fp32": None, "bf16 autocast": torch.bfloat16}
CHECKPOINTING = {"": None, ", checkpointing": False, ", re-entrant checkpointing": True}  # use_reentrant
FROZEN, OURS, LORA, PEER = "frozen model", "vblora", "vblora LoRA", "PEFT LoRA"
# By case, the most that `vblora` should take as a ratio to the frozen model. Elsewhere: half of PEFT LoRA's overhead.
GOALS = {"1 × 32, fp32": 1.13, "4 × 128, fp32": 1.10, "1 × 32, fp32, re-entrant checkpointing": 1.13}


def timed(function: Callable[[], object]) -> Callable[[], dict[str, float]]:
    """A function that runs ``function`` and returns the seconds that it took, and the seconds of processor time."""

    def run() -> dict[str, float]:
        start, processor = time.perf_counter(), time.process_time()
        function()
        return {"seconds": time.perf_counter() - start, "processor": time.process_time() - processor}

    return run


class Training:
    """A model with an adapter, or without."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True) if self.trained else None

    def step(self, ids: torch.Tensor, dtype: torch.dtype | None) -> None:
        inputs = {"input_ids": ids}
        if self.optimizer is None:
            inputs = {"inputs_embeds": self.model.get_input_embeddings()(ids).requires_grad_()}
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = self.model(**inputs, labels=ids).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def peak(self, ids: torch.Tensor, dtype: torch.dtype | None) -> int:
        """Bytes of parameters and optimizer state, and the peak of a step."""
        state = [] if self.optimizer is None else [t for s in self.optimizer.state.values() for t in s.values()]
        return held_bytes([*self.trained, *state]) + peak_bytes(partial(self.step, ids, dtype))

    @contextmanager
    def checkpointing(self, use_reentrant: bool | None):
        if use_reentrant is None:
            yield
            return
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        if use_reentrant:
            self.model.enable_input_require_grads()
        yield
        if use_reentrant:
            self.model.disable_input_require_grads()
        self.model.gradient_checkpointing_disable()


def base_model(settings: Settings, layers: int) -> nn.Module:
    torch.manual_seed(0)
    base = models.small_llama() if settings.quick else models.smollm2_shape(layers)
    base.config.use_cache = False
    return base.requires_grad_(False)


def makers(base: nn.Module, adapter: dict) -> dict[str, Callable[[], nn.Module]]:
    lora = vblora.LoraConfig(r=4, lora_alpha=4, target_modules="all-linear")
    return {
        FROZEN: lambda: base,
        OURS: lambda: models.ours(models.twin(base), adapter),
        LORA: lambda: vblora.inject(models.twin(base), lora),
        PEER: lambda: models.peft_lora(models.twin(base)),
        "PEFT VBLoRA": lambda: models.peft_vblora(models.twin(base), adapter),
    }


def parts_of(times: Times, part: str) -> Times:
    """The times of one part of what was timed, by side."""
    found = {name: seconds for name, seconds in times.seconds.items() if name.endswith(f", {part}")}
    return Times({name.removesuffix(f", {part}"): seconds for name, seconds in found.items()})


def step_row(case: str, groups: dict[str, Times]) -> Row:
    """Ours beside the others, the share of PEFT LoRA's overhead that ours does not have, and whether the goal is met."""
    seconds, processor = groups[case], groups[f"{case}, processor"]
    ratios = {name: seconds.ratio(name, FROZEN) for name in seconds.seconds if name != FROZEN}
    ours, peer = ratios[OURS].middle, ratios[PEER].middle
    figure = ", ".join(
        [str(ratios[OURS]), *(f"{name} {ratio.middle:.2f}" for name, ratio in ratios.items() if name != OURS)]
    )
    if peer > 1:
        figure += f"; {(peer - ours) / (peer - 1):.0%} of the gap closed"
    parts = [f"{name} {processor.ratio(name, FROZEN).middle:.2f}" for name in (OURS, LORA, PEER)]
    figure += f"; processor time: {', '.join(parts)}"
    most = min(GOALS[case], peer) if case in GOALS else 1 + (peer - 1) / 2
    return Row(f"{case}: vblora / frozen model", figure, f"≤ {most:.2f} ×", ours <= most)


def shown(*rows: Row) -> list[Row]:
    for row in rows:
        print(f"{row.case}: {row.figure}; {row.target} {row.verdict}", flush=True)
    return [*rows]


def memory_row(case: str, peaks: dict[str, int]) -> Row:
    above = {name: (peak - peaks[FROZEN]) / 2**20 for name, peak in peaks.items() if name != FROZEN}
    figure = ", ".join(f"{name} {mib:.1f}" for name, mib in above.items()) + " MiB"
    share = above[OURS] / above[PEER]
    return Row(
        f"{case}: peak memory above the frozen model's",
        f"{share:.2f} × PEFT LoRA's ({figure})",
        "≤ 0.8 ×",
        share <= 0.8,
    )


def training(
    settings: Settings, layers: int, rounds: int | None, wanted: str, adapter: dict
) -> tuple[list[Row], dict[str, Times]]:
    base = base_model(settings, layers)
    made = {name: Training(make()) for name, make in makers(base, adapter).items()}
    rows, groups = [], {}
    shapes = {"1 × 8": (1, 8)} if settings.quick else SHAPES
    for (shape_name, shape), (dtype_name, dtype), (suffix, use_reentrant) in product(
        shapes.items(), DTYPES.items(), CHECKPOINTING.items()
    ):
        case = f"{shape_name}, {dtype_name}{suffix}"
        if not fnmatch(case, wanted):
            continue
        ids = torch.randint(3, 500, shape, generator=torch.Generator().manual_seed(0))
        with ExitStack() as stack:
            for side in made.values():
                stack.enter_context(side.checkpointing(use_reentrant))
            work = {name: timed(partial(side.step, ids, dtype)) for name, side in made.items()}
            seconds = settings.seconds(1e-9 if rounds else 12 if shape[0] == 1 else 25)
            times = in_turn(work, seconds, least=rounds or 7, most=rounds or 60, warm_up=2)
            peaks = {name: side.peak(ids, dtype) for name, side in made.items()}
        groups[case] = parts_of(times, "seconds")
        groups[f"{case}, processor"] = parts_of(times, "processor")
        rows += shown(step_row(case, groups), memory_row(case, peaks))
    return rows, groups


@torch.no_grad()
@keeping_factors()  # as `generate` does
def inference(
    settings: Settings, layers: int, rounds: int | None, wanted: str, adapter: dict
) -> tuple[list[Row], dict[str, Times]]:
    rows, groups = [], {}
    for dtype_name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        base = base_model(settings, layers).to(dtype).eval()
        made = {name: make() for name, make in makers(base, adapter).items() if name in (FROZEN, OURS, LORA, PEER)}
        prompt = torch.randint(3, 500, (1, 8 if settings.quick else 128), generator=torch.Generator().manual_seed(0))
        sides = {name: Decoder(model.eval(), prompt) for name, model in made.items()}
        for name, method in {"prefill of 128": "prefill", "decoding a token": "decode"}.items():
            case = f"{name}, {dtype_name}"
            if not fnmatch(case, wanted):
                continue
            work = {name: timed(getattr(side, method)) for name, side in sides.items()}
            times = in_turn(work, settings.seconds(1e-9 if rounds else 10), least=rounds or 11, most=rounds or 300)
            groups[case] = parts_of(times, "seconds")
            groups[f"{case}, processor"] = parts_of(times, "processor")
            rows += shown(step_row(case, groups))
    return rows, groups


def run(
    settings: Settings, layers: int = 12, rounds: int | None = None, wanted: str = "*", vector_length: int = 192
) -> Result:
    adapter = models.SMOLLM2_ADAPTER | {"vector_length": vector_length}
    rows, groups = training(settings, layers, rounds, wanted, adapter)
    more, times = inference(settings, layers, rounds, wanted, adapter)
    rows, groups = rows + more, groups | times
    sizes = f"r=4, h=2048, b={vector_length}, k=2"
    title = f"overhead: {layers} layers of SmolLM2-135M's shape, all linear layers, {sizes}, AdamW fused"
    measurements = {"seconds": {name: times.seconds for name, times in groups.items()}}
    return Result(title, rows, measurements, bars(title, groups))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", default="*", help="only cases whose name matches this pattern, such as '1 × 32, fp32*'"
    )
    parser.add_argument("--rounds", type=int, help="instead of a time for each case")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vector-length", type=int, default=192, help="b")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small sizes; the figures mean nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    run(Settings(arguments.quick), arguments.layers, arguments.rounds, arguments.case, arguments.vector_length)


if __name__ == "__main__":
    main()
