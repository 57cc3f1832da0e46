"""How many candidates a row needs: trains with all logits, and measures how far down its initial order each row gets.

    python benchmarks/candidates.py --num-vectors 2048 --steps 800

Of all-MiniLM-L6-v2 on the demo's film reviews, all linear layers. A row that has come further than M has parted from what M
candidates would give it. Prints a table; nothing in it is a time.
"""

import argparse
import itertools

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

import vblora
from vblora.finetune import data, demo

SIZES = (16, 32, 64, 128, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-vectors", type=int, default=2048)
    parser.add_argument("--topk", type=int, default=2)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--lr-logits", type=float, default=1e-2)
    parser.add_argument("--lr-bank", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(demo.find_model())
    model = AutoModelForSequenceClassification.from_pretrained(demo.find_model(), num_labels=2, dtype=torch.float32)
    config = vblora.VBLoRAConfig(
        r=4,
        num_vectors=arguments.num_vectors,
        vector_length=128,
        topk=arguments.topk,
        num_candidates=None,
        target_modules="all-linear",
        modules_to_save=["classifier"],
    )
    vblora.inject(model, config).train()
    groups = vblora.parameter_groups(model, lr_bank=arguments.lr_bank, lr_logits=arguments.lr_logits)
    optimizer = torch.optim.AdamW(groups)
    scheduler = get_linear_schedule_with_warmup(optimizer, int(0.06 * arguments.steps), arguments.steps)
    rows = data.read_rows(demo.find_data(), demo.COLUMNS, "--data", demo.LABELS)

    def collate(batch: list) -> dict[str, torch.Tensor]:
        texts = tokenizer(
            [row.text for row in batch], truncation=True, max_length=32, padding=True, return_tensors="pt"
        )
        return {**texts, "labels": torch.tensor([demo.LABELS.index(row.label) for row in batch])}

    loader = DataLoader(rows, arguments.batch_size, shuffle=True, collate_fn=collate)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    adapter = model.vblora.default
    initial = adapter.initial(arguments.num_vectors)
    print(
        f"{adapter.num_subvectors:,} rows of {arguments.num_vectors:,} logits, k={arguments.topk}, batches of "
        f"{arguments.batch_size}, learning rate of the logits {arguments.lr_logits:g}, of the bank {arguments.lr_bank:g}"
    )
    print("| step | loss | mean | 99 % | longest |", " | ".join(f"beyond {size}" for size in SIZES), "|")
    print("|---" * (5 + len(SIZES)) + "|")
    losses = []
    for step in tqdm(range(1, arguments.steps + 1), leave=False):
        loss = model(**next(batches)).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % max(1, arguments.steps // 8) == 0:
            touched = adapter.logits.detach().gather(1, initial.candidates.long()) != initial.logits
            depth = (touched * torch.arange(1, arguments.num_vectors + 1)).amax(1).float()
            shares = [f"{(depth > size).float().mean():.2%}" for size in SIZES]
            loss = sum(losses) / len(losses)
            cells = [f"{loss:.3f}", f"{depth.mean():.1f}", f"{depth.quantile(0.99):.0f}", f"{depth.max():.0f}", *shares]
            print(f"| {step} |", " | ".join(cells), "|", flush=True)
            losses.clear()


if __name__ == "__main__":
    main()
