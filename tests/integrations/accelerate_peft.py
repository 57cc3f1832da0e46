"""A pytest plugin under which every VB-LoRA model that PEFT makes is accelerated: PEFT's own tests run on our operators.

    make test-peft VBLORA_PEFT_SOURCE=/path/to/peft

Models are accelerated as they are made, before anything is loaded into them, and not only by ``get_peft_model``: ``PeftModel``,
``from_pretrained``, ``load_adapter`` and ``add_adapter`` all come through ``inject_adapter``.
"""

import collections

import pytest
from peft.tuners.vblora import VBLoRAModel

from vblora.integrations.peft import AcceleratedLinear, accelerate

_counts: collections.Counter[str] = collections.Counter()
_inject_adapter = VBLoRAModel.inject_adapter
_get_lora_matrices = AcceleratedLinear._get_lora_matrices


def _inject_and_accelerate(self, *args, **kwargs):
    result = _inject_adapter(self, *args, **kwargs)
    accelerate(self)
    _counts["injections"] += 1
    return result


def _count_and_get(self, *args, **kwargs):
    _counts["pairs of factors"] += 1
    return _get_lora_matrices(self, *args, **kwargs)


def pytest_configure() -> None:
    VBLoRAModel.inject_adapter = _inject_and_accelerate
    AcceleratedLinear._get_lora_matrices = _count_and_get


def pytest_terminal_summary(terminalreporter) -> None:
    counts = ", ".join(f"{_counts[name]} {name}" for name in ("injections", "pairs of factors"))
    terminalreporter.write_line(f"vblora.integrations.peft.accelerate: {counts}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus) -> None:
    if exitstatus == pytest.ExitCode.OK and not _counts["pairs of factors"]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED  # it ran without what it is to test
