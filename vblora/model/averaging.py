"""Keeps ``torch.optim.swa_utils.AveragedModel`` from averaging the tensors of different adapters."""

from functools import wraps

from torch import nn
from torch.optim.swa_utils import AveragedModel

from .record import adapted_models


def guard_averaging() -> None:
    """Has ``update_parameters`` refuse a model in which an adapter is active whose extra tensors the average does not have there.

    It pairs the two models' parameters by their order, and adapters take turns with the same parameter.
    """
    update = AveragedModel.update_parameters
    if hasattr(update, "_compares_adapters"):
        return

    @wraps(update)
    def update_parameters(average: AveragedModel, model: nn.Module) -> None:
        ours, theirs = _owners(average.module), _owners(model)
        for place in ours | theirs:
            if (own := ours.get(place)) != (other := theirs.get(place)):
                raise ValueError(
                    f"`{place}` is {_whose(other)} in `model`, but {_whose(own)} in the average, so they cannot be averaged. "
                    "Call vblora.set_adapter(averaged.module, name) with the name of the adapter that is active in `model`."
                )
        update(average, model)

    vars(update_parameters)["_compares_adapters"] = True
    AveragedModel.update_parameters = update_parameters  # type: ignore[assignment, method-assign]


def _owners(model: nn.Module) -> dict[str, str]:
    """The adapters whose extra tensors are in a model now, by the tensors' names."""
    return {
        name: attached.name
        for record in adapted_models(model)
        for attached in record.adapters.values()
        for name, extra in attached.extra.items()
        if extra.swapped_in
    }


def _whose(adapter: str | None) -> str:
    return "the base model's" if adapter is None else f"adapter {adapter!r}'s"
