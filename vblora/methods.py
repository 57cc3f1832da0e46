"""From a config to an adapter: the one place that knows which config is which method's."""

from collections.abc import Sequence

import torch

from .adapters import Adapter, LoRAAdapter, Target, TiedLoRAAdapter, VBLoRAAdapter, VeRAAdapter
from .adapters.vblora import Deployed, Trained, check_widths
from .bank import VectorBank
from .config import AdapterConfig, LoraConfig, TiedLoraConfig, VBLoRAConfig, VeraConfig

ADAPTERS: dict[type[AdapterConfig], type[Adapter]] = {
    VBLoRAConfig: VBLoRAAdapter,
    VeraConfig: VeRAAdapter,
    TiedLoraConfig: TiedLoRAAdapter,
    LoraConfig: LoRAAdapter,
}


def check_config(config: object) -> None:
    """Refuses what is no config of ours, such as one of PEFT's."""
    if type(config) not in ADAPTERS:
        known = ", ".join(f"vblora.{kind.__name__}" for kind in ADAPTERS)
        raise TypeError(f"`config` is a {type(config).__module__}.{type(config).__name__}; allowed are {known}.")


def check_targets(config: AdapterConfig, targets: tuple[Target, ...]) -> None:
    """Refuses layers that the method cannot adapt."""
    if isinstance(config, VBLoRAConfig):
        check_widths(targets, config.vector_length, config.pad)


def new_adapter(
    config: AdapterConfig,
    targets: Sequence[Target],
    *,
    bank: VectorBank | None = None,
    rows: Trained | Deployed | None = None,
    projection: tuple[torch.Tensor, torch.Tensor] | None = None,
    device: torch.device | str | None = None,
) -> Adapter:
    """An adapter for ``targets``, in float32.

    Args:
        bank, rows: VB-LoRA's, which it needs a bank for; its rows are drawn unless a file holds them.
        projection: VeRA's, drawn unless a file holds it.
        device: of the others; VB-LoRA's is its bank's.
    """
    targets = list(targets)
    match config:
        case VBLoRAConfig():
            return VBLoRAAdapter(
                targets,
                bank,
                r=config.r,
                topk=config.topk,
                num_candidates=config.num_candidates,
                init_logits_std=config.init_logits_std,
                init=config.init,
                scaling=config.scaling,
                pad=config.pad,
                seed=config.seed,
                rows=rows,
            )
        case VeraConfig():
            return VeRAAdapter(
                targets,
                r=config.r,
                key=config.projection_prng_key,
                d_initial=config.d_initial,
                init=config.init_weights,
                save_projection=config.save_projection,
                projection=projection,
                device=device,
                dtype=torch.float32,
            )
        case TiedLoraConfig():
            return TiedLoRAAdapter(targets, r=config.r, scaling=config.scaling, device=device, dtype=torch.float32)
        case LoraConfig():
            init = config.init_lora_weights
            return LoRAAdapter(
                targets, r=config.r, scaling=config.scaling, init=init, device=device, dtype=torch.float32
            )
    raise TypeError(f"`config` is a {type(config).__name__}.")
