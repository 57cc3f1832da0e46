"""Training with Lightning: checkpoints of the adapter alone."""

from collections.abc import Mapping
from functools import partial
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer

from ..checkpoint.optimizer import pack_state, unpack_state
from ..model.lookup import adapted_models
from ..model.whole import adapter_state_dict

# The methods of a strategy that a checkpoint calls.
_SAVE, _LOAD = "lightning_module_state_dict", "load_model_state_dict"


class VBLoRACallback(Callback):  # type: ignore[misc]  # lightning may not be installed
    """Makes the checkpoints of a Lightning Trainer contain only the adapter, so that the Trainer resumes from them bit for bit.

    It works with ``lightning`` and ``pytorch_lightning``. Inject the model within the module's ``__init__`` or
    ``configure_model``, and return an optimizer over :func:`vblora.parameter_groups` from ``configure_optimizers``::

        class Classifier(LightningModule):
            def __init__(self):
                super().__init__()
                self.strict_loading = False  # for load_from_checkpoint: the base model comes from its own files
                self.model = vblora.inject(AutoModelForSequenceClassification.from_pretrained(name), config)

            def configure_optimizers(self):
                return torch.optim.AdamW(vblora.parameter_groups(self.model), weight_decay=0.0)

        Trainer(callbacks=[VBLoRACallback()]).fit(Classifier(), data, ckpt_path=None)

    A checkpoint's ``state_dict`` is :func:`vblora.adapter_state_dict`; the optimizer's state is packed
    (:func:`vblora.pack_optimizer`). ``fit``, ``validate``, ``test`` and ``predict`` read it, and also a checkpoint of the whole
    module. ``vblora.save(module.model, directory)`` writes the adapter's own folder.

    Raises:
        ValueError: the module has no adapter; the strategy writes models in its own way (FSDP, DeepSpeed, model
            parallelism); or a checkpoint's adapter is not the module's.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        base = next(cls for cls in type(strategy).__mro__ if cls.__name__ == "Strategy")
        if any(getattr(type(strategy), name) is not getattr(base, name) for name in (_SAVE, _LOAD)):
            raise ValueError(
                f"VBLoRACallback cannot save under {type(strategy).__name__}, which writes models in its own way. Use DDP, "
                "or leave out the callback and call vblora.save(model, directory) after training."
            )
        setattr(strategy, _SAVE, partial(adapter_state_dict, pl_module))
        setattr(strategy, _LOAD, partial(_load, pl_module))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not adapted_models(pl_module):
            raise ValueError(
                f"{type(pl_module).__name__} has no adapter: call vblora.inject(self.model, config) in its __init__."
            )
        for optimizer in trainer.optimizers:
            optimizer.register_state_dict_post_hook(partial(pack_state, pl_module))
            optimizer.register_load_state_dict_pre_hook(partial(unpack_state, pl_module))


def _load(module: LightningModule, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
    found: Mapping[str, Any] = checkpoint["state_dict"]
    wrong = adapter_state_dict(module).keys() - found.keys() or found.keys() - module.state_dict().keys()
    if wrong:
        raise ValueError(
            f"the checkpoint and {type(module).__name__} do not have the same adapter: only one of them has `{min(wrong)}`. "
            "Inject the model with the config that it was saved with."
        )
    module.load_state_dict(found, strict=False)
