"""Compares networks started from static ones with these: ``exactness.py [NAME...]``.

For every network, budget and start: the largest difference of an output relative to the largest
value, in single and in double precision.
"""

import argparse
from collections.abc import Sequence

import torch
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmkw.deploy.networks import difference
from mmkw.sharing import static_networks

HRNET = {
    f'stage{stage}': dict(
        num_modules=(1, 1, 4, 3)[stage - 1],
        num_branches=stage,
        block='BASIC' if stage > 1 else 'BOTTLENECK',
        num_blocks=(4,) * stage,
        num_channels=tuple((18 if stage > 1 else 64) << branch for branch in range(stage)),
    )
    for stage in (1, 2, 3, 4)
}
# library and config of the static network
NETWORKS = {
    'ResNet18': ('mmdet', dict(type='ResNet', depth=18)),
    'ResNet50': ('mmdet', dict(type='ResNet', depth=50)),
    'ResNeXt50-32x4d': ('mmdet', dict(type='ResNeXt', depth=50, groups=32, base_width=4)),
    'Res2Net50': ('mmdet', dict(type='Res2Net', depth=50)),
    'RegNetX-3.2GF': ('mmdet', dict(type='RegNet', arch='regnetx_3.2gf')),
    'HRNetV2-W18': ('mmdet', dict(type='HRNet', extra=HRNET)),
    'MobileNetV2': ('mmdet', dict(type='MobileNetV2')),
    'ConvNeXt-Tiny': ('mmkw', dict(type='ConvNeXt')),
    'CSPDarknet (YOLOX-s)': (
        'mmdet',
        dict(type='CSPDarknet', deepen_factor=0.33, widen_factor=0.5),
    ),
    'Swin-T': ('mmdet', dict(type='SwinTransformer')),
    'ViT-T': (
        'mmseg',
        dict(
            type='VisionTransformer',
            embed_dims=192,
            num_heads=3,
            num_layers=12,
            out_indices=(2, 5, 8, 11),
        ),
    ),
    'MiT-B0': (
        'mmseg',
        dict(
            type='MixVisionTransformer',
            embed_dims=32,
            num_layers=[2, 2, 2, 2],
            num_heads=[1, 2, 5, 8],
        ),
    ),
}


def build(library: str, config: dict, **wrapper: object) -> nn.Module:
    """Builds the dynamic network; inside of :func:`mmkw.sharing.static_networks` the static one.

    Args:
        library: Whose the static network is.
        config: Of the static network.
        **wrapper: Arguments of ``mmkw.KWModule``.
    """
    config = dict(config, type=f'{library}.{config["type"]}')
    # Our ConvNeXt is of neither library.
    with DefaultScope.overwrite_default_scope('mmdet' if library == 'mmkw' else library):
        return MODELS.build(dict(type='mmkw.KWModule', module=config, **wrapper))


def build_static(library: str, config: dict) -> nn.Module:
    """Builds a static network whose norms hide no layer, as those at their start would.

    Args:
        library: Whose it is.
        config: Its config.
    """
    with static_networks():
        network = build(library, config)
    network.init_weights()
    for module in network.modules():
        if isinstance(module, (_BatchNorm, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(getattr(module, 'gamma', None), nn.Parameter):
            nn.init.uniform_(module.gamma, 0.5, 1.5)
    return network


def outputs(network: nn.Module, side: int, dtype: torch.dtype = torch.float32) -> Sequence[Tensor]:
    """What a network gives for two images of noise, always the same."""
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1)).to(dtype)
    # mmdet's ResNet.eval() returns None.
    network.eval()
    with torch.no_grad():
        return network(x)


def main() -> None:
    """Reads the command line and prints a table."""
    parser = argparse.ArgumentParser(description='Compare warm-started networks with static ones')
    parser.add_argument('names', nargs='*', metavar='NAME', help=f'of {", ".join(NETWORKS)}')
    parser.add_argument('--budgets', nargs='+', type=int, default=[1, 2, 4])
    parser.add_argument('--side', type=int, default=224, help='pixels of the image, a side')
    args = parser.parse_args()
    for name in set(args.names) - set(NETWORKS):
        parser.error(f'unknown {name!r}; there are {", ".join(NETWORKS)}')
    starts = [(budget, tau) for tau in (0, 1) for budget in args.budgets]
    print('| network | ' + ' | '.join(f'{b}x, tau {tau}' for b, tau in starts) + ' |')
    print('|---' * (len(starts) + 1) + '|')
    for name in args.names or NETWORKS:
        torch.manual_seed(0)
        static = build_static(*NETWORKS[name])
        expected = {}
        for dtype in (torch.float32, torch.double):
            expected[dtype] = outputs(static.to(dtype), args.side, dtype)
        # float64 kernels would be rounded to float32 alike in both.
        state = static.float().state_dict()
        cells = []
        for budget, tau in starts:
            found = []
            for dtype in (torch.float32, torch.double):
                network = build(*NETWORKS[name], cell_num_ratio=budget, start_tau=tau).to(dtype)
                network.load_state_dict(dict(state))
                found.append(difference(outputs(network, args.side, dtype), expected[dtype]))
            cells.append(f'{found[0]:.0e} / {found[1]:.0e}')
        print(f'| {name} | ' + ' | '.join(cells) + ' |', flush=True)


if __name__ == '__main__':
    main()
