"""What the adapter is measured against: the same head, trained on the same rows, on the encoder as it is."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

# A head's best learning rate depends on the scale of its features: one is trained with each, and the best is kept.
_LEARNING_RATES = (1e-3, 1e-2, 1e-1, 1.0)
# On the demo a linear head comes within 0.3 points of what logistic regression (L-BFGS, best of four penalties) reaches.
_EPOCHS = 50
_BATCH_SIZE = 128
# A frozen encoder says the same of a row in each epoch, so its outputs are kept, as far as this many bytes reach.
_KEEP_BYTES = 2**31


def frozen_accuracy(
    model: nn.Module,
    head: list[str],
    train: list[dict],
    held_out: list[dict],
    collate: Callable[[list[dict]], dict],
    *,
    epochs: int,
    bfloat16: bool,
    seed: int,
) -> float:
    """Accuracy on ``held_out`` of the best of several heads. The model and its own head are left as they are.

    A head is trained with each of several learning rates and without dropout, for many epochs: only for ``epochs``, as the
    adapter is, if the encoder's outputs are too many to keep. The best is chosen by its accuracy after any epoch, on the
    very rows that it is reported for. All of that favours the baseline.
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
    with _remembered(model.base_model) as encoder:

        def logits_of(batch: dict) -> list[Tensor]:
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
        best = 0.0
        for _ in tqdm(range(epochs), desc="Its heads", leave=False):
            shuffle(train_batches)
            for batch in train_batches:
                loss = sum(F.cross_entropy(logits, batch["labels"]) for logits in logits_of(batch))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            scheduler.step()
            with torch.no_grad():
                correct = sum(
                    torch.stack([(logits.argmax(-1) == batch["labels"]).sum() for logits in logits_of(batch)])
                    for batch in held_out_batches
                )
            best = max(best, correct.max().item() / len(held_out))
    return best


def _batches(rows: list[dict], collate: Callable[[list[dict]], dict], device: torch.device) -> list[dict]:
    """Rows in batches of like length, which are the same in each epoch, so that what was kept of one can be replayed."""
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    batches = [collate(rows[start : start + _BATCH_SIZE]) for start in range(0, len(rows), _BATCH_SIZE)]
    return [{name: value.to(device) for name, value in batch.items()} for batch in batches]


class _Encoder:
    """Stands in for a frozen module's forward: runs it once a batch, without gradients, and replays what came out.

    The model's own code is around it, so nothing need be known of where an architecture takes its features from.
    """

    def __init__(self, module: nn.Module) -> None:
        self.forward = module.forward
        self.batch: int | None = None  # which comes next, set by the caller
        self.outputs: dict[int | None, object] = {}
        self.last: tuple[int | None, object] = (None, None)
        self.free = _KEEP_BYTES

    def __call__(self, *args, **kwargs) -> object:
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
def _remembered(module: nn.Module) -> Iterator[_Encoder]:
    encoder = _Encoder(module)
    module.forward = encoder
    try:
        yield encoder
    finally:
        del module.forward  # the class's own is back
