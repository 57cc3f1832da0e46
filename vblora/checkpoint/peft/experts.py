"""Exports that PEFT changes as it reads them: layers named like the experts that transformers fuses into one parameter."""

import warnings

from torch import nn

from ...errors import VBLoRAWarning, listed

_FUSED = frozenset({"gate_up_proj", "down_proj"})
# The names of experts and routers before they were fused. PEFT reads a target with one of them as the fused parameter.
_BEFORE_FUSION = frozenset({"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"})


def warn_of_renamed_targets(model: nn.Module, names: list[str]) -> None:
    """Warns if PEFT would take some of the adapted layers, ``names``, for experts of a mixture-of-experts model.

    The warning points at the caller of the caller.
    """
    found = [name for name in names if name.rpartition(".")[2] in _BEFORE_FUSION]
    if found and any(p.dim() == 3 and name.rpartition(".")[2] in _FUSED for name, p in model.named_parameters()):
        warnings.warn(
            f"PEFT may not read this file as it was written: {type(model).__name__} fuses its experts, and PEFT takes "
            f"{listed(found)} for parts of them. Load the file with vblora.load, or leave these layers out before you train.",
            VBLoRAWarning,
            stacklevel=4,
        )
