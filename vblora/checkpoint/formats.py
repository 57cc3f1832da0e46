"""The file formats of each method. To add a method, or a PEFT format of one, add it to the table here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from ..config import AdapterConfig, LoraConfig, TiedLoraConfig, VBLoRAConfig, VeraConfig
from .contents import Contents
from .flat import LoRAContents, TiedLoRAContents
from .json_objects import JsonObject
from .peft import lora as peft_lora
from .peft import vblora as peft_vblora
from .peft import vera as peft_vera
from .vblora import VBLoRAContents
from .vera import VeRAContents

# From contents and the base model's name to the config and the tensors of PEFT's files, and back.
PeftEncoder: TypeAlias = Callable[[Contents, str | None], tuple[JsonObject, dict[str, Tensor]]]
PeftDecoder: TypeAlias = Callable[[JsonObject, dict[str, Tensor]], Contents]


@dataclass(frozen=True)
class Method:
    """What checkpoints know of a method.

    Attributes:
        title: for people.
        contents: its contents, which also know the tensors of our own format.
        peft_encoders: PEFT's formats of the method, by our names of the forms.
        peft_decoder: reads all of those; None if PEFT does not have the method.
    """

    title: str
    contents: type[Contents]
    peft_encoders: Mapping[str, PeftEncoder] = field(default_factory=dict)
    peft_decoder: PeftDecoder | None = None


METHODS: dict[type[AdapterConfig], Method] = {
    VBLoRAConfig: Method(
        "VB-LoRA (arXiv 2405.15179)",
        VBLoRAContents,
        {"peft": peft_vblora.encode_dense, "peft-topk": peft_vblora.encode_topk},
        peft_vblora.decode,
    ),
    VeraConfig: Method("VeRA (arXiv 2310.11454)", VeRAContents, {"peft": peft_vera.encode}, peft_vera.decode),
    TiedLoraConfig: Method("Tied-LoRA (arXiv 2311.09578)", TiedLoRAContents),
    LoraConfig: Method("LoRA (arXiv 2106.09685)", LoRAContents, {"peft": peft_lora.encode}, peft_lora.decode),
}
# PEFT's formats that hold the update of any method.
ANY_METHOD: dict[str, PeftEncoder] = {"lora": peft_lora.encode}

PEFT_DECODERS: dict[str, PeftDecoder] = {
    config.peft_type: method.peft_decoder
    for config, method in METHODS.items()
    if config.peft_type is not None and method.peft_decoder is not None
}


def encode_for_peft(contents: Contents, form: str, base_model: str | None) -> tuple[JsonObject, dict[str, Tensor]]:
    """The config and the tensors of PEFT's files in one of the forms that are not our own.

    Raises:
        ValueError: the method does not have ``form``, or the form cannot hold these contents.
    """
    encoders = {**METHODS[type(contents.config)].peft_encoders, **ANY_METHOD}
    if form not in encoders:
        method = METHODS[type(contents.config)].title.partition(" (")[0]
        raise ValueError(f'`form` is "{form}", which {method} does not have; form="lora" holds the same update.')
    return encoders[form](contents, base_model)
