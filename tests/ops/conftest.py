from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """Fills new tensors with NaN (or the largest integer), so that elements that an operator does not write are detected."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
