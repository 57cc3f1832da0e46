"""Our own format, in two forms.

============  =========================================================================================
form          tensors beside the bank's (``bank.vectors``, ``bank.scales``) and those that trained beside
============  =========================================================================================
``deploy``    ``indices`` (bits, packed) and ``weights`` ``(S, k)``
``resume``    ``logits.lengths`` ``(S,)`` and ``logits.values``: of each row what training touched, the rest is drawn again;
              or ``logits`` ``(S, M)`` and ``candidates`` where no seed is known. ``exhausted`` (bits, packed)
============  =========================================================================================

That is VB-LoRA's. Of the other methods both forms hold the adapter's parameters by their names there, and VeRA's projections
``A`` and ``B`` unless ``save_projection`` is False and they are what their key draws.

Everything else is JSON, in one key of the file's metadata. The same JSON stands in ``adapter_config.json``, for people: two
files cannot be replaced at once, so one of them says all.
"""

import math
from dataclasses import astuple, replace

import torch
from torch import Tensor

from ..adapters import Target
from ..adapters.vblora import Deployed, Trained, candidate_dtype
from ..bank import BankFile, VectorBank, decode_vectors, encode_vectors
from ..config import METHODS, VBLoRAConfig
from ..distributed import gather_to_cpu
from .contents import Contents, VBLoRAContents, check_tensor
from .flat import FlatContents, with_projection
from .packing import pack_bits, pack_prefixes, unpack_bits, unpack_prefixes

FORMS = ("resume", "deploy")
METADATA = "vblora"  # the key
VERSION = 1
_TARGET_KINDS = ("linear", "embedding", "convolution")
_BANK, _EXTRA = "bank.", "beside."


def encode(
    contents: Contents, form: str, *, bank_dtype: torch.dtype | None = None, bank_file: BankFile | None = None
) -> tuple[dict, dict[str, Tensor]]:
    """The description and the tensors of ``contents``; those of a bank that stands in ``bank_file`` stay there.

    Raises:
        ValueError: a resume form of what does not train, or with a rounded bank.
    """
    config = contents.config
    if isinstance(contents, FlatContents):
        if bank_dtype is not None:
            raise ValueError(f"`bank_dtype` is {bank_dtype}, but a {type(config).__name__} has no bank.")
        tensors = dict(contents.stored())
    else:
        tensors = _encode_rows(contents, form, bank_dtype)
        if bank_file is None:
            tensors |= {_BANK + name: tensor for name, tensor in encode_vectors(contents.bank, bank_dtype).items()}
    extra_parameters, aliases = _untied(contents.extra_parameters)
    tensors |= {_EXTRA + name: tensor for name, tensor in extra_parameters.items()}
    description = {
        "format": "vblora",
        "version": VERSION,
        "form": form,
        "method": config.method,
        "config": config.to_dict(),
        "targets": [_without_defaults(astuple(target)) for target in contents.targets],
        "aliases": aliases,
        "bank_file": None if bank_file is None else {"name": bank_file.name, "sha256": bank_file.sha256},
    }
    return description, tensors


def decode(description: dict, tensors: dict[str, Tensor], bank: VectorBank | None) -> Contents:
    """What :func:`encode` was given. ``bank``: the one that the description names by its hash, if it names one.

    Raises:
        ValueError: it is of a version that is not known, something is missing or too much, or ``bank`` is another one.
    """
    if description.get("version") != VERSION:
        raise ValueError(f"it is of version {description.get('version')}; this vblora reads version {VERSION}.")
    try:
        config = METHODS[description["method"]].from_dict(description["config"])
        targets = tuple(_target(*entry) for entry in description["targets"])
        form, aliases, bank_file = description["form"], dict(description["aliases"]), description["bank_file"]
        hash_of_bank = None if bank_file is None else (str(bank_file["name"]), str(bank_file["sha256"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its description is not what it should be: {error!r}.") from None
    if form not in FORMS:
        raise ValueError(f"it is of form {form!r}; known are 'resume' and 'deploy'.")
    tensors = dict(tensors)
    extra_parameters = {
        name.removeprefix(_EXTRA): tensors.pop(name) for name in list(tensors) if name.startswith(_EXTRA)
    }
    if missing := sorted(set(aliases.values()) - extra_parameters.keys()):
        raise ValueError(f"it lacks tensor `{missing[0]}`.")
    extra_parameters |= {alias: extra_parameters[name] for alias, name in aliases.items()}
    if not isinstance(config, VBLoRAConfig):
        if hash_of_bank is not None or bank is not None:
            raise ValueError(f"it is a {type(config).__name__}'s, which has no bank. Leave `bank` out.")
        return FlatContents(
            config, targets, with_projection(config, targets, tensors), extra_parameters=extra_parameters
        )
    banks = {name.removeprefix(_BANK): tensors.pop(name) for name in list(tensors) if name.startswith(_BANK)}
    vectors = _bank_of(hash_of_bank, banks, bank)
    contents = VBLoRAContents(
        config, targets, vectors, Deployed(torch.empty(0), torch.empty(0)), extra_parameters=extra_parameters
    )
    contents.check_layout()
    rows = _decode_trained(contents, tensors) if form == "resume" else _decode_deployed(contents, tensors)
    if form == "deploy" and vectors.dtype != torch.float64:
        contents = replace(contents, bank=vectors.float())
        if rows.weights.is_floating_point():
            rows = rows._replace(weights=rows.weights.float())
    for name in tensors:
        raise ValueError(f"it has an unknown tensor `{name}`.")
    return replace(contents, rows=rows)


def _encode_rows(contents: VBLoRAContents, form: str, bank_dtype: torch.dtype | None) -> dict[str, Tensor]:
    rows = contents.rows
    if form == "deploy":
        deployed = contents.deployed()
        indices = pack_bits(deployed.indices, _bits(contents.config.num_vectors))
        return {"indices": indices, "weights": deployed.weights}
    if isinstance(rows, Deployed):
        raise ValueError('`form` is "resume", but the adapter is a deployed one, without logits to go on with.')
    if bank_dtype is not None:
        raise ValueError(f'`bank_dtype` is {bank_dtype}, but `form` "resume" keeps the bank as it is.')
    return _encode_trained(contents, rows)


def _encode_trained(contents: VBLoRAContents, rows: Trained) -> dict[str, Tensor]:
    tensors = {}
    if rows.seed is None:
        tensors["logits"] = rows.logits
        if rows.candidates is not None:
            tensors["candidates"] = rows.candidates
    else:
        initial = contents.initial(rows.seed)
        values = rows.logits if rows.candidates is not None else rows.logits.gather(1, initial.candidates.long())
        tensors["logits.lengths"], tensors["logits.values"] = pack_prefixes(values, initial.logits)
    if rows.exhausted is not None:
        tensors["exhausted"] = pack_bits(rows.exhausted, 1)
    return tensors


def _decode_trained(contents: VBLoRAContents, tensors: dict[str, Tensor]) -> Trained:
    seed = contents.config.seed
    exhausted = None
    if "exhausted" in tensors:
        exhausted = unpack_bits(tensors.pop("exhausted"), 1, contents.num_rows).bool()
    if seed is None:
        return Trained(_take(tensors, "logits"), tensors.pop("candidates", None), exhausted)
    lengths, values = _take(tensors, "logits.lengths"), _take(tensors, "logits.values")
    check_tensor("logits.lengths", lengths, (contents.num_rows,), floating=False)  # before so many rows are drawn
    initial = contents.initial(seed)
    logits = unpack_prefixes(lengths, values, initial.logits)
    if contents.has_candidates:
        return Trained(logits, initial.candidates, initial.exhausted if exhausted is None else exhausted, seed)
    return Trained(torch.empty_like(logits).scatter_(1, initial.candidates.long(), logits), seed=seed)


def _decode_deployed(contents: VBLoRAContents, tensors: dict[str, Tensor]) -> Deployed:
    config = contents.config
    indices = unpack_bits(_take(tensors, "indices"), _bits(config.num_vectors), contents.num_rows * config.topk).view(
        -1, config.topk
    )
    return Deployed(indices.to(candidate_dtype(config.num_vectors)), _take(tensors, "weights"))


def _bank_of(file: tuple[str, str] | None, tensors: dict[str, Tensor], bank: VectorBank | None) -> Tensor:
    if file is None:
        if bank is not None:
            raise ValueError("it has a bank of its own, but `bank` was given. Leave that out.")
        if not tensors:
            raise ValueError("it lacks its vector bank, tensor `bank.vectors`.")
        return decode_vectors(tensors)
    if tensors:
        raise ValueError("it has a bank of its own, and names a file of one.")
    name, sha256 = file
    if bank is None:
        raise ValueError(f"its vector bank is in a file of its own, `{name}`, SHA-256 {sha256}. Pass that as `bank`.")
    if bank.file is None or bank.file.sha256 != sha256:
        given = "was not read from a file" if bank.file is None else f"is {bank.file.name}, SHA-256 {bank.file.sha256}"
        raise ValueError(f"its vector bank is `{name}`, SHA-256 {sha256}, but `bank` {given}.")
    if not bank.unchanged():
        raise ValueError(f"`bank` is not what its file, {bank.file.name}, holds any more.")
    return gather_to_cpu(bank.vectors)


def _without_defaults(values: tuple) -> list:
    """Most targets are linear layers, of which name and widths say all."""
    values = list(values)
    while values[-1] in ("linear", ()):
        values.pop()
    return values


def _target(
    name: str, in_features: int, out_features: int, kind: str = "linear", kernel: list = (), unusual: list = ()
) -> Target:
    kernel = tuple(map(int, kernel))
    if (
        kind not in _TARGET_KINDS
        or (kind == "convolution") != bool(kernel)
        or (kernel and math.prod(kernel) != in_features)
    ):
        raise ValueError(f"layer {name!r}: {kind!r}, {kernel}")
    return Target(str(name), int(in_features), int(out_features), kind, kernel, tuple(map(str, unusual)))


def _take(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"it lacks tensor `{name}`.")
    return tensors.pop(name)


def _bits(num_vectors: int) -> int:
    """Of an index of a bank vector."""
    return max(1, (num_vectors - 1).bit_length())


def _untied(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, under its first name, and what other names there are for it."""
    first: dict[Tensor, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        if first.setdefault(tensor, name) != name:
            aliases[name] = first[tensor]
    return {name: tensor for tensor, name in first.items()}, aliases
