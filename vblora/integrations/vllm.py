"""vLLM serves vblora's adapters by name, as LoRA.

This is a general plugin: vLLM loads it in each of its processes. In the front end, a resolver finds the folder of
``model: "user-17"``. The workers read that folder as if it were one of LoRA. vLLM's slots, eviction and kernels do the rest.

=========================  ========================================================================================
environment variable
=========================  ========================================================================================
``VBLORA_ADAPTERS``        directory with a folder for each adapter. Unset: no name is resolved
``VBLORA_BANK``            file of a vector bank, or several, separated by ``:``, for folders without a bank in them
``VBLORA_CAPACITY_BYTES``  bytes of packed adapters that each process holds; 4 GiB by default
=========================  ========================================================================================
"""

import asyncio
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import vllm
from vllm import envs
from vllm.logger import init_logger
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry
from vllm.lora.utils import get_lora_id, parse_fine_tuned_lora_name

from ..adapters import Target
from ..bank import VectorBank
from ..layers.kinds import has_kind, target_of
from ..serving.by_path import AdaptersByPath, lora_tensors

# Versions whose resolvers, `from_local_dir` and `from_local_checkpoint` are known to fit.
KNOWN_VERSIONS = ("0.32", "0.33")
MAX_RANK = 512  # the largest `max_lora_rank` of vLLM

_ADAPTERS, _BANK, _CAPACITY = "VBLORA_ADAPTERS", "VBLORA_BANK", "VBLORA_CAPACITY_BYTES"
_logger = init_logger("vllm.plugins.vblora")


def register() -> None:
    """What vLLM calls in each process, perhaps more than once.

    Raises:
        RuntimeError: vLLM's version is not known to work, and an environment variable of ours asks for adapters.
        ValueError, FileNotFoundError: an environment variable is invalid.
    """
    if ".".join(vllm.__version__.split(".")[:2]) not in KNOWN_VERSIONS:
        if any(name in os.environ for name in (_ADAPTERS, _BANK)):
            known = ", ".join(version + ".*" for version in KNOWN_VERSIONS)
            raise RuntimeError(
                f"vllm {vllm.__version__} is not known to vblora, which replaces methods of vllm: install one of {known}, or "
                f"unset {_ADAPTERS} and {_BANK} to do without vblora's adapters."
            )
        return
    if getattr(LoRAModel.from_local_checkpoint, "of_vblora", False):
        return
    adapters = AdaptersByPath(_banks(), max_rank=MAX_RANK, capacity_bytes=_capacity())
    directory = os.environ.get(_ADAPTERS)
    if directory is not None:
        if not Path(directory).is_dir():
            raise ValueError(f"{_ADAPTERS} is {directory!r}, which is not a directory.")
        if not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
            _logger.warning(
                "%s is set, but a server looks up names there only with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.", _ADAPTERS
            )
        LoRAResolverRegistry.register_resolver("vblora", Resolver(Path(directory), adapters))
    _read_from(adapters)


class Resolver(LoRAResolver):  # type: ignore[misc]  # vllm is not typed
    """Finds adapters by name in a directory. What cannot be served is logged, and unknown to the client: a 404."""

    def __init__(self, directory: Path, adapters: AdaptersByPath) -> None:
        self._directory = directory
        self._adapters = adapters

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        try:
            path = await asyncio.to_thread(self._path, base_model_name, lora_name)
        except (OSError, ValueError) as error:
            _logger.warning("Adapter %r cannot be served: %s", lora_name, error)
            return None
        return None if path is None else LoRARequest(lora_name, 1, path)  # vLLM replaces the 1

    def _path(self, base_model_name: str, lora_name: str) -> str | None:
        return self._adapters.resolve(self._directory, lora_name, _layers_of(base_model_name))


@functools.cache
def _layers_of(base_model_name: str) -> Mapping[str, Target] | None:
    """The layers of transformers' model, which adapters name, without its weights."""
    try:
        config = transformers.AutoConfig.from_pretrained(base_model_name)
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])(config)
        return {name: target_of(name, module) for name, module in model.named_modules() if has_kind(module)}
    except Exception as error:  # whatever a model's own code raises
        _logger.warning("Whether adapters fit %s cannot be checked: %s", base_model_name, error)
        return None


def _read_from(adapters: AdaptersByPath) -> None:
    """Lets vLLM read our folders where it reads those of LoRA."""
    their_config = PEFTHelper.from_local_dir.__func__
    their_model = LoRAModel.from_local_checkpoint.__func__

    def from_local_dir(cls: Any, /, lora_path: str, max_position_embeddings: int | None) -> Any:
        adapter = adapters.read(lora_path)
        if adapter is None:
            return their_config(cls, lora_path, max_position_embeddings)
        names = [target.name for target in adapter.targets]
        fields = {"r": adapter.rank, "lora_alpha": adapter.rank, "target_modules": names}
        return cls.from_dict(fields | {"vllm_max_position_embeddings": max_position_embeddings})

    def from_local_checkpoint(
        cls: Any, /, lora_dir: str, expected_lora_modules: set[str], peft_helper: Any, **choice: Any
    ) -> Any:
        adapter = adapters.held(lora_dir)
        if adapter is None:
            return their_model(cls, lora_dir, expected_lora_modules, peft_helper, **choice)
        tensors = lora_tensors(adapter, choice.get("dtype") or torch.float32)
        for name in tensors:
            module, _ = parse_fine_tuned_lora_name(name, choice.get("weights_mapper"))
            expert = module[module.find(".experts") + 1 :] if ".experts" in module else None
            if not {module.rpartition(".")[2], expert} & expected_lora_modules:
                raise ValueError(f"{lora_dir} adapts `{module}`, which vLLM does not adapt in this model.")
        choice.pop("moe_ep_spec", None)  # experts of other processes are left out later
        choice["lora_model_id"] = choice.get("lora_model_id") or get_lora_id()
        return cls.from_lora_tensors(tensors=tensors, peft_helper=peft_helper, **choice)

    from_local_checkpoint.of_vblora = True  # type: ignore[attr-defined]
    PEFTHelper.from_local_dir = classmethod(from_local_dir)
    LoRAModel.from_local_checkpoint = classmethod(from_local_checkpoint)


def _banks() -> list[VectorBank]:
    return [VectorBank.from_file(path) for path in os.environ.get(_BANK, "").split(os.pathsep) if path]


def _capacity() -> int:
    given = os.environ.get(_CAPACITY, str(2**32))
    if not given.isascii() or not given.isdigit() or int(given) < 1:
        raise ValueError(f"{_CAPACITY} is {given!r}, but must be a number of bytes, at least 1.")
    return int(given)
