"""One line on how much of a model trains."""

from torch import Tensor, nn

from .parameters import count_parameters


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints how many parameters train, like PEFT's method of this name, and how many values the trained adapters store.

    Raises:
        ValueError: the model has no adapter.
    """
    trainable, stored = count_parameters(model)
    total = sum(_size_of(parameter) for parameter in model.parameters())
    print(
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f} || "
        f"stored params: {stored:,.0f} ({4 * stored:,.0f} bytes)"
    )


def _size_of(parameter: Tensor) -> int:
    """Elements of a parameter, of a quantised one those that it stands for."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else shape.numel()
