"""Graphs, streams, checkpointing, odd memory: tests/test_gpu_hazards.py on the device."""

from __future__ import annotations

from . import suite
from .phase import Phase


def run(phase: Phase) -> None:
    arguments = ["tests/test_gpu_hazards.py"]
    if not phase.on_gpu:
        arguments += ["-k", "not cuda"]
        phase.skip("CUDA graphs, streams", "there is no GPU")
    suite.run(phase, "tests/test_gpu_hazards.py", arguments, processes=1)
