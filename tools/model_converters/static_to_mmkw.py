"""Gives a KernelWarehouse network static weights: ``static_to_mmkw.py CONFIG SRC DST``.

Loading SRC by ``init_cfg`` or ``load_from`` does the same; the file written here needs no static
kernels any more, and both networks are run on an image and compared first.
"""

import argparse
import os.path as osp
from functools import partial
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmkw.checkpoints import read_checkpoint
from mmkw.engine.building import build_model, dynamic_networks
from mmkw.engine.command_line import library_of
from mmkw.sharing import static_networks

# Of the largest output: what float32 leaves of an exact start after some fifty layers.
TOLERANCE = 1e-3


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a nested output, in order."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def calls_of(model: nn.Module, networks: dict[str, nn.Module], image: Tensor) -> dict[str, tuple]:
    """Runs a model on an image; notes what its networks are first called with and what they give.

    Args:
        model: A detector, a segmentor, a classifier or a backbone.
        networks: Parts of the model, by name.
        image: Tensor[1, 3, height, width].
    """
    calls: dict[str, tuple] = {}

    def note(name: str, _: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        calls.setdefault(name, (args, kwargs, output))

    handles = [
        network.register_forward_hook(partial(note, name), with_kwargs=True)
        for name, network in networks.items()
    ]
    with torch.no_grad():
        if hasattr(model, 'data_preprocessor'):
            model(image, [sample_of(model, image)], mode='predict')
        else:
            model(image)
    for handle in handles:
        handle.remove()
    return calls


def sample_of(model: nn.Module, image: Tensor) -> Any:
    """The data sample of an image without annotations."""
    shape = tuple(image.shape[-2:])
    meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape)
    if hasattr(model, 'decode_head'):
        from mmseg.structures import SegDataSample as Sample
    elif hasattr(model, 'head'):
        from mmpretrain.structures import DataSample as Sample
    else:
        from mmdet.structures import DetDataSample as Sample
    return Sample(metainfo=dict(meta, scale_factor=(1.0, 1.0), img_id=0))


def largest_difference(
    model: nn.Module, static: nn.Module, networks: dict[str, nn.Module], image: Tensor
) -> dict[str, float]:
    """Compares the networks of a model with their static twins, on the inputs of the first.

    Args:
        model: With dynamic networks.
        static: The static model, of the same weights.
        networks: The dynamic networks of ``model``, by name.
        image: Tensor[1, 3, height, width].

    Returns:
        By network the largest difference of an output, relative to the largest of its values.
    """
    found = {}
    for name, (args, kwargs, output) in calls_of(model, networks, image).items():
        with torch.no_grad():
            expected = static.get_submodule(name)(*args, **kwargs)
        found[name] = max(
            float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
            for a, b in zip(tensors(output), tensors(expected))
        )
    return found


def main() -> None:
    """Reads the command line, converts, compares and writes."""
    parser = argparse.ArgumentParser(description='Warm-start a KernelWarehouse network')
    parser.add_argument('config', help='config of the KernelWarehouse model')
    parser.add_argument('src', help='static checkpoint, of the backbone or of the whole model')
    parser.add_argument('dst', help='file to write')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        help='overrides of the config, such as model.backbone.start_tau=1',
    )
    parser.add_argument(
        '--shape', nargs=2, type=int, default=(224, 224), help='height and width of the image'
    )
    args = parser.parse_args()
    if osp.exists(args.dst):
        parser.error(f'dst {args.dst} exists; remove it or give another name')
    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options)
    try:
        checkpoint = read_checkpoint(args.src, map_location='cpu')
        state = checkpoint.get('state_dict', checkpoint)
        state = {key.removeprefix('module.'): value for key, value in state.items()}
        if any('warehouse_manager.weights.' in key for key in state):
            parser.error(f'src {args.src} is a KernelWarehouse checkpoint, not a static one')
        model = build_model(config)
        with static_networks():
            static = build_model(config)
        whole = library_of(config) == 'mmpretrain'  # A classifier takes an ImageNet file whole.
        if not whole and not any(key.startswith('backbone.') for key in state):
            model, static = model.backbone, static.backbone
        networks = dynamic_networks(model)
        if not networks:
            parser.error(f'{args.config} builds no network with warehouses')
        load_state_dict(model, dict(state))
        load_state_dict(static, dict(state))
    except (RuntimeError, FileNotFoundError) as error:
        parser.error(str(error))
    torch.manual_seed(0)
    image = torch.randn(1, 3, *args.shape)
    # Some networks' eval() returns nothing.
    model.eval(), static.eval()
    differences = largest_difference(model, static, networks, image)
    for name in networks:
        seen = f'{differences[name]:.1e}' if name in differences else 'not run'
        print(f'{name or "backbone"}: largest difference of an output, relative: {seen}')
    budgets = [
        partition.options.cell_num_ratio
        for network in networks.values()
        for partition in network.warehouse_manager.partitions
    ]
    if min(budgets) >= 1 and max(differences.values()) > TOLERANCE:
        parser.error(f'the outputs differ by more than {TOLERANCE}; nothing is written')
    meta = dict(source=osp.basename(args.src))
    told = checkpoint.get('meta')
    if isinstance(told, dict) and 'dataset_meta' in told:
        meta['dataset_meta'] = told['dataset_meta']
    start_tau = max(network.warehouse_manager.start_tau for network in networks.values())
    if start_tau:
        meta['temperature'] = start_tau
    torch.save(dict(meta=meta, state_dict=model.state_dict()), args.dst)
    print(f'Written to {args.dst}, for a start at temperature {start_tau:g}.')


if __name__ == '__main__':
    main()
