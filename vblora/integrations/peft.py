"""PEFT's own VB-LoRA models, with vblora's operators in their layers.

    model = vblora.integrations.peft.accelerate(peft.get_peft_model(model, peft.VBLoRAConfig(...)))

The model stays PEFT's. Only the computation of a layer's factors changes: one operator call for both, instead of a chain of
small kernels for each and, in training, a check of the logits that synchronises with the device.
"""

from typing import Any, TypeVar

import peft
import torch
from peft.tuners.vblora import Linear, VBLoRALayer, VBLoRAModel
from torch import Tensor, nn

from .. import ops

# Versions whose `_get_lora_matrices` and `_create_new_module` are known to fit.
KNOWN_VERSIONS = ("0.21",)

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Makes the VB-LoRA layers of a PEFT model use vblora's operators, in place.

    Parameters, their names, the state dict, the files and PEFT's whole API remain. Adapters that you add to the model later
    are accelerated too. Calling it again does nothing. :func:`restore` undoes it.

    PEFT refuses to train the logits of a ``save_only_topk_weights`` file, and so does an accelerated model. But it checks the
    logits here and when a state dict is loaded, not in each forward: it does not notice such logits if you write them into
    the parameters yourself.

    Args:
        model: from ``peft.get_peft_model`` or ``peft.PeftModel.from_pretrained``, or a module around it.

    Returns:
        The same model.

    Raises:
        RuntimeError: the installed version of peft is not known to work.
        ValueError: the model has no VB-LoRA layer of PEFT's.
        TypeError: a VB-LoRA layer is of an unknown subclass. The model is not changed.
    """
    if ".".join(peft.__version__.split(".")[:2]) not in KNOWN_VERSIONS:
        raise RuntimeError(
            f"peft {peft.__version__} is not known to vblora, which replaces methods of peft's layers: "
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
                "Call accelerate() before you change the class of a layer."
            )
    for module in model.modules():
        _accelerate(module)
    return model


def restore(model: Model) -> Model:
    """Undoes :func:`accelerate` in place: PEFT's own code runs again. Does not change other models. Returns the model."""
    for module in model.modules():
        if type(module) in _ORIGINAL:
            module.__class__ = _ORIGINAL[type(module)]
            module.__dict__.pop("_compact", None)
    return model


class AcceleratedLinear(Linear):  # type: ignore[misc]  # peft is not typed
    """PEFT's layer with its factors composed by ``torch.ops.vblora.admixture``.

    Instances are PEFT's own objects, of which only ``__class__`` changes. So references to them stay valid, ``deepcopy`` and
    pickling work, and torch.compile, which guards on the class, notices the change.

    One call composes both factors, although PEFT has a parameter for each, whose logits must be concatenated first. That
    reads and writes r (in + out) / b rows of h. A second call would write another gradient of the bank and add the two, 4 b
    rows of h, which is more unless vectors are short, and each call has an overhead. The gradients are not copied: each
    parameter gets its part of one tensor.
    """

    _compact: frozenset[str] = frozenset()  # adapters with -inf in the checked row of their logits

    def _get_lora_matrices(self, adapter: str, cast_to_fp32: bool = False) -> tuple[Tensor, Tensor]:
        """A ``(r, in_features)`` and B ``(out_features, r)``, in the parameters' dtype, or in float32."""
        if ops.is_transformed():
            factors: tuple[Tensor, Tensor] = super()._get_lora_matrices(adapter, cast_to_fp32)
            return factors
        if self.training and adapter in self._compact:
            super()._get_lora_matrices(adapter)  # checks again, and raises
            self._compact -= {adapter}  # unless the logits were initialised again meanwhile
        logits_A, logits_B = self.vblora_logits_A[adapter], self.vblora_logits_B[adapter]
        # (r, in / b, h) and (out / b, r, h)
        rows = torch.cat((logits_A.flatten(0, 1), logits_B.flatten(0, 1)))
        bank = self.vblora_vector_bank[adapter].to(rows.device)
        if rows.dtype != bank.dtype:  # as in PEFT, when layers differ in dtype
            common = torch.promote_types(rows.dtype, bank.dtype)
            rows, bank = rows.to(common), bank.to(common)
        dtype = torch.float32 if cast_to_fp32 else None
        subvectors, _, _ = torch.ops.vblora.admixture(rows, bank, None, self.topk[adapter], dtype)
        rank, of_A = logits_A.shape[:2]
        A, B = subvectors.split_with_sizes((rank * of_A, rank * logits_B.shape[0]))
        return A.reshape(rank, -1), B.unflatten(0, (-1, rank)).transpose(0, 1).flatten(1).T

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # The children, which hold the parameters, load after this, from the same state dict.
        for adapter, logits in self.vblora_logits_A.items():
            loaded = state_dict.get(f"{prefix}vblora_logits_A.{adapter}")
            if loaded is not None and loaded.shape == logits.shape:
                self._check_logits(adapter, loaded)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_logits(self, adapter: str, logits: Tensor) -> None:
        """Records whether an adapter can train, by the row of its logits that PEFT checks. Synchronises with the device."""
        infinite = not logits.is_meta and bool(logits[0, 0].isinf().any())
        self._compact = self._compact | {adapter} if infinite else self._compact - {adapter}


class AcceleratedVBLoRAModel(VBLoRAModel):  # type: ignore[misc]  # peft is not typed
    """PEFT's tuner, whose new layers are accelerated from the start."""

    @staticmethod
    def _create_new_module(*args: Any, **kwargs: Any) -> nn.Module:
        return _accelerate(VBLoRAModel._create_new_module(*args, **kwargs))


_ACCELERATED: dict[type[nn.Module], type[nn.Module]] = {
    Linear: AcceleratedLinear,
    VBLoRAModel: AcceleratedVBLoRAModel,
}
_ORIGINAL = {accelerated: original for original, accelerated in _ACCELERATED.items()}


def _accelerate(module: nn.Module) -> nn.Module:
    if type(module) in _ACCELERATED:
        module.__class__ = _ACCELERATED[type(module)]
        if isinstance(module, AcceleratedLinear):
            for adapter, logits in module.vblora_logits_A.items():
                module._check_logits(adapter, logits)
    return module
