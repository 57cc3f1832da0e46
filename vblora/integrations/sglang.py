"""SGLang serves vblora's adapters as LoRA: the body of ``/load_lora_adapter_from_tensors``, for SGLang 0.5.17 to 0.5.23."""

import base64
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from ..adapters import Target
from ..bank import VectorBank
from ..checks import check_count
from ..serving.by_path import lora_tensors
from ..serving.packed import Reader

_MAX_RANK = 2**16


def load_request(
    directory: str | os.PathLike[str],
    lora_name: str,
    *,
    bank: VectorBank | str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    pinned: bool = False,
    tp_size: int = 1,
) -> dict[str, Any]:
    """The body of a request that gives SGLang an adapter, to be sent as JSON::

        request = load_request("adapters/user-17", "user-17", bank="bank.safetensors")
        requests.post(f"{server}/load_lora_adapter_from_tensors", json=request).raise_for_status()

    The server needs neither vblora nor the folder. It unpickles the tensors with an unpickler that allows little else.

    Args:
        directory: a folder that :func:`vblora.load` reads, of any method.
        lora_name: the name by which requests to SGLang choose the adapter.
        bank: the bank of an adapter that was saved without it, or its path (:meth:`vblora.VectorBank.from_file`).
        dtype: dtype of the tensors in the request. A 16-bit dtype, such as the model's, takes half of the space.
        pinned: whether SGLang keeps the adapter on its devices.
        tp_size: SGLang's ``--tp-size``: the number of copies of the tensors, one for each of its processes.

    Returns:
        A dict that ``json.dumps`` accepts.

    Raises:
        FileNotFoundError, ValueError: the folder or the bank is missing or damaged, or SGLang cannot serve such an adapter.
    """
    check_count("tp_size", tp_size)
    if bank is not None and not isinstance(bank, VectorBank):
        bank = VectorBank.from_file(bank)
    reader = Reader(None, None, [] if bank is None else [bank], _MAX_RANK, torch.device("cpu"), exact=True)
    try:
        adapter = reader.read(Path(directory))
        _check_attention(adapter.targets)
        tensors = lora_tensors(adapter, dtype)
    except ValueError as error:
        raise ValueError(f"{directory} cannot be served: {error}") from error
    # Copies: views would bring along all that they are views of.
    data = pickle.dumps({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()})
    config = {
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "target_modules": [target.name for target in adapter.targets],
    }
    return {
        "lora_name": lora_name,
        "config_dict": config,
        "serialized_named_tensors": [base64.b64encode(data).decode("ascii")] * tp_size,
        "pinned": pinned,
    }


def _check_attention(targets: tuple[Target, ...]) -> None:
    """SGLang joins the three projections of attention, and starts from q_proj's: without it, it ignores the others."""
    names = {target.name for target in targets}
    for name in names:
        parent, _, own = name.rpartition(".")
        needed = [f"{parent}.{other}" for other in ("q_proj", "v_proj") if own in ("q_proj", "k_proj", "v_proj")]
        for other in needed:
            if other not in names:
                raise ValueError(f"it adapts `{name}` but not `{other}`, which SGLang needs beside it.")
