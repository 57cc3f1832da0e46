"""Our own format, in two forms.

============  =========================================================================================
form          tensors of a VB-LoRA, in addition to the bank's (``bank.vectors``, ``bank.scales``)
============  =========================================================================================
``deploy``    ``indices`` (bits, packed) and ``weights`` ``(S, k)``
``resume``    ``logits.lengths`` ``(S,)`` and ``logits.values``: the part of each row that training changed, the seed draws the
              rest; or ``logits`` ``(S, M)`` and ``candidates`` where the seed is unknown. ``exhausted`` (bits, packed), and
              ``scales`` ``(S,)`` with ``train_scales``; ``deploy`` has them in its weights
============  =========================================================================================

For the other methods both forms hold the adapter's parameters by their names in it, and VeRA's projections ``A`` and ``B``
unless ``save_projection`` is False and the key draws the same. Tensors trained in addition to the adapter are ``beside.NAME``.

Everything else is JSON, in one key of the file's metadata. ``adapter_config.json`` repeats it for people. Two files cannot be
replaced at the same time, so the tensors' file alone counts.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters import Target
from ..bank import BankFile, VectorBank
from ..config import METHODS as CONFIGS
from ..config import AdapterConfig
from ..distributed import gather_to_cpu
from .contents import Contents
from .formats import METHODS
from .json_objects import Json, JsonObject, as_list, as_type, field, optional_field, shortened

FORMS = ("resume", "deploy")
METADATA = "vblora"  # the key
# No type of PEFT's. Programs that look up the type of an adapter name it in their error, or pass the folder by.
PEFT_TYPE = "not PEFT's: load with vblora.load, or convert with vblora convert"
VERSION = 1
_TARGET_KINDS = ("linear", "embedding", "convolution")
_EXTRA = "beside."


def encode(
    contents: Contents, form: str, *, bank_dtype: torch.dtype | None = None, bank_file: BankFile | None = None
) -> tuple[JsonObject, dict[str, Tensor]]:
    """The description and the tensors of ``contents``. A bank that is in ``bank_file`` is left out and named by its hash.

    Raises:
        ValueError: a resume form of contents that cannot train, or with a rounded bank.
    """
    tensors = contents.encode(form, bank_dtype, bank_file)
    extra_parameters, aliases = _untied(contents.extra_parameters)
    tensors |= {_EXTRA + name: tensor for name, tensor in extra_parameters.items()}
    description: JsonObject = {
        "format": "vblora",
        "peft_type": PEFT_TYPE,
        "version": VERSION,
        "form": form,
        "method": contents.config.method,
        "config": contents.config.to_dict(),
        "targets": [_encode_target(target) for target in contents.targets],
        "aliases": dict(aliases),
        "bank_file": None if bank_file is None else {"name": bank_file.name, "sha256": bank_file.sha256},
    }
    return description, tensors


class Description(NamedTuple):
    """What the description of an adapter says.

    Attributes:
        aliases: further names of extra parameters, and the first name of each.
        bank_file: name and SHA-256 of the file that holds the bank, if it is not in the adapter's own.
    """

    config: AdapterConfig
    targets: tuple[Target, ...]
    form: str
    aliases: dict[str, str]
    bank_file: tuple[str, str] | None


def decode(description: JsonObject, tensors: dict[str, Tensor], bank: VectorBank | None) -> Contents:
    """The contents that :func:`encode` was called with; not checked yet.

    Args:
        bank: the bank that the description names by its hash, if it names one.

    Raises:
        ValueError: the version is unknown, a field or tensor is missing, unknown or invalid, or ``bank`` is another one.
    """
    config, targets, form, aliases, bank_file = describe(description)
    contents_class = METHODS[type(config)].contents
    vectors = _vectors_of(bank_file, bank, contents_class, type(config).__name__)
    tensors = dict(tensors)
    extra_parameters = {
        name.removeprefix(_EXTRA): tensors.pop(name) for name in list(tensors) if name.startswith(_EXTRA)
    }
    if missing := sorted(set(aliases.values()) - extra_parameters.keys()):
        raise ValueError(f"it lacks tensor `{_EXTRA}{missing[0]}`.")
    extra_parameters |= {alias: extra_parameters[name] for alias, name in aliases.items()}
    return contents_class.decode(config, targets, tensors, form, vectors, extra_parameters)


def describe(description: JsonObject) -> Description:
    """What a description says, without the tensors.

    Raises:
        ValueError: the version is unknown, or a field is missing or invalid.
    """
    version = description.get("version")
    if version != VERSION or isinstance(version, bool):
        newer = " A newer vblora wrote it: install that." * (isinstance(version, int) and version > VERSION)
        raise ValueError(f"it is of version {shortened(version)}; this vblora reads version {VERSION}.{newer}")
    try:
        method = field(description, "method", str)
        if method not in CONFIGS:
            raise ValueError(f"`method` is {method!r}; known are {', '.join(map(repr, CONFIGS))}.")
        config = CONFIGS[method].from_dict(field(description, "config", dict))
        targets = tuple(_decode_target(entry) for entry in as_list("`targets`", description.get("targets"), list))
        form = field(description, "form", str)
        aliases = {
            alias: as_type(f"alias `{alias}`", name, str) for alias, name in field(description, "aliases", dict).items()
        }
        bank_file = named_bank(description)
    except (TypeError, ValueError) as error:
        raise ValueError(f"its description is invalid: {error}") from None
    if form not in FORMS:
        raise ValueError(f"it is of form {form!r}; known are 'resume' and 'deploy'.")
    return Description(config, targets, form, aliases, bank_file)


def named_bank(description: JsonObject) -> tuple[str, str] | None:
    """Name and SHA-256 of the bank file that a description refers to, or None.

    Raises:
        ValueError: the field is invalid.
    """
    if (entry := optional_field(description, "bank_file", dict, {})) == {}:
        return None
    return field(entry, "name", str), field(entry, "sha256", str)


def _vectors_of(
    bank_file: tuple[str, str] | None, bank: VectorBank | None, contents: type[Contents], config: str
) -> Tensor | None:
    """The vectors of the bank that is in a file of its own; None if there is none."""
    if not contents.has_bank and (bank_file is not None or bank is not None):
        raise ValueError(f"it is for a {config}, which has no bank. Leave `bank` out.")
    if bank_file is None:
        if bank is not None:
            raise ValueError("it has a bank of its own, but `bank` was given. Leave that out.")
        return None
    name, sha256 = bank_file
    if bank is None:
        raise ValueError(f"its vector bank is in a file of its own, `{name}`, SHA-256 {sha256}. Pass that as `bank`.")
    if bank.file is None or bank.file.sha256 != sha256:
        given = "was not read from a file" if bank.file is None else f"is {bank.file.name}, SHA-256 {bank.file.sha256}"
        raise ValueError(f"its vector bank is `{name}`, SHA-256 {sha256}, but `bank` {given}.")
    if not bank.unchanged():
        raise ValueError(f"`bank` is not what its file, {bank.file.name}, holds any more. Read the file again.")
    return gather_to_cpu(bank.vectors)


def _encode_target(target: Target) -> list[Json]:
    """Name, widths, and what follows them in a :class:`Target`; without the defaults of a linear layer at the end."""
    values: list[Json] = [target.name, target.in_features, target.out_features]
    values += [target.kind, list(target.kernel), list(target.unusual)]
    while values[-1] in ("linear", []):
        values.pop()
    return values


def _decode_target(entry: list[Json]) -> Target:
    if not 3 <= len(entry) <= 6:
        raise ValueError(f"target {shortened(entry)} has {len(entry)} items, but must have 3 to 6.")
    defaults: list[Json] = ["linear", [], []]
    name, in_features, out_features, kind, kernel, unusual = entry + defaults[len(entry) - 3 :]
    what = f"of target {shortened(name)}"
    target = Target(
        as_type(f"the name {what}", name, str),
        as_type(f"the input width {what}", in_features, int),
        as_type(f"the output width {what}", out_features, int),
        as_type(f"the kind {what}", kind, str),
        tuple(as_list(f"the kernel {what}", kernel, int)),
        tuple(as_list(f"the list of unusual properties {what}", unusual, str)),
    )
    is_convolution = target.kind == "convolution"
    if (
        target.kind not in _TARGET_KINDS
        or is_convolution != bool(target.kernel)
        or (is_convolution and math.prod(target.kernel) != target.in_features)
    ):
        raise ValueError(
            f"{target} is impossible: its kind must be one of {', '.join(_TARGET_KINDS)}; only a convolution has a kernel, "
            "whose product is its input width."
        )
    return target


def _untied(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once under its first name, and the first name for each further name."""
    first: dict[Tensor, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        if first.setdefault(tensor, name) != name:
            aliases[name] = first[tensor]
    return {name: tensor for tensor, name in first.items()}, aliases
