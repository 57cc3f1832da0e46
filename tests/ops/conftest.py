from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """New tensors are filled with NaN (or the largest integer): what an operator does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
