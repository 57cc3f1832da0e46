"""The baseline of the adapter: the same head, trained on the same rows, on the frozen encoder."""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .heads import Head

# A head's best learning rate depends on the scale of its features, so one is trained with each, and the best counts.
_LEARNING_RATES = (1e-3, 1e-2, 1e-1, 1.0)
# On the demo a linear head comes within 0.3 points of what logistic regression (L-BFGS, best of four penalties) reaches.
_EPOCHS = 50
_BATCH_SIZE = 128
# A frozen encoder's outputs are the same in each epoch, so they are cached, up to this many bytes.
_CACHE_BYTES = 2**31

Example = dict[str, Any]  # the inputs and the label of a row, or of a batch of rows


def frozen_score(
    model: PreTrainedModel,
    head: list[str],
    train: list[Example],
    held_out: list[Example],
    collate: Callable[[list[Example]], Example],
    kind: Head,
    *,
    epochs: int,
    bfloat16: bool,
    seed: int,
) -> float:
    """The metric on ``held_out`` of the best of several heads. The model and its own head do not change.

    One head is trained with each of several learning rates, without dropout, for many epochs; or for ``epochs``, as the
    adapter is, if the encoder's outputs are too large to cache. The best counts, by its metric on ``held_out`` after any epoch.
    All of that favours the baseline.

    Args:
        kind: what the head predicts.
    """
    device = next(model.parameters()).device
    own = {name: p for name, p in model.named_parameters() if any(name.startswith(f"{part}.") for part in head)}
    heads = [{name: p.detach().clone().requires_grad_() for name, p in own.items()} for _ in _LEARNING_RATES]
    optimizer = torch.optim.AdamW(
        [{"params": [*one.values()], "lr": rate} for one, rate in zip(heads, _LEARNING_RATES, strict=True)],
        weight_decay=0.0,
    )
    train_batches, held_out_batches = (_batches(rows, collate, device) for rows in (train, held_out))
    model.eval()
    with _cached(model.base_model) as encoder:

        def logits_of(batch: Example) -> list[Tensor]:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            encoder.batch = id(batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                return [functional_call(model, one, (), inputs).logits.float() for one in heads]

        with torch.no_grad():
            for batch in tqdm([*train_batches, *held_out_batches], desc="Frozen encoder", leave=False):
                logits_of(batch)
        if encoder.free > 0:
            epochs = max(epochs, _EPOCHS)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs)
        shuffle = random.Random(seed).shuffle
        best = -math.inf
        for _ in tqdm(range(epochs), desc="Its heads", leave=False):
            shuffle(train_batches)
            for batch in train_batches:
                losses = [kind.loss(logits, batch["labels"]) for logits in logits_of(batch)]
                optimizer.zero_grad()
                torch.stack(losses).sum().backward()
                optimizer.step()
            scheduler.step()
            with torch.no_grad():
                outputs = [torch.stack(logits_of(batch)) for batch in held_out_batches]
            labels = torch.cat([batch["labels"] for batch in held_out_batches]).cpu().numpy()
            found = torch.cat(outputs, dim=1).cpu().numpy()
            best = max(best, *(kind.measure(of_one, labels)[kind.metric] for of_one in found))
    return best


def _batches(rows: list[Example], collate: Callable[[list[Example]], Example], device: torch.device) -> list[Example]:
    """Batches of rows of similar length. They are the same in each epoch, so that the encoder's outputs can be cached."""
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    batches = [collate(rows[start : start + _BATCH_SIZE]) for start in range(0, len(rows), _BATCH_SIZE)]
    return [{name: value.to(device) for name, value in batch.items()} for batch in batches]


class _CachedEncoder:
    """Replaces a frozen module's forward: runs it once a batch, without gradients, and returns the cached output later.

    The model's own code runs around it, so it does not matter where an architecture takes its features from.
    """

    def __init__(self, module: nn.Module) -> None:
        self.forward = module.forward
        self.batch: int | None = None  # identifies the next batch; the caller sets it
        self.outputs: dict[int | None, Any] = {}
        self.last: tuple[int | None, Any] = (None, None)
        self.free = _CACHE_BYTES

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.batch in self.outputs:
            return self.outputs[self.batch]
        if self.last[0] != self.batch:
            with torch.no_grad():
                self.last = self.batch, self.forward(*args, **kwargs)
            if self.free > 0:
                output = self.outputs[self.batch] = self.last[1]
                tensors = output.values() if isinstance(output, dict) else output
                self.free -= sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
        return self.last[1]


@contextmanager
def _cached(module: nn.Module) -> Iterator[_CachedEncoder]:
    encoder = _CachedEncoder(module)
    module.forward = encoder
    try:
        yield encoder
    finally:
        del module.forward  # the class's own is back
