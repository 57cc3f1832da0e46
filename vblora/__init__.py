"""VB-LoRA for PyTorch: low-rank adapters composed from one shared vector bank, with native kernels.

>>> model = vblora.inject(model, vblora.VBLoRAConfig(r=4, num_vectors=256, vector_length=64))
>>> optimizer = torch.optim.AdamW(vblora.parameter_groups(model))
"""

from . import ops, reference
from .bank import VectorBank
from .checkpoint import load, pack_optimizer, save, unpack_optimizer
from .config import LoraConfig, TiedLoraConfig, VBLoRAConfig, VeraConfig
from .errors import VBLoRAWarning
from .layers.linear import VBLinear
from .model import averaging, learning_rates  # noqa: F401  (they watch averages of models, and every optimizer)
from .model.candidates import grow, stats
from .model.inject import inject
from .model.merging import merge, unmerge
from .model.parameters import count_parameters, parameter_groups
from .model.summary import print_trainable_parameters
from .model.switching import active_adapters, delete_adapter, disabled, eject, set_adapter
from .model.whole import adapter_state_dict
from .native import build_info, empty_cache

__version__ = build_info()["version"]

__all__ = [
    "LoraConfig",
    "TiedLoraConfig",
    "VBLinear",
    "VBLoRAConfig",
    "VBLoRAWarning",
    "VectorBank",
    "VeraConfig",
    "active_adapters",
    "adapter_state_dict",
    "build_info",
    "count_parameters",
    "delete_adapter",
    "disabled",
    "eject",
    "empty_cache",
    "grow",
    "inject",
    "load",
    "merge",
    "ops",
    "pack_optimizer",
    "parameter_groups",
    "print_trainable_parameters",
    "reference",
    "save",
    "set_adapter",
    "stats",
    "unmerge",
    "unpack_optimizer",
]
