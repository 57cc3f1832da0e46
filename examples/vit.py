"""Fine-tunes a vision transformer to tell horizontal from vertical stripes, in images that the script makes.

python examples/vit.py                                              # a small random model
python examples/vit.py --model google/vit-base-patch16-224-in21k    # a pretrained one, from the Hugging Face Hub
"""

import argparse

import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig

import vblora

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="folder, or name on the Hugging Face Hub")
parser.add_argument("--output", default="my-vit-adapter", help="folder for the adapter")
parser.add_argument("--quick", action="store_true", help="train for two steps only")
arguments = parser.parse_args()
LABELS = {0: "horizontal", 1: "vertical"}


def load_base():
    if arguments.model:
        return AutoModelForImageClassification.from_pretrained(arguments.model, id2label=LABELS)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForImageClassification.from_config(ViTConfig(image_size=32, patch_size=8, id2label=LABELS, **sizes))


def make_images(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stripes of random widths and places, with noise, in the range that ViT's image processor makes."""
    labels = torch.arange(count) % 2
    periods, phases = size / 4 + size / 4 * torch.rand(count, 1), 7 * torch.rand(count, 1)
    waves = torch.sin(7 * torch.arange(size) / periods + phases)
    images = torch.where(labels[:, None, None] == 0, waves[:, :, None], waves[:, None, :]).expand(count, size, size)
    return (images + 0.3 * torch.randn(count, size, size))[:, None].expand(count, 3, size, size), labels


size = AutoConfig.from_pretrained(arguments.model).image_size if arguments.model else 32
torch.manual_seed(0)
images, labels = make_images(512, size)
test_images, test_labels = make_images(128, size)

# By default the queries and values of a ViT are adapted. modules_to_save trains and saves the classifier with them.
config = vblora.VBLoRAConfig(r=4, num_vectors=64, vector_length=32, modules_to_save=["classifier"], seed=0)
model = vblora.inject(load_base(), config).train()
vblora.print_trainable_parameters(model)

optimizer = torch.optim.AdamW(vblora.parameter_groups(model), weight_decay=0.0)
for step in range(2 if arguments.quick else 200):
    rows = torch.randint(len(images), (32,))
    loss = F.cross_entropy(model(images[rows]).logits, labels[rows])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
vblora.save(model, arguments.output)

fresh = vblora.load(load_base(), arguments.output).eval()
with torch.no_grad():
    right = (fresh(test_images).logits.argmax(1) == test_labels).float().mean().item()
print(f"{right:.0%} of {len(test_images)} new images are right")
