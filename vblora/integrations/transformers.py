"""``transformers.Trainer``: checkpoints of the adapter alone, and warnings where candidates cannot keep their promise."""

import json
import os
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from ..adapters import VBLoRAAdapter
from ..checkpoint import native
from ..checkpoint.folder import TENSORS_FILE
from ..checkpoint.optimizer import is_packed, pack_state, unpack_state
from ..checkpoint.save_load import save, write_over
from ..errors import VBLoRAWarning
from ..files import read_tensors, write_tensors
from ..model.candidates import moves_untouched, stats
from ..model.record import adapted_models, attached_adapter

_PREFIX = "vblora.resume."  # of the adapter's tensors in the file that the Trainer reads
_DESCRIPTION = _PREFIX + "description"


class VBLoRACallback(TrainerCallback):
    """Makes a Trainer's checkpoints those of the adapter: small, without a base weight, and resumed bit for bit.

    Each checkpoint folder is an adapter's folder in its resume form, which :func:`vblora.load` reads; so is what
    ``trainer.save_model()`` writes. ``trainer.train(resume_from_checkpoint=...)`` and ``load_best_model_at_end`` restore it.
    The state of an optimizer that the Trainer was given is stored packed (:func:`vblora.pack_optimizer`).

    It warns, once each, where training with candidates is not what dense training would be: of an optimizer that moves logits
    which were never selected, when training begins, and of exhausted rows, when the Trainer logs or ends.

    Give it to the Trainer when that is made, with a model that has its adapter by then::

        optimizer = torch.optim.AdamW(vblora.parameter_groups(model))
        trainer = Trainer(model, arguments, ..., optimizers=(optimizer, None), callbacks=[VBLoRACallback()])

    Args:
        model: the injected model, where its base is quantised. The Trainer asks whether such a model has adapters before it looks
            at its callbacks; so this one has to see to the answer when it is made.

    How: the Trainer writes a model through its ``save_pretrained`` and reads one through its ``load_state_dict``, so the
    model's own two are replaced by the adapter's. They stay after training; after :func:`vblora.eject` they are the model's
    again.

    Raises:
        TypeError, ValueError: when it is made: a ``model`` that is not a ``PreTrainedModel``, or has no adapter.
        ValueError: when training begins: from a checkpoint whose adapter the Trainer could not restore, as it got to know the
            callback too late, or whose packed state it could not, as it was not given the optimizer; or under the Trainer's
            FSDP or DeepSpeed, which write and read models in ways of their own.
    """

    def __init__(self, model: PreTrainedModel | None = None) -> None:
        self._warned = False
        if model is not None:
            _attach(model)

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **_,
    ) -> None:
        if model is None or not adapted_models(model):  # `model_init` makes it later
            return
        _attach(model)
        if optimizer is not None:
            optimizer.register_state_dict_post_hook(partial(_pack, model))
            optimizer.register_load_state_dict_pre_hook(partial(_unpack, model))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        **_,
    ) -> None:
        if args.fsdp or args.deepspeed:
            raise ValueError(
                "VBLoRACallback cannot save under the Trainer's FSDP or DeepSpeed. Use DDP, or see docs/training.md."
            )
        if _attach(model) and state.global_step:
            raise ValueError(
                "the checkpoint's adapter was not restored. Give VBLoRACallback to the Trainer when it is made, with a model "
                "that has an adapter: Trainer(model, ..., callbacks=[VBLoRACallback()])."
            )
        optimizer = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper
        if optimizer is not None and is_packed(optimizer):
            raise ValueError(
                "the checkpoint's optimizer state is packed, as that of an optimizer which the Trainer was given. "
                "Give it one again: Trainer(model, ..., optimizers=(optimizer, None))."
            )
        reason = None if optimizer is None or not _has_candidates(model) else moves_untouched(model, optimizer)
        if reason:
            warnings.warn(
                f"{reason} With candidates, training is then not the same as with all logits. "
                "See docs/candidates.md, or set `num_candidates=None`.",
                VBLoRAWarning,
                stacklevel=2,
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_
    ) -> None:
        if self._warned or not _has_candidates(model):
            return
        found = stats(model)
        if found.exhausted:
            self._warned = True
            more = min(2 * found.num_candidates, found.num_vectors)
            warnings.warn(
                f"step {state.global_step}: {found.exhausted} of {found.num_subvectors} rows have used up their "
                f"{found.num_candidates} candidates, and may part from what dense training would do. "
                f"Take `num_candidates={more}`, or vblora.grow(model, {more}, optimizer) as it trains.",
                VBLoRAWarning,
                stacklevel=2,
            )

    on_train_end = on_log


class _HasAdapter:
    """What transformers finds in a model's ``_hf_peft_config_loaded``: true for as long as that has an adapter of ours."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __bool__(self) -> bool:
        return bool(adapted_models(self.model))


def _has_candidates(model: nn.Module) -> bool:
    return any(m.candidates is not None for m in model.modules() if isinstance(m, VBLoRAAdapter))


def _attach(model: nn.Module) -> bool:
    """Puts the adapter's saving and loading in the place of the model's; False if they are there."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"VBLoRACallback saves through `save_pretrained`, which {type(model).__name__} does not have.")
    attached_adapter(model)
    if "save_pretrained" in vars(model):
        return False
    # Partials and not closures: a copied or pickled model takes them along, and they it.
    model.save_pretrained = partial(_save_pretrained, model)
    model.load_state_dict = partial(_load_state_dict, model)
    if getattr(model, "is_quantized", False):
        model._hf_peft_config_loaded = _HasAdapter(model)
    return True


def _save_pretrained(model: PreTrainedModel, save_directory: str | os.PathLike, *args, **kwargs) -> None:
    if not adapted_models(model):
        type(model).save_pretrained(model, save_directory, *args, **kwargs)
        return
    save(model, save_directory, form="resume")
    # Of a model that is no PeftModel, the Trainer reads this file alone, and from it the tensors alone.
    tensors, metadata = read_tensors(Path(save_directory) / TENSORS_FILE)
    tensors = {_PREFIX + name: tensor for name, tensor in tensors.items()}
    tensors[_DESCRIPTION] = torch.frombuffer(bytearray(metadata[native.METADATA].encode()), dtype=torch.uint8)
    write_tensors(Path(save_directory) / SAFE_WEIGHTS_NAME, tensors, {"format": "pt"})


def _load_state_dict(model: PreTrainedModel, state_dict: dict[str, Tensor], *args, **kwargs) -> _IncompatibleKeys:
    if _DESCRIPTION not in state_dict:
        return type(model).load_state_dict(model, state_dict, *args, **kwargs)
    target = attached_adapter(model)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in state_dict.items() if name != _DESCRIPTION}
    description = json.loads(bytes(state_dict[_DESCRIPTION].tolist()))
    contents = native.decode(description, tensors, target.adapter.bank if description["bank_file"] else None)
    contents.check()
    write_over(target, contents, None)
    return _IncompatibleKeys([], [])


def _pack(model: nn.Module, optimizer: Optimizer, state_dict: dict) -> dict:
    return pack_state(model, optimizer, state_dict)


def _unpack(model: nn.Module, optimizer: Optimizer, state_dict: dict) -> dict:
    return unpack_state(model, optimizer, state_dict)
