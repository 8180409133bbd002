"""Every layer type against plain loops, and its gradients against finite differences."""

import math

import numpy as np
import plain_reference as plain
import pytest
import torch

from mmkw.layers import KWConv1d, KWConv2d, KWConv3d, KWLinear, set_temperature

CONVS = [
    # layer, arguments of torch.nn's, warehouse options, input size
    (KWConv1d, dict(in_channels=4, out_channels=6, kernel_size=3), {}, (7,)),
    (KWConv1d, dict(in_channels=4, out_channels=8, kernel_size=1, stride=2), {}, (6,)),
    (KWConv2d, dict(in_channels=4, out_channels=6, kernel_size=3), {}, (5, 6)),
    (KWConv2d, dict(in_channels=4, out_channels=8, kernel_size=3, stride=2, padding=1), {}, (6, 5)),
    (KWConv2d, dict(in_channels=4, out_channels=8, kernel_size=1), {}, (4, 3)),
    (KWConv2d, dict(in_channels=4, out_channels=8, kernel_size=1, stride=(2, 1)), {}, (5, 4)),
    (KWConv2d, dict(in_channels=4, out_channels=8, kernel_size=1, padding=1), {}, (3, 4)),
    (KWConv2d, dict(in_channels=4, out_channels=4, kernel_size=1, padding='same'), {}, (3, 4)),
    (
        KWConv2d,
        dict(in_channels=4, out_channels=4, kernel_size=(3, 2), padding='same', dilation=2),
        {},
        (6, 5),
    ),
    (KWConv2d, dict(in_channels=6, out_channels=6, kernel_size=3, groups=6), {}, (5, 5)),
    (
        KWConv2d,
        dict(in_channels=4, out_channels=8, kernel_size=3, groups=2, bias=False),
        {},
        (5, 5),
    ),
    (KWConv2d, dict(in_channels=4, out_channels=8, kernel_size=1, groups=2), {}, (3, 3)),
    (
        KWConv2d,
        dict(in_channels=4, out_channels=4, kernel_size=3, padding=(1, 2), padding_mode='reflect'),
        {},
        (5, 6),
    ),
    (
        KWConv2d,
        dict(in_channels=4, out_channels=4, kernel_size=3, padding=1, padding_mode='circular'),
        {},
        (4, 4),
    ),
    (
        KWConv2d,
        dict(in_channels=4, out_channels=4, kernel_size=3, padding=1, padding_mode='replicate'),
        {},
        (4, 4),
    ),
    (KWConv2d, dict(in_channels=4, out_channels=6, kernel_size=3), dict(cell_num_ratio=2), (4, 4)),
    (
        KWConv2d,
        dict(in_channels=4, out_channels=4, kernel_size=3),
        dict(cell_num_ratio=0.5, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5),
        (4, 4),
    ),
    (
        KWConv2d,
        dict(in_channels=8, out_channels=8, kernel_size=(1, 3), padding='same'),
        dict(cell_num_ratio=0.25, cell_inplane_ratio=0.25, cell_outplane_ratio=0.25),
        (3, 4),
    ),
    (
        KWConv2d,
        dict(in_channels=4, out_channels=8, kernel_size=3),
        dict(spatial_partition=False, cell_inplane_ratio=0.5, cell_outplane_ratio=0.25),
        (4, 5),
    ),
    (KWConv2d, dict(in_channels=4, out_channels=4, kernel_size=3), dict(norm='LN'), (4, 4)),
    (KWConv2d, dict(in_channels=64, out_channels=4, kernel_size=1), dict(reduction=0.5), (2, 3)),
    (KWConv3d, dict(in_channels=2, out_channels=4, kernel_size=2, padding=1), {}, (3, 2, 3)),
    (KWConv3d, dict(in_channels=4, out_channels=4, kernel_size=1, groups=2), {}, (2, 2, 2)),
]


def build(layer_type, arguments, options):
    options = dict(options)
    if norm := options.pop('norm', None):
        options['attention_norm_cfg'] = dict(type=norm)
    layer = layer_type(**arguments, **options).double()
    randomise_norms(layer)
    return layer


def randomise_norms(network):
    """Norm statistics and biases away from their start, where mistakes would not show."""
    for name, tensor in network.state_dict().items():
        if 'running_var' in name:
            tensor.uniform_(0.5, 2)
        elif 'norm' in name and tensor.is_floating_point():
            tensor.normal_(0.5, 0.5)
        elif name.endswith(('fc1.bias', 'fc2.bias', 'basis_bias')):
            tensor.normal_()


def arrays(network):
    return {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}


def expected_kernels(layer, state, x, budget, tau, train):
    cells = state['warehouse_manager.weights.0']
    out, group_in, size = layer.out_channels, layer.in_channels // layer.groups, layer.kernel_size
    per_cell = math.prod(cells.shape[1:])
    mixtures = out * group_in * math.prod(size) // per_cell
    pooled = x.reshape(*x.shape[:2], -1).mean(-1)
    alpha = plain.attention(
        pooled, state, 'attention.', mixtures, len(cells), 0, budget, tau, train
    )
    return [plain.assemble(a, cells, out, group_in, size) for a in alpha]


@pytest.mark.parametrize('tau', [0, 0.3, 1])
@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('case', CONVS, ids=lambda case: f'{case[0].__name__}-{case[1]}-{case[2]}')
def test_convolutions_equal_plain_loops(case, batch, tau, train):
    layer_type, arguments, options, size = case
    layer = build(layer_type, arguments, options).train(train)
    set_temperature(layer, tau)
    x = torch.randn(batch, layer.in_channels, *size, dtype=torch.double)
    state = arrays(layer)
    budget = options.get('cell_num_ratio', 1)

    kernels = expected_kernels(layer, state, x.numpy(), budget, tau, train)
    expected = [
        plain.convolve(
            image,
            kernel,
            state.get('bias'),
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.padding_mode,
        )
        for image, kernel in zip(x.numpy(), kernels)
    ]
    result = layer(x)
    np.testing.assert_allclose(result.detach().numpy(), np.stack(expected), atol=1e-10, rtol=1e-9)
    # In float32, from the state before the forward pass moved the running statistics.
    layer.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
    single = layer.float()(x.float())
    np.testing.assert_allclose(single.detach().numpy(), np.stack(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('tau', [0, 0.3, 1])
@pytest.mark.parametrize('shape', [(5,), (3, 5), (2, 4, 5), (2, 3, 2, 5)])
@pytest.mark.parametrize('budget', [1, 4])
def test_linear_equals_plain_loops(shape, budget, tau):
    layer = build(KWLinear, dict(in_features=5, out_features=10), dict(cell_num_ratio=budget))
    layer.eval()
    set_temperature(layer, tau)
    x = torch.randn(shape, dtype=torch.double)
    state = arrays(layer)
    cells = state['warehouse_manager.weights.0']
    assert cells.shape == (budget, 10, 5, 1)

    samples = x.numpy() if x.dim() > 1 else x.numpy()[None]
    pooled = samples.reshape(len(samples), -1, 5).mean(1)
    alpha = plain.attention(pooled, state, 'attention.', 1, budget, 0, budget, tau)
    expected = np.stack(
        [
            sample @ plain.assemble(a, cells, 10, 5, (1,))[..., 0].T + state['bias']
            for sample, a in zip(samples, alpha)
        ]
    ).reshape(*shape[:-1], 10)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-10)


@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('tau', [0, 0.3])
@pytest.mark.parametrize(
    'layer_type, arguments, options, shape',
    [
        (KWConv1d, (2, 4, 3), {}, (2, 5)),
        (KWConv2d, (2, 4, 3), dict(padding=1, stride=2), (2, 4, 4)),
        (KWConv2d, (2, 4, 1), dict(cell_num_ratio=2, stride=2), (2, 3, 3)),
        (KWConv2d, (4, 4, 3), dict(groups=4, padding='same', dilation=2), (4, 4, 4)),
        (
            KWConv2d,
            (4, 4, 2),
            dict(cell_num_ratio=0.5, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5),
            (4, 3, 3),
        ),
        (KWConv2d, (2, 2, 2), dict(spatial_partition=False), (2, 3, 3)),
        (KWConv3d, (1, 2, 2), {}, (1, 2, 3, 2)),
        (KWLinear, (3, 2), dict(cell_num_ratio=3), (2, 3)),
    ],
)
def test_gradcheck(layer_type, arguments, options, shape, batch, tau):
    layer = layer_type(*arguments, **options, attention_norm_cfg=dict(type='LN')).double()
    set_temperature(layer, tau)
    names = [name for name, _ in layer.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    x = torch.randn(batch, *shape, dtype=torch.double, requires_grad=True)

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True, atol=1e-6)
