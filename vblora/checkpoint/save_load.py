"""Between a model and a folder: ``vblora.save`` and ``vblora.load``."""

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..bank import VectorBank
from ..distributed import gather_to_cpu, is_sharded, rank, reshard, shard_like
from ..layers.kinds import Conv1D, target_of
from ..model.attached import AttachedAdapter
from ..model.completeness import check_completeness
from ..model.inject import Plan
from ..model.lookup import adapted_model, adapted_models, attached_adapter, refuse_if_disabled, refuse_if_merged
from ..model.peft_guard import refuse_peft_layers
from ..model.targets import base_modules
from . import native
from .base_tensors import embeddings_to_save, split_base_tensors, two_values
from .contents import Contents
from .folder import FORMS, TENSORS_FILE, encode, read, write
from .formats import METHODS
from .peft.experts import warn_of_renamed_targets
from .prefixes import fit_names

_Model = TypeVar("_Model", bound=nn.Module)


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    form: str | None = None,
    bank_dtype: torch.dtype | None = None,
    save_embedding_layers: bool | str = "auto",
) -> None:
    """Writes a model's adapter into a folder.

    Each file is written under a temporary name, synced and renamed, so an interrupted save leaves the old adapter or the new
    one. A bank that came from a file and has not changed since is not written again: the folder names the file's SHA-256.
    If FSDP2 has sharded the model, all processes must call this function; the first one writes.

    Args:
        model: an injected model.
        adapter_name: the adapter to save; None is the active one.
        directory: the folder, created if it does not exist.
        form: what to write. None is ``"resume"`` for an adapter that can train and ``"deploy"`` for one that was loaded from
            that form or whose config says ``save_only_topk_weights``.

            - ``"resume"``: everything that training needs to continue exactly. For VB-LoRA the bank, the seed of the logits, and
              the logits that training changed.
            - ``"deploy"``: what inference needs to give the same outputs, bit for bit. For VB-LoRA the bank, and k indices and k
              weights per sub-vector; for the other methods the same as ``"resume"``.
            - ``"peft"``: PEFT's format of VB-LoRA (all logits, so that PEFT can train), VeRA or LoRA.
            - ``"peft-topk"``: PEFT's format of VB-LoRA for inference.
            - ``"lora"``: the same update as a plain LoRA, for PEFT and for servers. Any method.

            The last three include a shared bank.
        bank_dtype: rounds the bank of a deploy form, to make it smaller: ``torch.bfloat16``, ``torch.float16``, or ``torch.int8``
            with one float32 scale per bank vector. None keeps it exactly.
        save_embedding_layers: whether the file also holds the base model's input and output embeddings, as in PEFT. ``"auto"``
            stores them if the vocabulary was resized after the model was loaded, because no other file has their new rows.

    Raises:
        ValueError: the model has no such adapter, or has lost a module that this trains; or ``form`` or ``bank_dtype`` does not
            suit it.
        NotADirectoryError: ``directory`` is a file.
    """
    write(
        files_to_save(
            model,
            directory,
            adapter_name=adapter_name,
            form=form,
            bank_dtype=bank_dtype,
            save_embedding_layers=save_embedding_layers,
        )
    )


def files_to_save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    form: str | None = None,
    bank_dtype: torch.dtype | None = None,
    save_embedding_layers: bool | str = "auto",
) -> dict[Path, bytes]:
    """What :func:`save` writes: none in other processes than the first, if FSDP2 has sharded the model."""
    source = attached_adapter(model, adapter_name)
    if form not in (None, *FORMS):
        raise ValueError(f"`form` is {form!r}; allowed are {', '.join(map(repr, FORMS))}.")
    check_completeness(model, adapted_model(model), source)
    contents = contents_of(source)
    embeddings = embeddings_to_save(source.model, save_embedding_layers)
    copies = {tensor: gather_to_cpu(tensor) for tensor in embeddings.values()}  # tied ones stay one tensor
    own = {name: copies[tensor] for name, tensor in embeddings.items()}
    contents = replace(contents, extra_parameters=own | contents.extra_parameters)
    if form is None:
        deploy = getattr(source.config, "save_only_topk_weights", False)
        form = "resume" if contents.is_trainable and not deploy else "deploy"
    if form not in native.FORMS:
        warn_of_renamed_targets(source.model, [target.name for target in contents.targets])
    bank = _bank_of(source)
    bank_file = bank.file if bank is not None and bank_dtype is None and bank.unchanged() else None
    if rank() and any(is_sharded(tensor) for tensor in source.model.parameters()):
        return {}  # the first process writes
    name = getattr(getattr(source.model, "config", None), "_name_or_path", None)
    base_class = type(source.model)
    return encode(
        contents,
        directory,
        form=form,
        bank_dtype=bank_dtype,
        bank_file=bank_file,
        base_model=name or None,
        about={"auto_mapping": {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}},
    )


def load(
    model: _Model,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    bank: VectorBank | str | os.PathLike[str] | None = None,
    is_trainable: bool | None = None,
    train_kept: bool = False,
) -> _Model:
    """Loads a saved adapter into a model: into a base model, as :func:`vblora.inject` does, or over an adapter that it has.

    Everything in the folder is checked first. If the adapter does not fit, the model is not changed.

    Args:
        model: the base model, or a model with an adapter of the same config and form. The adapter's tensors are then
            overwritten, including those of a bank that it shares.
        directory: a folder written by :func:`save`, or by PEFT's ``save_pretrained`` for a LoRA, VeRA or VB-LoRA adapter. A
            VB-LoRA adapter can train if PEFT saved all its logits; with ``save_only_topk_weights`` it is a deploy form.
        adapter_name: the adapter to overwrite, or the name of a new one. None is the active adapter, or ``"default"`` in a
            base model.
        bank: the bank of an adapter that was saved without it: its path, or what :meth:`VectorBank.from_file` returned for this
            path, to share it among adapters. It stays frozen.
        is_trainable: whether the adapter's parameters require gradients. None: a new adapter's do not, and those of an
            existing adapter stay as they are.
        train_kept: make a deploy form trainable, with the k vectors of each row as its only candidates.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or does not fit the model; the bank is missing or another one; the form cannot train;
            or the model is merged, disabled, or on the meta device. The message names the file.
    """
    present = None
    for record in adapted_models(model):
        refuse_if_disabled(record.layers)
        refuse_if_merged(record.layers)
        if adapter_name is None or adapter_name in record.adapters:
            present = attached_adapter(model, adapter_name)
    path = Path(directory) / TENSORS_FILE
    if bank is not None and not isinstance(bank, VectorBank):
        bank = VectorBank.from_file(bank)
    contents, shares_bank = read(directory, bank, None if present is None else _bank_of(present))
    if train_kept:
        try:
            contents = contents.as_trainable()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if is_trainable and not contents.is_trainable:
        raise ValueError(
            f"{path} holds a deployed adapter: k weights per sub-vector, and no logits to train. Save with "
            'form="resume" to continue exactly, or load with train_kept=True to train with those k vectors as only candidates.'
        )
    try:
        contents = fit_names(contents, model)
        if present is None:
            _refuse_other_base(contents, model)
            plan = Plan(model, contents.config, "default" if adapter_name is None else adapter_name)
            _load_new(plan, contents, bank if shares_bank else None, bool(is_trainable))
        else:
            write_over(present, contents, is_trainable)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return model


def _refuse_other_base(contents: Contents, model: nn.Module) -> None:
    """Refuses an adapter of layers that the model lacks or has in other widths, before its config, which was for another model,
    is applied."""
    refuse_peft_layers(model)  # PEFT's layers stand where the adapter's were
    modules = base_modules(model)
    lacking = next((target.name for target in contents.targets if target.name not in modules), None)
    if lacking is not None:
        raise ValueError(
            f"it is for other layers than the model's: it updates `{lacking}`, but {type(model).__name__} has no such module."
        )
    with suppress(TypeError):  # a module that cannot be adapted, which `Plan` names
        contents.check_layers(tuple(target_of(target.name, modules[target.name]) for target in contents.targets))


def contents_of(source: AttachedAdapter) -> Contents:
    """The contents of a model's adapter. If it is sharded, all processes must call this."""
    source.adapter.refuse_offloaded()
    reshard(source.model)
    transposed = any(layer.kind is Conv1D for layer in source.layers)
    config = source.adapter.current_config(source.config)
    config = replace(config, fan_in_fan_out=transposed)  # seen from the layers, whatever the user wrote
    copies: dict[Tensor, Tensor] = {}  # tied parameters stay one tensor
    extra = source.extra_tensors()
    for tensor in extra.values():
        copies.setdefault(tensor, gather_to_cpu(tensor))
    extra_parameters = {name: copies[tensor] for name, tensor in extra.items()}
    return METHODS[type(config)].contents.of(config, source.adapter, extra_parameters)


def write_over(target: AttachedAdapter, contents: Contents, is_trainable: bool | None) -> None:
    """Overwrites a model's adapter with checked contents.

    Args:
        is_trainable: whether its parameters then require gradients. None leaves that as it is.

    Raises:
        ValueError: the contents do not fit the adapter, which is not changed.
    """
    adapter = target.adapter
    own = contents_of(target)
    contents.check_config(own.config)
    contents = contents.in_order(adapter.targets)
    contents, brought = split_base_tensors(_with_tied(contents, target), target.model, present=target.extra)
    _check_extra_parameters(
        contents, {name: (swap.module, swap.name, swap.replacement) for name, swap in target.extra.items()}
    )
    contents.check_sizes(own)
    _refuse_meta(any(parameter.is_meta for parameter in adapter.parameters()))
    with torch.no_grad():
        contents.write_over(adapter)
        for name, extra in target.extra.items():
            if name in contents.extra_parameters:
                extra.replacement.copy_(shard_like(contents.extra_parameters[name], extra.replacement))
    target.bring(brought, base_modules(target.model))
    target.has_learned = True
    if is_trainable is not None:
        target.requires_grad_(is_trainable)
    adapter.invalidate()


def _with_tied(contents: Contents, target: AttachedAdapter) -> Contents:
    """The contents with each base tensor under all its names that :meth:`AttachedAdapter.bring` has replaced."""
    given = dict(contents.extra_parameters)
    value_of = {target.extra[name].replacement: tensor for name, tensor in given.items() if name in target.extra}
    for name, extra in target.extra.items():
        if not extra.trains and name not in given and extra.replacement in value_of:
            given[name] = value_of[extra.replacement]
    return replace(contents, extra_parameters=given)


def _load_new(plan: Plan, contents: Contents, bank: VectorBank | None, is_trainable: bool) -> None:
    contents = contents.in_order(plan.targets)
    if is_trainable:
        plan.check_trainable()
    _refuse_meta(plan.device.type == "meta")
    contents, brought = split_base_tensors(contents, plan.model)
    _check_extra_parameters(contents, plan.extra_tensors)
    adapter = contents.adapter(plan.device, bank)
    with torch.no_grad():
        for name, (_, _, replacement) in plan.extra_tensors.items():
            if name in contents.extra_parameters:
                replacement.copy_(contents.extra_parameters[name])
            replacement.requires_grad_(is_trainable and replacement.is_floating_point() and replacement.requires_grad)
    adapter.requires_grad_(is_trainable)
    if bank is not None:
        bank.requires_grad_(False)
    attached = plan.apply(adapter)
    attached.bring(brought, base_modules(plan.model))
    attached.has_learned = True


def _bank_of(source: AttachedAdapter) -> VectorBank | None:
    bank = getattr(source.adapter, "bank", None)
    return bank if isinstance(bank, VectorBank) else None


def _refuse_meta(is_meta: bool) -> None:
    if is_meta:
        raise ValueError(
            "`model` is on the meta device, which holds no values to load into. Materialise it first with `to_empty`."
        )


def _check_extra_parameters(contents: Contents, places: dict[str, tuple[nn.Module, str, Tensor]]) -> None:
    """``places``: by name in the model, the module, the name in the module, and the tensor to be overwritten."""
    optional = {name for name, (module, own, _) in places.items() if own in module._non_persistent_buffers_set}
    wanted = {name: replacement for name, (_, _, replacement) in places.items()}
    given = contents.extra_parameters
    for name in sorted((wanted.keys() ^ given.keys()) - (optional - given.keys())):
        raise ValueError(f"it {'lacks' if name in wanted else 'has an unknown'} tensor `{name}`.")
    for name, tensor in given.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"`{name}` is {tuple(tensor.shape)}, but must be {tuple(wanted[name].shape)}.")
        if tensor.is_floating_point() != wanted[name].is_floating_point():
            raise ValueError(f"`{name}` is {tensor.dtype}, but the model's is {wanted[name].dtype}.")
    first: dict[int, str] = {}
    for name, tensor in given.items():
        other = first.setdefault(id(wanted[name]), name)
        if not torch.equal(tensor, given[other]):
            raise two_values(other, name)
