"""Training with ``transformers.Trainer`` and its subclasses: parameter groups, and checkpoints of the adapter alone."""

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from ..adapters import VBLoRAAdapter
from ..checkpoint import native
from ..checkpoint.folder import TENSORS_FILE
from ..checkpoint.json_objects import parse_object
from ..checkpoint.optimizer import is_packed, pack_state, unpack_state
from ..checkpoint.save_load import save, write_over
from ..errors import VBLoRAWarning
from ..files import read_tensors, write_tensors
from ..model.candidates import moves_untouched, stats
from ..model.lookup import adapted_model, adapted_models, attached_adapter
from ..model.parameters import parameter_groups
from ..model.whole import is_plain, save_whole
from .reference_model import reference_model, warn_of_reference

_PREFIX = "vblora.resume."  # of the adapter's tensors in the file that the Trainer reads
_DESCRIPTION = _PREFIX + "description"
_NAME = _PREFIX + "adapter_name"


def trainer_arguments(model: nn.Module, *, weight_decay: float = 0.0, **groups: Any) -> dict[str, Any]:
    """The arguments with which ``transformers.Trainer`` and its subclasses train an injected model: optimizer and callback.

    The optimizer is AdamW over :func:`vblora.parameter_groups`; the Trainer makes the schedule. The Trainer's own optimizer
    would train the adapter at ``TrainingArguments.learning_rate``, whose default is far too low. This also works for TRL's
    ``SFTTrainer`` and sentence-transformers' ``SentenceTransformerTrainer``::

        trainer = Trainer(model, arguments, train_dataset=data, **trainer_arguments(model))

    Args:
        model: an injected model.
        weight_decay: AdamW's weight decay for all parameters but the logits, which get none.
        groups: other arguments of :func:`vblora.parameter_groups`, such as ``recipe`` or ``lr_bank``.

    Returns:
        A dict with ``optimizers`` and ``callbacks``. To pass callbacks of your own, add them to the list ``callbacks``.

    Raises:
        ValueError: the model has no active adapter.
        TypeError: it has no ``save_pretrained``.
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, **groups), weight_decay=weight_decay)
    return {"optimizers": (optimizer, None), "callbacks": [VBLoRACallback(model)]}


class VBLoRACallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Makes the checkpoints of a Trainer contain only the adapter, so that the Trainer resumes from them bit for bit.

    Each checkpoint, and what ``trainer.save_model()`` writes, is an adapter's folder in the resume form, which
    :func:`vblora.load` reads. ``trainer.train(resume_from_checkpoint=...)`` and ``load_best_model_at_end`` restore it. The
    state of an optimizer that you pass to the Trainer is stored packed (:func:`vblora.pack_optimizer`).

    The callback also warns, once each:

    - when training begins, if the optimizer changes logits that were never selected, or if the reference model of one of TRL's
      trainers lacks the adapter that training starts from;
    - when the Trainer logs or ends, if sub-vectors have used up their candidates.

    Inject the model first, and pass the callback when you make the Trainer; :func:`trainer_arguments` does that::

        trainer = Trainer(model, arguments, ..., **trainer_arguments(model))

    A Trainer with ``model_init`` makes a new model when training begins, before it calls its callbacks. To resume, call
    ``VBLoRACallback(model)`` on each new model::

        def model_init():
            model = vblora.inject(AutoModelForSequenceClassification.from_pretrained(name), config)
            VBLoRACallback(model)
            return model

    The Trainer calls the model's ``save_pretrained`` and ``load_state_dict``, so the callback replaces these two methods of the
    model. They stay replaced after training; after :func:`vblora.eject` they do what they did before. In a
    ``SentenceTransformer`` only ``save_pretrained`` is replaced: its trainer saves the adapter, but cannot resume.

    Args:
        model: the injected model. Pass it if the base model is quantised, because the Trainer checks whether such a model has
            an adapter before it calls its callbacks.

    Raises:
        TypeError: ``model`` has no ``save_pretrained``.
        ValueError: ``model`` has no adapter. When training begins: the checkpoint's adapter was not restored, because the
            Trainer got the callback too late; the checkpoint's optimizer state is packed, but you did not pass an optimizer;
            the Trainer uses its FSDP or DeepSpeed, which save and load models without ``save_pretrained``; or
            ``load_best_model_at_end`` is on for a ``SentenceTransformer``.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._warned = False
        self._exact: dict[nn.Parameter, Tensor] = {}
        self._prepared = False  # whether the Trainer was made with an injected model
        if model is not None:
            _attach(model)
            self._exact = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **_: Any,
    ) -> None:
        # SFTTrainer casts what trains on a quantised base to bfloat16. Rounded logits select other bank vectors.
        for parameter, values in self._exact.items():
            if parameter.dtype != values.dtype:
                parameter.data = values.to(parameter.device)
        self._exact = {}
        if model is None or not adapted_models(model):  # `model_init` makes it later
            return
        _attach(model)
        self._prepared = True
        if optimizer is not None:
            optimizer.register_state_dict_post_hook(partial(pack_state, model))
            optimizer.register_load_state_dict_pre_hook(partial(unpack_state, model))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        **_: Any,
    ) -> None:
        if args.fsdp or args.deepspeed:
            raise ValueError(
                "VBLoRACallback cannot save under the Trainer's FSDP or DeepSpeed. Use DDP, or shard the model with FSDP2 in "
                "a loop of your own."
            )
        if args.load_best_model_at_end and not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"`load_best_model_at_end` is True, but of a {type(model).__name__} the checkpoints hold only the adapter, which "
                "its trainer cannot load. Set it to False, and call vblora.load(model, best_checkpoint) after training."
            )
        if _attach(model) and state.global_step:
            mend = (
                "The Trainer's `model_init` made another model than the one that this callback has prepared. In `model_init`, "
                "call VBLoRACallback(model) after vblora.inject."
                if self._prepared
                else "Pass VBLoRACallback when you make the Trainer, with a model that has an adapter: "
                "Trainer(model, ..., **trainer_arguments(model))."
            )
            raise ValueError(f"the checkpoint's adapter was not restored. {mend}")
        if not state.global_step and (reference := reference_model(args)) is not None:
            warn_of_reference(model, reference, args)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper
        if optimizer is not None and is_packed(optimizer):
            raise ValueError(
                "the checkpoint's optimizer state is packed, because the Trainer was passed an optimizer when it was saved. "
                "Pass one again: Trainer(model, ..., optimizers=(optimizer, None))."
            )
        reason = None if optimizer is None or not _has_candidates(model) else moves_untouched(model, optimizer)
        if reason:
            warnings.warn(
                f"{reason} With candidates, training then differs from training with all logits. "
                "See docs/candidates.md, or set `num_candidates=None`.",
                VBLoRAWarning,
                stacklevel=2,
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        if self._warned or not _has_candidates(model):
            return
        found = stats(model)
        if found.exhausted:
            self._warned = True
            more = min(2 * found.num_candidates, found.num_vectors)
            warnings.warn(
                f"step {state.global_step}: {found.exhausted} of {found.num_subvectors} sub-vectors have used up their "
                f"{found.num_candidates} candidates, so training may now differ from training with all logits. "
                f"Set `num_candidates={more}`, or call vblora.grow(model, {more}, optimizer) during training.",
                VBLoRAWarning,
                stacklevel=2,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        self.on_log(args, state, control, model)
        for record in adapted_models(model):
            for name in record.active:
                record.adapters[name].has_learned = True


class _HasAdapter:
    """The value of a model's ``_hf_peft_config_loaded``: true as long as the model has an adapter of vblora."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __bool__(self) -> bool:
        return bool(adapted_models(self.model))


def _has_candidates(model: nn.Module) -> bool:
    return any(m.candidates is not None for m in model.modules() if isinstance(m, VBLoRAAdapter))


def _attach(model: nn.Module) -> bool:
    """Replaces the model's saving and loading by the adapter's. False if they are replaced already."""
    if not hasattr(model, "save_pretrained"):
        raise TypeError(f"VBLoRACallback saves through `save_pretrained`, which {type(model).__name__} does not have.")
    attached_adapter(model)
    if getattr(vars(model).get("save_pretrained"), "func", None) is _save_pretrained:
        return False
    # partial objects, because a copied or pickled model takes them along, and they refer to the copy then
    replacements: dict[str, Any] = {"save_pretrained": partial(_save_pretrained, model)}
    if isinstance(model, PreTrainedModel):
        replacements["load_state_dict"] = partial(_load_state_dict, model)
        if getattr(model, "is_quantized", False):
            replacements["_hf_peft_config_loaded"] = _HasAdapter(model)
    for name, replacement in replacements.items():
        setattr(model, name, replacement)
    return True


def _save_pretrained(model: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    records = adapted_models(model)
    if not records:
        type(model).save_pretrained(model, save_directory, *args, **kwargs)
        return
    if is_plain(records[0]):
        save_whole(records[0], model, save_directory, *args, **kwargs)
        return
    save(model, save_directory, form="resume")
    if not isinstance(model, PreTrainedModel):
        return
    # Unless a model is a PeftModel, the Trainer reads only this file, and of it only the tensors.
    tensors, metadata = read_tensors(Path(save_directory) / TENSORS_FILE)
    tensors = {_PREFIX + name: tensor for name, tensor in tensors.items()}
    tensors[_DESCRIPTION] = _as_bytes(metadata[native.METADATA])
    tensors[_NAME] = _as_bytes(attached_adapter(model).name)
    write_tensors(Path(save_directory) / SAFE_WEIGHTS_NAME, tensors, {"format": "pt"})


def _as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _as_text(tensor: Tensor) -> str:
    return bytes(tensor.tolist()).decode()


def _load_state_dict(model: Any, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> _IncompatibleKeys:
    if _DESCRIPTION not in state_dict:
        result: _IncompatibleKeys = type(model).load_state_dict(model, state_dict, *args, **kwargs)
        return result
    target = attached_adapter(model)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in state_dict.items()}
    description = parse_object(_as_text(tensors.pop(_DESCRIPTION.removeprefix(_PREFIX))))
    saved = _as_text(tensors.pop(_NAME.removeprefix(_PREFIX)))
    if saved != target.name and saved in adapted_model(model).adapters:
        raise ValueError(
            f"the checkpoint holds adapter {saved!r}, but {target.name!r} is active. Call "
            f"vblora.set_adapter(model, {saved!r}) first."
        )
    bank = target.adapter.bank if description["bank_file"] and isinstance(target.adapter, VBLoRAAdapter) else None
    contents = native.decode(description, tensors, bank)
    contents.check()
    write_over(target, contents, None)
    return _IncompatibleKeys([], [])
