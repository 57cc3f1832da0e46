"""PEFT's own VB-LoRA models, with our operators under their layers.

    model = vblora.integrations.peft.accelerate(peft.get_peft_model(model, peft.VBLoRAConfig(...)))

Everything about the model stays PEFT's. What changes is how a layer's factors come about: one operator call for both, instead
of a chain of small kernels for each and, while training, a look at the logits for which the device has to be waited for.
"""

import peft
import torch
from peft.tuners.vblora import Linear, VBLoRALayer, VBLoRAModel
from torch import Tensor, nn

KNOWN_VERSIONS = ("0.21",)  # whose `_get_lora_matrices` and `_create_new_module` have been read


def accelerate(model: nn.Module) -> nn.Module:
    """Puts our operators under the VB-LoRA layers of a PEFT model, in place.

    Parameters, their names, the state dict, the files and PEFT's whole API remain; what is added to the model later (another
    adapter, on whichever layers) is accelerated, too. Calling it again does nothing. :func:`restore` undoes it.

    PEFT refuses to train on what a ``save_only_topk_weights`` file left of the logits, and so does an accelerated model. But
    the logits are looked at here and when a state dict is loaded, and not in each forward; such logits that come into the
    parameters in another way are not seen.

    Args:
        model: from ``peft.get_peft_model`` or ``peft.PeftModel.from_pretrained``; it may be wrapped in another.

    Returns:
        The same model.

    Raises:
        RuntimeError: the installed peft is of a version that is not known here.
        ValueError: there is no VB-LoRA layer of PEFT's in the model.
        TypeError: such a layer is of a class of somebody else's. Nothing has been changed then.
    """
    if ".".join(peft.__version__.split(".")[:2]) not in KNOWN_VERSIONS:
        raise RuntimeError(
            f"peft {peft.__version__} is not known to vblora, whose layers stand on peft's own code: "
            f"install one of {', '.join(version + '.*' for version in KNOWN_VERSIONS)}, or do without accelerate()."
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, VBLoRALayer)}
    if not layers:
        raise ValueError(
            "`model` has no VB-LoRA layer of PEFT's: pass what peft.get_peft_model(model, peft.VBLoRAConfig(...)) returns. "
            "A model of vblora.inject() needs no accelerate()."
        )
    for name, layer in layers.items():
        if type(layer) not in (Linear, AcceleratedLinear):
            raise TypeError(
                f"`{name}` is a {type(layer).__module__}.{type(layer).__qualname__}, and not PEFT's own VB-LoRA layer. "
                "Call accelerate() before whatever changes the class of a layer."
            )
    for module in model.modules():
        _put_under(module)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Gives an accelerated model PEFT's own code back, in place; of any other model it changes nothing. Returns the model."""
    for module in model.modules():
        if type(module) in _OURS:
            module.__class__ = _OURS[type(module)]
            module.__dict__.pop("_compact", None)
    return model


class AcceleratedLinear(Linear):
    """PEFT's layer with its factors composed by ``torch.ops.vblora.admixture``.

    Instances are PEFT's own, of which only ``__class__`` was changed. So they hold what they held, nothing refers to them that
    did not, ``deepcopy`` and pickling work, and torch.compile, which guards on the class, needs no more than that.

    One call for both factors, though PEFT keeps a parameter each and their logits have to be joined first. By count: that reads
    and writes r (in + out) / b rows of h. A second call would write another gradient of the bank and add the two up, 4 b rows of
    h, which is more unless vectors are short; and calls have a price of their own. The gradients are not copied: each
    parameter gets its part of one tensor.
    """

    _compact: frozenset[str] = frozenset()  # adapters with -inf among what was looked at of their logits

    def _get_lora_matrices(self, adapter: str, cast_to_fp32: bool = False) -> tuple[Tensor, Tensor]:
        """A ``(r, in_features)`` and B ``(out_features, r)``, in the parameters' dtype, or in float32."""
        if self.training and adapter in self._compact:
            super()._get_lora_matrices(adapter)  # looks again, and raises
            self._compact -= {adapter}  # unless they were drawn anew meanwhile
        logits_A, logits_B = self.vblora_logits_A[adapter], self.vblora_logits_B[adapter]
        # (r, in / b, h) and (out / b, r, h)
        rows = torch.cat((logits_A.flatten(0, 1), logits_B.flatten(0, 1)))
        bank = self.vblora_vector_bank[adapter].to(rows.device)
        if rows.dtype != bank.dtype:  # PEFT lets them differ, where layers do
            common = torch.promote_types(rows.dtype, bank.dtype)
            rows, bank = rows.to(common), bank.to(common)
        dtype = torch.float32 if cast_to_fp32 else None
        subvectors, _, _ = torch.ops.vblora.admixture(rows, bank, None, self.topk[adapter], dtype)
        rank, of_A = logits_A.shape[:2]
        A, B = subvectors.split_with_sizes((rank * of_A, rank * logits_B.shape[0]))
        return A.reshape(rank, -1), B.unflatten(0, (-1, rank)).transpose(0, 1).flatten(1).T

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        # The children, which hold the parameters, load after this. What they are about to load is here already.
        for adapter, logits in self.vblora_logits_A.items():
            loaded = state_dict.get(f"{prefix}vblora_logits_A.{adapter}")
            if loaded is not None and loaded.shape == logits.shape:
                self._look_at(adapter, loaded)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _look_at(self, adapter: str, logits: Tensor) -> None:
        """Notes whether an adapter can train, by the same row of its logits that PEFT looks at. Waits for the device."""
        infinite = not logits.is_meta and bool(logits[0, 0].isinf().any())
        self._compact = self._compact | {adapter} if infinite else self._compact - {adapter}


class AcceleratedVBLoRAModel(VBLoRAModel):
    """PEFT's tuner, whose new layers are accelerated from the start."""

    @staticmethod
    def _create_new_module(*args, **kwargs) -> Linear:
        return _put_under(VBLoRAModel._create_new_module(*args, **kwargs))


_PEFTS = {Linear: AcceleratedLinear, VBLoRAModel: AcceleratedVBLoRAModel}
_OURS = {ours: pefts for pefts, ours in _PEFTS.items()}


def _put_under(module: nn.Module) -> nn.Module:
    if type(module) in _PEFTS:
        module.__class__ = _PEFTS[type(module)]
        if isinstance(module, AcceleratedLinear):
            for adapter, logits in module.vblora_logits_A.items():
                module._look_at(adapter, logits)
    return module
