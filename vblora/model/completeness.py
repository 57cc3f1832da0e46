"""Whether an adapter's file will hold what is trained: checked before it is trained and before it is saved."""

import warnings
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..errors import VBLoRAWarning, listed
from ..layers.adapted import AdaptedLayer
from ..layers.weights import passes_gradients
from .peft_guard import refuse_peft_layers

if TYPE_CHECKING:
    from .attached import AttachedAdapter
    from .record import AdaptedModel

Link = tuple[dict[str, Any], str, Any]  # a module's children or parameters, a name in them, and what has it

_LARGE = 2**16  # elements of a buffer whose values are not copied; statistics have one per channel


class _Buffer(NamedTuple):
    tensor: Tensor
    version: int
    values: Tensor | None


class BufferSnapshot:
    """The persistent buffers of a model, to tell later which of them changed."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers: dict[tuple[nn.Module, str], _Buffer] = {}
        for module in model.modules():
            for name, tensor in module._buffers.items():
                if tensor is not None and name not in module._non_persistent_buffers_set and not tensor.is_meta:
                    values = tensor.detach().clone() if tensor.numel() <= _LARGE else None
                    self._buffers[module, name] = _Buffer(tensor, tensor._version, values)

    def changed(self) -> list[tuple[nn.Module, str]]:
        """The buffers that changed since, by their modules and names. Ones that were moved or cast count by their values."""
        return [
            place for place, buffer in self._buffers.items() if _has_changed(place[0]._buffers.get(place[1]), buffer)
        ]


def _has_changed(now: Tensor | None, then: _Buffer) -> bool:
    if now is None:
        return False
    if then.values is None:
        return now is then.tensor and now._version != then.version
    # Batch normalization updates its statistics without counting versions.
    return now.shape != then.values.shape or not torch.equal(now, then.values.to(now.device, now.dtype))


def check_completeness(whole: nn.Module, record: "AdaptedModel", attached: "AttachedAdapter") -> None:
    """Refuses to save an adapter whose layers or modules the model has lost, and warns of what trained but is not part of it.

    Args:
        whole: the injected model, or one that contains it.

    Raises:
        ValueError: a layer or a module that the adapter trains was replaced in the model, or PEFT has adapted the model, too. The
            message names it.
    """
    names = {module: name for name, module in record.model.named_modules()}
    if lost := _lost(record, attached, names):
        raise _replaced(lost, attached)
    refuse_peft_layers(record.model)
    _refuse_new_ties(record, attached)
    _check_additions(record)
    _warn_of_moved(record, attached, names)
    others = _trained_besides(whole, record)
    swapped = {(extra.module, extra.name) for adapter in record.adapters.values() for extra in adapter.extra.values()}
    others += [
        f"{names[module]}.{own_name}".lstrip(".")
        for module, own_name in record.buffers.changed()
        if (module, own_name) not in swapped and module in names
    ]
    if others:
        warnings.warn(
            f"{listed(others)} changed in training or can, but no adapter file holds them: a loaded adapter gets the base "
            "model's. Name their modules in `modules_to_save`, keep them from changing (`requires_grad_(False)`, `eval()`), or "
            "save what is outside of the injected model yourself.",
            VBLoRAWarning,
            stacklevel=4,
        )


def warn_of_thawed(record: "AdaptedModel") -> None:
    """Warns once, in a training forward, if parameters of the base model require gradients again, which inject has frozen.

    It looks at all of them, so only in forwards 1, 2, 4, 8 and so on: you may also thaw some in the middle of training.
    """
    if record.warned_of_thawed:
        return
    record.training_forwards += 1
    if record.training_forwards & (record.training_forwards - 1):
        return
    if thawed := _trained_besides(record.model, record):
        record.warned_of_thawed = True
        warnings.warn(
            f"{listed(thawed)} of the base model require gradients, such as after model.requires_grad_(True). vblora.inject has "
            "frozen them, because no adapter file holds them. Freeze them again, or name their modules in `modules_to_save`.",
            VBLoRAWarning,
            stacklevel=3,
        )


def _trained_besides(model: nn.Module, record: "AdaptedModel") -> list[str]:
    """The names of a model's parameters that require gradients, but are no adapter's."""
    own = {id(p) for adapter in record.adapters.values() for p in adapter.parameters.values()}
    return [
        name.replace(".base_layer.", ".")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in own
    ]


def check_replacements(record: "AdaptedModel", adapters: Iterable["AttachedAdapter"]) -> None:
    """Refuses to train adapters that could not be saved, because a module or a tensor that they train was replaced.

    Warns once of layers that were taken out of the model. Costs little unless the model has changed since the last call.

    Raises:
        ValueError: a module or a tensor was replaced.
        TypeError: a layer was quantised so that it passes no gradient.
    """
    for attached in adapters:
        if attached.links and all(slots.get(name) is value for slots, name, value in attached.links):
            continue
        modules = set(record.model.modules())
        if any(parameter.requires_grad for parameter in attached.parameters.values()):
            known = {*record.names, *(extra.module for extra in attached.extra.values())}
            lost = _lost(record, attached, modules)
            at_their_places = {name: module for name, module in record.model.named_modules() if name in lost}
            if replaced := [name for name, module in at_their_places.items() if module not in known]:
                raise _replaced(replaced, attached)
            _refuse_blocked_gradients(record, attached)
            _refuse_new_ties(record, attached)
            _check_additions(record)
            if lost:
                warnings.warn(
                    f"{listed(lost)} that adapter {attached.name!r} trains were taken out of the model. vblora.save refuses "
                    "such an adapter, because it does not fit the base model. Change the model first, then inject.",
                    VBLoRAWarning,
                    stacklevel=3,
                )
        attached.links = _links(record, attached, modules)


def _refuse_blocked_gradients(record: "AdaptedModel", attached: "AttachedAdapter") -> None:
    """Refuses layers that something quantised after injection so that no gradient reaches the layers before them."""
    for layer in attached.layers:
        if not passes_gradients(cast(Tensor, layer.base_layer.weight)):
            raise TypeError(
                f"`{record.names[layer][0]}` also quantises its input since something quantised the model after vblora.inject, "
                "and passes no gradient to the layers before it. Quantise only weights, as torchao's Int8WeightOnlyConfig does."
            )


def _warn_of_moved(record: "AdaptedModel", attached: "AttachedAdapter", names: dict[nn.Module, str]) -> None:
    """Warns of layers whose names in the file are those of other modules now, because the model's blocks were reordered."""
    taken = set(names.values())
    before = {layer: record.names[layer][0] for layer in attached.layers}
    moved = [name for layer, name in before.items() if names[layer] not in record.names[layer] and name in taken]
    if moved:
        warnings.warn(
            f"{listed(moved)} are names of other modules now than when the adapter was injected. Its file holds the layers under "
            "the names that they had: load it into the model as it was, and change the order of its modules then.",
            VBLoRAWarning,
            stacklevel=5,
        )


def _lost(record: "AdaptedModel", attached: "AttachedAdapter", modules: Container[nn.Module]) -> list[str]:
    """The layers and modules that the adapter trains and that are not among ``modules``."""
    lost = [record.names[layer][0] for layer in attached.layers if layer not in modules]
    lost += [name.rpartition(".")[0] for name, extra in attached.extra.items() if extra.module not in modules]
    return list(dict.fromkeys(lost))


def _replaced(lost: list[str], attached: "AttachedAdapter") -> ValueError:
    return ValueError(
        f"the model no longer contains {listed(lost)} that adapter {attached.name!r} trains: something "
        "replaced it after vblora.inject, such as resize_token_embeddings. Change the model first, then inject."
    )


def _links(record: "AdaptedModel", attached: "AttachedAdapter", modules: set[nn.Module]) -> "list[Link]":
    """What has to stay as it is so that the model keeps the layers, modules and tensors that the adapter trains."""
    parents = {child: (parent, name) for parent in modules for name, child in parent._modules.items()}
    links: dict[tuple[int, str], Link] = {}
    for module in (*attached.layers, *(extra.module for extra in attached.extra.values()), *record.statistics.modes):
        while module in parents and module is not record.model:
            parent, name = parents[module]
            links[id(parent), name] = parent._modules, name, module
            module = parent
    swapped_in = [extra for extra in attached.extra.values() if extra.swapped_in]
    # With what is tied in the base model to a tensor that the adapter replaces: code that ties them again replaces it there.
    tensors = {tensor for extra in swapped_in for tensor in (extra.replacement, extra.original)}
    for module in modules:
        for name, tensor in module._parameters.items():
            if tensor in tensors:
                links[id(module), f"parameter {name}"] = module._parameters, name, tensor
    return list(links.values())


def _check_additions(record: "AdaptedModel") -> None:
    """Refuses a normalization layer in the place of a frozen one, and warns of copies of adapted layers."""
    if replaced := record.statistics.replaced(record.model):
        raise ValueError(
            f"something replaced {listed(replaced)} after vblora.inject, such as SyncBatchNorm.convert_sync_batchnorm. The new "
            "layer is not frozen: training would change its statistics, which no adapter file holds. Convert the model first, "
            "then inject."
        )
    copies = [
        name
        for name, module in record.model.named_modules()
        if type(module) is AdaptedLayer and module not in record.names
    ]
    if copies:
        warnings.warn(
            f"{listed(copies)} became part of the model after vblora.inject, as a copy of an adapted layer. No optimizer trains "
            "the copy of the adapter in it, and no file holds it. Copy such blocks first, then inject.",
            VBLoRAWarning,
            stacklevel=5,
        )


def _refuse_new_ties(record: "AdaptedModel", attached: "AttachedAdapter") -> None:
    """Refuses a tensor that was tied after injection to one that the adapter trains: a loaded adapter would part them again."""
    extra = {(extra.module, extra.name) for extra in attached.extra.values()}
    trained = {extra.replacement: name for name, extra in attached.extra.items() if extra.trains and extra.swapped_in}
    for prefix, module in record.model.named_modules():
        for own, tensor in module._parameters.items():
            if tensor in trained and (module, own) not in extra:
                raise ValueError(
                    f"`{trained[tensor]}`, which adapter {attached.name!r} trains, and `{prefix}.{own}` have become one tensor: "
                    "something tied them after vblora.inject, such as resize_token_embeddings. Change the model first, then "
                    "inject; or name both in `modules_to_save`."
                )
