"""A model written by hand: VBLinear layers that share one vector bank adapt a frozen network to data that has changed.

python examples/by_hand.py
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F

import vblora

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", default="by-hand.pt", help="file for the adapter's tensors")
parser.add_argument("--quick", action="store_true", help="train for a few steps only")
arguments = parser.parse_args()
steps = 20 if arguments.quick else 300
torch.manual_seed(0)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 64)
        self.second = nn.Linear(64, 64)
        self.last = nn.Linear(64, 2)

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def adapt(network: Network) -> Network:
    """Replaces two layers. They share the bank, so it is trained and stored once."""
    network.requires_grad_(False)
    bank = vblora.VectorBank(num_vectors=32, vector_length=16)
    network.second = vblora.VBLinear(base_layer=network.second, r=4, bank=bank, seed=0)
    network.last = vblora.VBLinear(base_layer=network.last, r=4, bank=bank, pad=True, seed=1)
    return network


def make_rings(count: int, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in a disc, and whether they are near its centre, which is at ``shift``."""
    x = 4 * torch.rand(count, 2) - 2
    return x + shift, (x.norm(dim=1) < 1.2).long()


def train(network: Network, groups: list, data: tuple[torch.Tensor, torch.Tensor]) -> None:
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        loss = F.cross_entropy(network(data[0]), data[1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def accuracy(network: Network, data: tuple[torch.Tensor, torch.Tensor]) -> float:
    with torch.no_grad():
        return (network(data[0]).argmax(1) == data[1]).float().mean().item()


before, after, test = make_rings(1000, shift=0.0), make_rings(1000, shift=0.7), make_rings(1000, shift=0.7)
network = Network()
train(network, [{"params": list(network.parameters())}], before)
base = {name: tensor.clone() for name, tensor in network.state_dict().items()}
print(f"The base network: {accuracy(network, before):.0%}, and {accuracy(network, test):.0%} where the data has moved")

train(adapt(network), vblora.parameter_groups(network), after)
print(f"With the adapter: {accuracy(network, test):.0%}. {vblora.count_parameters(network)}")

adapter = {name: tensor for name, tensor in network.state_dict().items() if ".adapter." in name}
torch.save(adapter, arguments.output)
fresh = Network()
fresh.load_state_dict(base)
adapt(fresh).load_state_dict(torch.load(arguments.output), strict=False)
print(f"Loaded into a fresh network: {accuracy(fresh, test):.0%}")
