"""The published networks in plain NumPy and functional torch, by their published names alone.

Written from the formulas and tables, apart from mmkw. Asking for a parameter that is not there
creates it, so that one forward pass lists every name and shape of a published file.
"""

import itertools
import re

import numpy as np
import torch
import torch.nn.functional as F


def parse_cells(text):
    """``'56x(64,64) 47x(128,128)'`` to ``[(56, 64, 64), (47, 128, 128)]``."""
    return [tuple(map(int, m)) for m in re.findall(r'(\d+)x\((\d+),(\d+)\)', text)]


class Network:
    """Parameters by name, warehouses by index, and the layers a network is made of.

    A forward pass leaves the output of the ImageNet classifier in ``logits``.
    """

    def __init__(self, cells, budgets, reduction=1 / 16, basis_ratio=1.0, norm='BN', state=None):
        self.cells = parse_cells(cells)
        if not isinstance(budgets, (list, tuple)):
            budgets = [budgets] * len(self.cells)
        self.budgets, self.reduction, self.basis_ratio, self.norm = (
            budgets,
            reduction,
            basis_ratio,
            norm,
        )
        self.state = {} if state is None else state
        self.generator = torch.Generator().manual_seed(0)

    def run(self, forward, x, tau):
        self.tau = tau
        self.cursor = [0] * len(self.cells)
        outputs = forward(self, x)
        assert self.cursor == [n for n, _, _ in self.cells]
        return outputs

    def p(self, name, *shape, scale=1.0, offset=0.0, positive=False):
        if name not in self.state:
            value = torch.randn(shape, generator=self.generator) * scale + offset
            self.state[name] = value.abs() + 0.5 if positive else value
        assert tuple(self.state[name].shape) == shape, name
        return self.state[name]

    def batch_norm(self, name, x):
        c = x.shape[1]
        mean, var = (
            self.p(f'{name}.running_mean', c),
            self.p(f'{name}.running_var', c, positive=True),
        )
        gain, shift = self.p(f'{name}.weight', c, scale=0.2, offset=1), self.p(f'{name}.bias', c)
        self.state.setdefault(f'{name}.num_batches_tracked', torch.tensor(1))
        return F.batch_norm(x, mean, var, gain, shift)

    def layer_norm(self, name, x, eps=1e-5):
        """Over the last dimension."""
        c = x.shape[-1]
        gain, shift = self.p(f'{name}.weight', c, scale=0.2, offset=1), self.p(f'{name}.bias', c)
        return F.layer_norm(x, (c,), gain, shift, eps)

    def static(self, name, x, out, k, stride=1, padding=0, groups=1, dilation=1):
        fan = x.shape[1] // groups * k * k
        weight = self.p(f'{name}.weight', out, x.shape[1] // groups, k, k, scale=fan**-0.5)
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)

    def dynamic(
        self,
        name,
        w,
        x,
        out,
        k,
        stride=1,
        padding=0,
        groups=1,
        bias=False,
        dilation=1,
        cell_dims=(1, 1),
    ):
        """A dynamic convolution of warehouse ``w``; every image by itself."""
        n, co, ci = self.cells[w]
        budget = self.budgets[w]
        group_in = x.shape[1] // groups
        rows, cols = out // co, group_in // ci
        mixtures = k * k * rows * cols
        start = self.cursor[w]
        alpha = self.attention(f'{name}.attention', x.mean((2, 3)), mixtures, n, start, budget)
        assigned = np.full(mixtures, n)
        for i in range(mixtures):
            if budget >= 1:
                assigned[i] = self.cursor[w]
                self.cursor[w] += int(budget)
            elif i % int(1 / budget) == (i // int(1 / budget)) % int(1 / budget):
                assigned[i] = self.cursor[w]
                self.cursor[w] += 1
        alpha = (1 - self.tau) * alpha
        alpha[:, np.arange(mixtures), assigned] += self.tau
        scale = (group_in * k * k) ** -0.5
        cells = self.p(f'warehouse_manager.weights.{w}', n, co, ci, *cell_dims, scale=scale)
        cells = cells.reshape(n, co, ci)
        offset = self.p(f'{name}.bias', out, scale=0.1) if bias else None
        images = []
        for image, weights in zip(x, alpha[:, :, :n]):
            kernel = torch.zeros(out, group_in, k, k)
            mixed = iter(torch.tensordot(weights, cells, 1))
            for y, z, row, col in itertools.product(range(k), range(k), range(rows), range(cols)):
                out_block = slice(row * co, (row + 1) * co)
                in_block = slice(col * ci, (col + 1) * ci)
                kernel[out_block, in_block, y, z] = next(mixed)
            images.append(F.conv2d(image[None], kernel, offset, stride, padding, dilation, groups))
        return torch.cat(images)

    def linear(self, name, x, out):
        fan = x.shape[1]
        weight = self.p(f'{name}.weight', out, fan, scale=fan**-0.5)
        return x @ weight.T + self.p(f'{name}.bias', out, scale=0.1)

    def attention(self, name, pooled, mixtures, n, start, budget):
        """Tensor[batch, mixtures, n + 1], before the temperature."""
        c = pooled.shape[1]
        width = max(int(c * self.reduction), 16)
        hidden = pooled @ self.p(f'{name}.fc1.weight', width, c, scale=c**-0.5).T
        if self.norm == 'LN':
            hidden = self.layer_norm(f'{name}.norm1', hidden + self.p(f'{name}.fc1.bias', width))
        else:
            hidden = self.batch_norm(f'{name}.norm1', hidden)
        hidden = hidden.clamp(min=0)
        if self.basis_ratio < 1:
            local = int(budget * mixtures)
            basis = max(int((n - local) * self.basis_ratio), 16)
            z = hidden @ self.p(f'{name}.fc2.weight', mixtures * (local + basis + 1), width).T
            z = z.reshape(len(z), mixtures, -1)
            others = z[..., local:-1] @ self.p(f'{name}.fc3.weight', n - local, basis).T
            z = torch.cat(
                [others[..., :start], z[..., :local], others[..., start:], z[..., -1:]], -1
            )
            z = z + self.p(f'{name}.basis_bias', mixtures * (n + 1)).reshape(mixtures, n + 1)
        else:
            z = hidden @ self.p(f'{name}.fc2.weight', mixtures * (n + 1), width).T
            z = z + self.p(f'{name}.fc2.bias', mixtures * (n + 1))
            z = z.reshape(len(z), mixtures, n + 1)
        return z / (z.abs().sum(-1, keepdim=True) + 1e-3)


def resnet(
    depth,
    base=64,
    strides=(1, 2, 2, 2),
    dilations=(1, 1, 1, 1),
    contract=False,
    groups=1,
    group_width=None,
    deep=False,
    pool=False,
):
    """Forward pass of a ResNet of 18 or 50 layers.

    Dilated for segmentation, with groups of ``group_width`` channels at the first stage, with three
    convolutions for a stem (``deep``) or pooling before the downsampling convolutions (``pool``).
    """
    counts = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]
    bottleneck = depth >= 50

    def stem(net, x):
        if not deep:
            return net.batch_norm('bn1', net.static('conv1', x, base, 7, 2, 3)).relu()
        for place, (out, stride) in enumerate(((base // 2, 2), (base // 2, 1), (base, 1))):
            x = net.static(f'stem.{3 * place}', x, out, 3, stride, 1)
            x = net.batch_norm(f'stem.{3 * place + 1}', x).relu()
        return x

    def forward(net, x):
        x = F.max_pool2d(stem(net, x), 3, 2, 1)
        outputs = []
        for stage, count in enumerate(counts):
            width = base * 2**stage
            inner = width if group_width is None else groups * group_width * 2**stage
            for block in range(count):
                name = f'layer{stage + 1}.{block}'
                first = block == 0
                stride = strides[stage] if first else 1
                spread = dilations[stage]
                if first and contract and spread > 1:
                    spread //= 2
                home = stage - 1 if first and stage else stage

                def conv(part, x, out, k, stride=1, w=stage, name=name, first=first, **other):
                    handed = first and part.startswith(('conv1', 'downsample'))
                    padding = k // 2 * other.get('dilation', 1)
                    if handed and bottleneck and name == 'layer1.0':
                        return net.static(f'{name}.{part}', x, out, k, stride, padding, **other)
                    return net.dynamic(f'{name}.{part}', w, x, out, k, stride, padding, **other)

                y, out = x, width * (4 if bottleneck else 1)
                if bottleneck:
                    y = net.batch_norm(f'{name}.bn1', conv('conv1', y, inner, 1, w=home)).relu()
                    y = conv('conv2', y, inner, 3, stride, groups=groups, dilation=spread)
                    y = net.batch_norm(f'{name}.bn2', y).relu()
                    y = net.batch_norm(f'{name}.bn3', conv('conv3', y, out, 1))
                else:
                    y = conv('conv1', y, width, 3, stride, w=home, dilation=spread)
                    y = net.batch_norm(f'{name}.bn1', y).relu()
                    y = net.batch_norm(f'{name}.bn2', conv('conv2', y, width, 3))
                if first and (stride > 1 or x.shape[1] != out):
                    part = 'downsample.0'
                    if pool:
                        part, step = 'downsample.1', stride
                        x = F.avg_pool2d(x, step, step, ceil_mode=True, count_include_pad=False)
                    x = conv(part, x, out, 1, 1 if pool else stride, w=home)
                    x = net.batch_norm(f'{name}.downsample.{int(part[-1]) + 1}', x)
                x = (x + y).relu()
            outputs.append(x)
        net.logits = net.linear('fc', x.mean((2, 3)), 1000)
        return outputs

    return forward


def convnext_tiny(net, x):
    """Forward pass of a ConvNeXt-Tiny backbone, with the output norms of detection."""
    outputs = []
    for stage, (depth, width) in enumerate(zip((3, 3, 9, 3), (96, 192, 384, 768))):
        name = f'downsample_layers.{stage}'

        def norm(name, x):
            return net.layer_norm(name, x.permute(0, 2, 3, 1), 1e-6).permute(0, 3, 1, 2)

        if stage == 0:
            x = norm(f'{name}.1', net.dynamic(f'{name}.0', 0, x, width, 4, 4, bias=True))
        else:
            x = net.dynamic(f'{name}.1', stage, norm(f'{name}.0', x), width, 2, 2, bias=True)
        for block in range(depth):
            name = f'stages.{stage}.{block}'
            depthwise, pointwise = 4 + 2 * stage, 5 + 2 * stage
            y = net.dynamic(f'{name}.dwconv', depthwise, x, width, 7, 1, 3, width, bias=True)
            y = norm(f'{name}.norm', y)
            y = net.dynamic(f'{name}.pwconv1', pointwise, y, 4 * width, 1, bias=True)
            y = net.dynamic(f'{name}.pwconv2', pointwise, F.gelu(y), width, 1, bias=True)
            x = x + net.p(f'{name}.gamma', 1, width, 1, 1) * y
        outputs.append(norm(f'norm{stage}', x))
    net.logits = net.linear('head', net.layer_norm('norm', x.mean((2, 3)), 1e-6), 1000)
    return outputs


def mobilenet_v2(width, pointwise):
    """Forward pass of a MobileNetV2 backbone; ``pointwise`` is 'joint', 'separate' or 'last'."""

    def divisible(value):
        new = max(8, int(value + 4) // 8 * 8)
        return new + 8 if new < 0.9 * value else new

    def forward(net, x):
        numbers = {}

        def warehouse(stage, kind):
            if kind != 'dw' and pointwise == 'joint':
                kind = 'pw'
            if kind != 'dw' and pointwise == 'last' and stage < 6:
                return None
            return numbers.setdefault((stage, kind), len(numbers))

        def conv(name, home, x, out, k=1, stride=1, groups=1):
            if home is None:
                return net.static(name, x, out, k, stride, k // 2, groups)
            return net.dynamic(name, home, x, out, k, stride, k // 2, groups)

        home = warehouse(0, 'dw')
        x = conv('features.0.0', home, x, divisible(32 * width), 3, 2)
        x = net.batch_norm('features.0.1', x).clamp(0, 6)
        groups = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)]
        groups += [(6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
        index, outputs = 0, []
        stages = (1, 2, 3, 4, 5, 6, 6)
        for group, (expand, channels, count, stride) in enumerate(groups):
            out = divisible(channels * width)
            for block in range(count):
                index += 1
                stage = stages[max(group - 1, 0)] if block == 0 else stages[group]
                name, part, y = f'features.{index}.conv', 0, x
                if expand != 1:
                    home = warehouse(stage, 'expand')
                    y = conv(f'{name}.0.0', home, y, x.shape[1] * expand)
                    y = net.batch_norm(f'{name}.0.1', y).clamp(0, 6)
                    part = 1
                step = stride if block == 0 else 1
                hidden = y.shape[1]
                home = warehouse(stage, 'dw')
                y = conv(f'{name}.{part}.0', home, y, hidden, 3, step, hidden)
                y = net.batch_norm(f'{name}.{part}.1', y).clamp(0, 6)
                y = conv(f'{name}.{part + 1}', warehouse(stage, 'project'), y, out)
                y = net.batch_norm(f'{name}.{part + 2}', y)
                x = x + y if step == 1 and x.shape[1] == out else y
            outputs.append(x)
        x = conv('features.18.0', warehouse(6, 'project'), x, max(1280, int(1280 * width)))
        outputs.append(net.batch_norm('features.18.1', x).clamp(0, 6))
        pooled = outputs[-1].mean((2, 3))
        if pointwise == 'last':
            # Dynamic too: cells of all outputs and 32 inputs, half as many as it has mixtures.
            home, pixel = warehouse('classifier', 'dw'), pooled[:, :, None, None]
            logits = net.dynamic('classifier.1', home, pixel, 1000, 1, bias=True, cell_dims=(1,))
            net.logits = logits.flatten(1)
        else:
            net.logits = net.linear('classifier.1', pooled, 1000)
        return [outputs[i] for i in (1, 2, 4, 7)]

    return forward
