"""KernelWarehouse in plain loops over NumPy arrays, written from the formulas alone.

Nothing of mmkw is used here: names of state dict entries are all it shares with the product.
"""

import itertools
import math

import numpy as np


def one_to_one(start: int, mixtures: int, budget: float) -> tuple[list, int]:
    """Cell of every mixture at tau = 1 (-1: the zero cell), and the next layer's start."""
    cells, s = [], start
    for i in range(mixtures):
        if budget >= 1:
            cells.append(s)
            s += int(budget)
        else:
            q = int(1 / budget)
            if i % q == (i // q) % q:
                cells.append(s)
                s += 1
            else:
                cells.append(-1)
    return cells, s


def attention(pooled, state, prefix, mixtures, num_cells, start, budget, tau, train=False):
    """alpha[batch][mixture][cell] of one layer; ``state`` holds NumPy arrays by name."""
    p = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    batch = len(pooled)
    hidden = pooled @ p['fc1.weight'].T + p.get('fc1.bias', 0)
    gain, shift = p['norm1.weight'], p['norm1.bias']
    if 'norm1.running_mean' in p:
        mean, var = p['norm1.running_mean'], p['norm1.running_var']
        if train and batch > 1:
            mean = hidden.mean(0)
            var = ((hidden - mean) ** 2).mean(0)
        hidden = (hidden - mean) / np.sqrt(var + 1e-5) * gain + shift
    else:
        for row in range(batch):
            mean, var = hidden[row].mean(), hidden[row].var()
            hidden[row] = (hidden[row] - mean) / math.sqrt(var + 1e-5) * gain + shift
    hidden = np.maximum(hidden, 0)
    z = (hidden @ p['fc2.weight'].T + p.get('fc2.bias', 0)).reshape(batch, mixtures, -1)
    assigned, _ = one_to_one(start, mixtures, budget)

    alpha = np.zeros((batch, mixtures, num_cells))
    for b, i in itertools.product(range(batch), range(mixtures)):
        logits = z[b, i]
        if 'fc3.weight' in p:
            local = int(budget * mixtures)
            others = p['fc3.weight'] @ logits[local:-1]
            logits = np.concatenate([others[:start], logits[:local], others[start:], logits[-1:]])
            logits = logits + p['basis_bias'].reshape(mixtures, -1)[i]
        total = sum(abs(value) for value in logits) + 1e-3
        for j in range(num_cells):
            beta = 1.0 if assigned[i] == j else 0.0
            alpha[b, i, j] = (1 - tau) * logits[j] / total + tau * beta
    return alpha


def assemble(alpha, cells, out_channels, in_channels, kernel_size):
    """One kernel from one image's alpha[mixture][cell]; mixtures run over (spatial, out, in)."""
    _, cell_out, cell_in, *cell_kernel = cells.shape
    kernel = np.zeros((out_channels, in_channels, *kernel_size))
    blocks = [range(k // e) for k, e in zip(kernel_size, cell_kernel)]
    mixture = 0
    for position in itertools.product(*blocks):
        for out_block in range(out_channels // cell_out):
            for in_block in range(in_channels // cell_in):
                cell = sum(a * cell for a, cell in zip(alpha[mixture], cells))
                where = [
                    slice(out_block * cell_out, (out_block + 1) * cell_out),
                    slice(in_block * cell_in, (in_block + 1) * cell_in),
                ]
                where += [slice(p * e, (p + 1) * e) for p, e in zip(position, cell_kernel)]
                kernel[tuple(where)] = cell
                mixture += 1
    assert mixture == len(alpha)
    return kernel


def convolve(image, kernel, bias, stride, padding, dilation, groups, mode='zeros'):
    """Convolution of one image (channels, *size) with loops over every output value."""
    dims = image.ndim - 1
    kernel_size = kernel.shape[2:]
    if padding == 'same':
        total = [d * (k - 1) for d, k in zip(dilation, kernel_size)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(p, p) for p in padding]
    how = {'zeros': 'constant', 'reflect': 'reflect', 'replicate': 'edge', 'circular': 'wrap'}
    image = np.pad(image, [(0, 0), *pads], mode=how[mode])
    size = [
        (image.shape[1 + i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1
        for i in range(dims)
    ]
    out_channels, group_in = kernel.shape[:2]
    result = np.zeros((out_channels, *size))
    for out in range(out_channels):
        first = out // (out_channels // groups) * group_in
        for place in itertools.product(*(range(s) for s in size)):
            value = 0.0 if bias is None else bias[out]
            for offset in itertools.product(*(range(k) for k in kernel_size)):
                at = tuple(p * s + o * d for p, s, o, d in zip(place, stride, offset, dilation))
                for channel in range(group_in):
                    value += image[(first + channel, *at)] * kernel[(out, channel, *offset)]
            result[(out, *place)] = value
    return result


def softmax(values):
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def comparator(method, pooled, state, tau, depthwise=False, taps=1, train=False):
    """What a comparator's attention gives one image after another: dicts of its four attentions.

    ``state`` holds the attention's NumPy arrays by name, ``pooled`` one row for every image.
    """

    def linear(name, values):
        return values @ state[f'{name}.weight'].T + state.get(f'{name}.bias', 0)

    def sigmoid(values):
        return 1 / (1 + np.exp(-values))

    divisor = 1 + 29 * tau
    if method == 'dyconv':
        hidden = np.maximum(linear('fc1', pooled), 0)
        return [dict(kernels=softmax(row / divisor)) for row in linear('fc2', hidden)]
    if method == 'condconv':
        return [dict(kernels=sigmoid(row)) for row in linear('fc', pooled)]
    hidden = linear('fc', pooled)
    mean, var = state['bn.running_mean'], state['bn.running_var']
    if train and len(pooled) > 1:
        mean, var = hidden.mean(0), hidden.var(0)
    hidden = (hidden - mean) / np.sqrt(var + 1e-5) * state['bn.weight'] + state['bn.bias']
    found = []
    for row in np.maximum(hidden, 0):
        one = dict(kernels=np.ones(1), inputs=sigmoid(linear('channel_fc', row) / divisor))
        if not depthwise:
            one['filters'] = sigmoid(linear('filter_fc', row) / divisor)
        if taps > 1:
            one['taps'] = sigmoid(linear('spatial_fc', row) / divisor)
        if 'kernel_fc.weight' in state:
            one['kernels'] = softmax(linear('kernel_fc', row) / divisor)
        found.append(one)
    return found


def comparator_kernel(attentions, kernels, groups):
    """The kernel of one image: every value of every kernel times all attentions it is under."""
    count, out_channels, in_channels, *size = kernels.shape
    result = np.zeros(kernels.shape[1:])
    for out, channel in itertools.product(range(out_channels), range(in_channels)):
        group = out // (out_channels // groups)
        for tap, place in enumerate(itertools.product(*map(range, size))):
            value = sum(
                attentions['kernels'][k] * kernels[(k, out, channel, *place)] for k in range(count)
            )
            value *= attentions.get('inputs', np.ones(groups * in_channels))[
                group * in_channels + channel
            ]
            value *= attentions.get('filters', np.ones(out_channels))[out]
            value *= attentions.get('taps', np.ones(math.prod(size)))[tap]
            result[(out, channel, *place)] = value
    return result
