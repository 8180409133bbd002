"""A small residual network that every tool can take, static and converted."""

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmkw import SharingPlan, convert


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        # Of the two convolutions before the norm the second is planned.
        self.wide = nn.Conv2d(8, 8, 1)
        self.bn = nn.BatchNorm2d(8)
        self.a = Block(8)
        self.b = Block(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.b(self.a(self.bn(self.wide(self.stem(x))))).mean((2, 3)))


LAYERS = ['wide', 'a.conv1', 'a.conv2', 'b.conv1', 'b.conv2']


def twins(norm='BN1d'):
    """The dynamic network and the static one, all norms with statistics of their own."""
    torch.manual_seed(0)
    static = Net()
    plan = SharingPlan.make([(layer, 'cells') for layer in LAYERS])
    networks = [convert(copy.deepcopy(static), plan, dict(type=norm)), static]
    for network in networks:
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.uniform_(module.bias, -1, 1)
    return networks


def images(*sizes, batch=2):
    """One batch of every size."""
    return [torch.randn(batch, 3, *size) for size in sizes]


def gradients(network, x):
    """The gradients of all parameters that have one, by name."""
    network.zero_grad()
    network(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
