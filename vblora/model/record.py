"""The adapters of a model: which it has, which are active, switching them off, taking them out."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..adapters import Adapter, Factors
from ..config import AdapterConfig
from ..layers.adapted import AdaptedLayer, Replaced, Update
from ..layers.kinds import compute_dtype
from ..layers.rows import RowAdapters
from ..layers.weights import is_packed, keep_unpacked, let_pack
from . import mixed_batch

ADAPTERS_ATTRIBUTE = "vblora"  # name of the adapters among an injected model's modules


class Adapters(nn.ModuleDict):
    """A model's adapters by their names."""

    def forward(self, x: object, *_args, **_kwargs) -> object:
        """``x``: an ``nn.Sequential`` that was injected calls this, one of its modules now, as its last layer."""
        return x


class AttachedAdapter:
    """One adapter of a model: to run it, to save it, and to undo it.

    Attributes:
        layers: in the order of the adapter's targets.
        replaced: what trains beside the adapter, by its name in the model.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        config: AdapterConfig,
        adapter: Adapter,
        layers: list[AdaptedLayer],
        replaced: dict[str, Replaced],
    ) -> None:
        self.model = model
        self.name = name
        self.config = config
        self.adapter = adapter
        self.layers = layers
        self.replaced = replaced
        self.active = False
        self.trainable_names: list[
            str
        ] = []  # what requires gradients while it is active; when it is, its parameters say so

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's, and what trains beside it."""
        stand_ins = {name: replaced.stand_in for name, replaced in self.replaced.items()}
        extra = {f"extra.{name}": tensor for name, tensor in stand_ins.items() if isinstance(tensor, nn.Parameter)}
        return dict(self.adapter.named_parameters()) | extra

    def requires_grad_(self, requires_grad: bool) -> None:
        """Has all parameters require gradients, or none; from when it is active on."""
        if self.active:
            for parameter in self.parameters.values():
                parameter.requires_grad_(requires_grad and parameter.is_floating_point())
        else:
            self.trainable_names = [
                name for name, p in self.parameters.items() if requires_grad and p.is_floating_point()
            ]

    def note_trainable_names(self) -> None:
        self.trainable_names = [name for name, parameter in self.parameters.items() if parameter.requires_grad]

    @property
    def released(self) -> bool:
        """Whether it was merged for good."""
        return all(layer.released and self.name in layer.merged for layer in self.layers)

    def begin_forward(self) -> None:
        if any(self.name in layer.running for layer in self.layers):
            self.adapter.begin_forward(self._compute_dtype())

    def composed(self) -> list[Factors]:
        """The factors of its layers, for inference."""
        return self.adapter.all_factors(self._compute_dtype())

    def _compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.layers[0].weight.device, self._layers_dtype())

    def _layers_dtype(self) -> torch.dtype:
        """The widest among the layers' dtypes, or among the model's where packed layers have none. Remembered, but not in a
        graph, which would be another one then."""
        remember = not torch.compiler.is_compiling()
        dtype = self.adapter.compute_dtype if remember else None
        if dtype is None:
            dtypes = [layer.weight.dtype for layer in self.layers if not layer.packed] or _dtypes_of(self.model)
            dtype = functools.reduce(torch.promote_types, dtypes)
            if remember:
                self.adapter.compute_dtype = dtype
        return dtype


class AdaptedModel:
    """What is remembered of an injected model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapters: dict[str, AttachedAdapter] = {}
        self.names: dict[AdaptedLayer, list[str]] = {}  # of each layer; several if the model uses it in several places
        self.trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.unpacked = keep_unpacked(model)
        self._active: tuple[AttachedAdapter, ...] = ()
        self._hooks: list[RemovableHandle] = []
        self._rows_differ = False
        self.row_source: Callable[[Sequence[str | None]], RowAdapters] | None = None  # of a store that is attached

    @classmethod
    def install(cls, model: nn.Module) -> "AdaptedModel":
        """Freezes a base model, and makes it one that may have adapters."""
        record = cls(model)
        model.requires_grad_(False)
        model.add_module(ADAPTERS_ATTRIBUTE, Adapters())
        model._vblora_adapted_model = record
        record.register_hooks()
        return record

    @property
    def layers(self) -> list[AdaptedLayer]:
        return list(self.names)

    @property
    def active(self) -> list[str]:
        return [injected.name for injected in self._active]

    def register_hooks(self) -> None:
        self._hooks = [
            self.model.register_forward_pre_hook(self._begin_forward, with_kwargs=True),
            self.model.register_forward_hook(self._end_forward, always_call=True),
        ]
        mixed_batch.install_generate(self)

    def _begin_forward(self, _model: nn.Module, args: tuple, kwargs: dict) -> None:
        # It takes the argument out of `kwargs`, which are the forward's own. A model that never saw the argument has a graph
        # without a trace of this.
        if (mixed_batch.ARGUMENT in kwargs or self._rows_differ) and mixed_batch.begin_forward(self, args, kwargs):
            return
        for injected in self._active:
            injected.begin_forward()

    def _end_forward(self, _model: nn.Module, _args: tuple, _output: object) -> None:
        if self._rows_differ:
            mixed_batch.end_forward(self)
        for injected in self._active:
            injected.adapter.end_forward()

    def rows(self, names: Sequence[str | None]) -> RowAdapters:
        """The adapters of a batch's rows, by their names."""
        refuse_if_disabled(self.layers)
        refuse_if_merged(self.layers)
        if self.row_source is not None:
            return self.row_source(names)
        return mixed_batch.attached_rows(self, names)

    def let_rows_differ(self) -> None:
        """Has layers look whether their rows have adapters of their own, from now on."""
        if not self._rows_differ:
            self._rows_differ = True
            for layer in self.layers:
                layer.let_rows_differ()

    def in_place(self) -> list[Replaced]:
        """What stands in the base model's place now."""
        every = [replaced for injected in self.adapters.values() for replaced in injected.replaced.values()]
        return [replaced for replaced in every if replaced.in_place]

    def wrap(self, layer: nn.Module, names: list[str]) -> AdaptedLayer:
        """The adapted layer around a layer of the base model."""
        present = self.model.get_submodule(names[0])
        if present is not layer:  # another adapter has it, too
            return present
        adapted = AdaptedLayer(layer)
        if self._rows_differ:
            adapted.let_rows_differ()
        self.names[adapted] = names
        for name in names:
            _set_module(self.model, name, adapted)
        return adapted

    def add(self, injected: AttachedAdapter) -> None:
        """Adds an adapter to its layers; active if it is the first."""
        self.adapters[injected.name] = injected
        for slot, layer in zip(injected.adapter.slots, injected.layers, strict=True):
            layer.updates[injected.name] = Update(slot, injected.config.dropout)
        getattr(self.model, ADAPTERS_ATTRIBUTE)[injected.name] = injected.adapter
        injected.note_trainable_names()
        self.activate([injected.name] if len(self.adapters) == 1 else self.active, added=[injected])
        self._keep_from_ddp()

    def activate(self, names: Sequence[str], added: Sequence[AttachedAdapter] = ()) -> None:
        """Makes these adapters the active ones, which alone have parameters that require gradients.

        Looks at the adapters that were active and those that become so, and at ``added`` ones, however many others there are.
        """
        for injected in self._active:
            injected.note_trainable_names()
            for replaced in injected.replaced.values():
                replaced.swap()
        for injected in (*self._active, *added):
            injected.active = False
            for parameter in injected.parameters.values():
                parameter.requires_grad_(False)
        self._active = tuple(self.adapters[name] for name in names)
        for injected in self._active:
            injected.active = True
            parameters = injected.parameters
            for trainable in injected.trainable_names:
                parameters[trainable].requires_grad_(True)
            for replaced in injected.replaced.values():
                replaced.swap()
        for layer in self.layers:
            layer.set(active=names)

    def remove(self, name: str) -> None:
        """Takes one adapter out, and the wrapping off layers that have no other."""
        self.activate([other for other in self.active if other != name])
        injected = self.adapters.pop(name)
        del getattr(self.model, ADAPTERS_ATTRIBUTE)[name]
        for layer in injected.layers:
            del layer.updates[name]
            if not layer.updates:
                self._unwrap(layer)
        self._keep_from_ddp()

    def take_out(self) -> None:
        """Leaves nothing of itself in the model."""
        for layer in self.layers:
            self._unwrap(layer)
        for hook in self._hooks:
            hook.remove()
        let_pack(self.unpacked)
        mixed_batch.remove_generate(self.model)
        delattr(self.model, ADAPTERS_ATTRIBUTE)
        del self.model._vblora_adapted_model
        self.adapters, self._active, self.row_source = {}, (), None
        self._keep_from_ddp()
        self.model.requires_grad_(False)
        for name, parameter in self.model.named_parameters():
            if name in self.trainable:
                parameter.requires_grad_(True)

    def _unwrap(self, layer: AdaptedLayer) -> None:
        for name in self.names.pop(layer):
            _set_module(self.model, name, layer.base_layer)

    def _keep_from_ddp(self) -> None:
        """Has DDP leave the adapters' buffers alone, which it would send around at every forward: all processes have the same."""
        known = getattr(self.model, "_ddp_params_and_buffers_to_ignore", ())
        names = [name for name in known if not name.startswith(f"{ADAPTERS_ATTRIBUTE}.")]
        for injected in self.adapters.values():
            names += [f"{ADAPTERS_ATTRIBUTE}.{injected.name}.{name}" for name, _ in injected.adapter.named_buffers()]
        if names:
            self.model._ddp_params_and_buffers_to_ignore = names
        else:
            vars(self.model).pop("_ddp_params_and_buffers_to_ignore", None)


def adapted_models(model: nn.Module) -> list[AdaptedModel]:
    """The records of a model and of all within it. Its adapters are not searched, so their number does not matter."""
    found, pending = {}, [model]  # modules seen, with their records
    while pending:
        module = pending.pop()
        if module is not None and module not in found and type(module) is not Adapters:
            own = vars(module)
            found[module] = own.get("_vblora_adapted_model")
            pending += reversed(own["_modules"].values())
    return [record for record in found.values() if record is not None]


def adapted_model(model: nn.Module) -> AdaptedModel:
    """The one record of an injected model, which may be wrapped in another (DDP, torch.compile).

    Raises:
        ValueError: there is none, or there are several.
    """
    records = adapted_models(model)
    if not records:
        raise ValueError("`model` has no adapter: call vblora.inject(model, config) first.")
    if len(records) > 1:
        raise ValueError(f"`model` holds {len(records)} models with an adapter each. Pass one of those.")
    return records[0]


def attached_adapter(model: nn.Module, adapter_name: str | None = None) -> AttachedAdapter:
    """One adapter of an injected model: the one of that name, or the active one.

    Raises:
        ValueError: there is none, or no name was given and not just one is active.
    """
    record = adapted_model(model)
    if adapter_name is None:
        if len(record.active) != 1:
            active = f"the active ones are {', '.join(record.active)}" if record.active else "none is active"
            raise ValueError(
                f"`adapter_name` is None, which means the active adapter, but {active}. "
                f"Name one of {', '.join(record.adapters)}."
            )
        return record.adapters[record.active[0]]
    return record.adapters[check_adapter_name(record, adapter_name)]


def check_adapter_name(record: AdaptedModel, name: str) -> str:
    if name not in record.adapters:
        raise ValueError(f"`adapter_name` is {name!r}; the model's adapters are {', '.join(record.adapters)}.")
    return name


def refuse_if_disabled(layers: list[AdaptedLayer]) -> None:
    """For what would read or write the base model's tensors in the place of the adapted model's."""
    if not all(layer.enabled for layer in layers):
        raise ValueError(
            "the adapters of `model` are disabled. Leave the block of `with vblora.disabled(model)` first."
        )


def refuse_if_merged(layers: list[AdaptedLayer]) -> None:
    """For what would change which adapters are in the weights."""
    if any(layer.merged for layer in layers):
        raise ValueError("`model` is merged. Call vblora.unmerge(model) first.")


def _dtypes_of(model: nn.Module) -> list[torch.dtype]:
    """Those of the base model's parameters that say what it computes in."""
    if torch.compiler.is_compiling():
        return [torch.float32]  # each layer casts its factors, which costs nothing in a graph
    own = set(getattr(model, ADAPTERS_ATTRIBUTE).parameters())
    return [p.dtype for p in model.parameters() if p not in own and not is_packed(p)] or [torch.get_default_dtype()]


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
