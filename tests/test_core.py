"""The core where torch alone is installed."""

import os
import subprocess
import sys
from pathlib import Path

import torch

# What torch itself needs.
OF_TORCH = (
    'torch', 'torchgen', 'functorch', 'typing_extensions.py', 'sympy', 'mpmath', 'networkx',
    'jinja2', 'markupsafe', 'fsspec', 'filelock', 'setuptools', 'pkg_resources',
)  # fmt: skip

TRAINING = """
import copy
import torch
from torch import nn
import mmkw


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, 2)
        blocks = [nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.ReLU()) for _ in 'ab']
        self.blocks = nn.ModuleList(blocks)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


torch.manual_seed(0)
static = Network()
x, labels = torch.rand(8, 3, 20, 18), torch.arange(8)
dynamic = mmkw.convert(copy.deepcopy(static), cell_num_ratio=2)
layers = [name for name, module in dynamic.named_modules() if hasattr(module, 'cells')]
assert layers == ['blocks.0.0', 'blocks.1.0'], layers
before, losses = static.eval()(x), {}
for kind, network in dict(static=static, dynamic=dynamic).items():
    assert torch.allclose(network.eval()(x), before, atol=1e-5)
    optimizer = torch.optim.SGD(network.train().parameters(), 0.1)
    losses[kind] = []
    for iteration in range(10):
        if kind == 'dynamic':
            mmkw.set_temperature(network, mmkw.temperature_at(iteration, length=5, begin=0.5))
        loss = nn.functional.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[kind].append(loss.item())
    assert losses[kind][-1] < losses[kind][0] / 2, losses
torch.save(dynamic.state_dict(), PATH)
again = mmkw.convert(Network(), cell_num_ratio=2)
again.load_state_dict(mmkw.read_checkpoint(PATH))
assert torch.equal(again.eval()(x), dynamic.eval()(x))
torch.save(static.state_dict(), PATH)
again.load_state_dict(mmkw.read_checkpoint(PATH))
assert torch.allclose(again(x), static.eval()(x), atol=1e-5)
for name in ('mmengine', 'mmcv', 'mmdet', 'numpy'):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f'torch is not alone: {name}')
try:
    mmkw.KWResNet
except RuntimeError as error:
    assert 'mmengine' in str(error) and 'pip install' in str(error), error
else:
    raise AssertionError('KWResNet without MMEngine')
print('all is well')
"""


def test_torch_is_enough(root, tmp_path):
    packages = Path(torch.__file__).parents[1]
    for name in OF_TORCH:
        if (packages / name).exists():
            (tmp_path / name).symlink_to(packages / name)
    (tmp_path / 'mmkw').symlink_to(root / 'mmkw')
    script = TRAINING.replace('PATH', repr(str(tmp_path / 'x.pth')))
    result = subprocess.run(
        # Without site-packages.
        [sys.executable, '-S', '-c', script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=''),
    )
    assert result.stdout.endswith('all is well\n'), result.stdout + result.stderr
