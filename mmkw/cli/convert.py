"""``mmkw convert SRC DST``: a checkpoint for a KernelWarehouse network.

Of a published checkpoint it keeps what the networks of mmkw load, under the names of MMDetection,
MMSegmentation or MMPretrain. With ``--config`` it gives the KernelWarehouse network of a config the
weights of a static one, and compares both. Both load as they are, too: by ``init_cfg`` or
``load_from``.
"""

import argparse
import os
import os.path as osp
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from mmengine.runner.checkpoint import load_state_dict, save_checkpoint
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..backbones import rewrite_published
from ..checkpoints import read_checkpoint
from ..deploy.networks import difference
from ..engine.building import build_static, dynamic_networks, state_of
from ..engine.command_line import add_config_options, config_of, library_of
from ..engine.files.backend import NAME as WHOLE_FILES
from .config import model_of, pixels

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
        found[name] = difference(tensors(output), tensors(expected))
    return found


def main(argv: Sequence[str]) -> None:
    """Reads the command line, converts and writes.

    Args:
        argv: The arguments after ``convert``.
    """
    parser = argparse.ArgumentParser(
        prog='mmkw convert',
        description='Write a checkpoint for a KernelWarehouse network: of a published '
        'KernelWarehouse checkpoint, or with --config of a static one',
    )
    parser.add_argument(
        'src', help='checkpoint of a backbone, a classifier, a detector or a segmentor'
    )
    parser.add_argument('dst', help='file to write')
    parser.add_argument(
        '--config',
        help='start the KernelWarehouse network of this config from the static SRC; a file, or '
        'PACKAGE::CONFIG such as mmkw::mask_rcnn/...',
    )
    add_config_options(parser)
    parser.add_argument(
        '--shape',
        nargs=2,
        type=pixels,
        help='with --config: height and width of the image on which both networks are compared; '
        'by default 224 224',
    )
    parser.add_argument(
        '--library',
        choices=['mmdet', 'mmseg', 'mmpretrain'],
        help='without --config: for the MobileNetV2 of mmdet (the default) or mmseg (other '
        'backbones have the same names in both) or for a classifier of mmpretrain',
    )
    args = parser.parse_args(argv)
    if args.config is None and (args.cfg_options or args.shape):
        unused = '--cfg-options' if args.cfg_options else '--shape'
        parser.error(f'{unused} is for --config CONFIG, which is not given')
    if args.config is not None and args.library:
        parser.error(
            f'--library {args.library} is for a published checkpoint; the library of --config '
            f'{args.config} is known. Leave one out'
        )
    if osp.exists(args.dst):
        parser.error(f'dst {args.dst} exists; remove it or give another name')
    if not osp.isdir(osp.dirname(args.dst) or '.'):
        parser.error(f'dst {args.dst}: there is no folder {osp.dirname(args.dst)}')
    try:
        checkpoint = read_checkpoint(args.src, map_location='cpu')
        make = rewritten if args.config is None else warm_started
        state, meta, told = make(parser, args, checkpoint)
    except (RuntimeError, FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    converted = dict(meta=dict(meta, source=osp.basename(args.src)), state_dict=state)
    try:
        save_checkpoint(converted, args.dst, backend_args=dict(backend=WHOLE_FILES))
    except OSError as error:
        parser.error(
            f'dst {args.dst} could not be written: {os.strerror(error.errno or 0)}. Make room on '
            'the disk, or name another folder'
        )
    print(f'{len(state)} tensors written to {args.dst}{told}')


def rewritten(
    parser: argparse.ArgumentParser, args: argparse.Namespace, checkpoint: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Translates a published checkpoint.

    Args:
        parser: Reports mistakes of the command line.
        args: The command line.
        checkpoint: Of SRC.

    Returns:
        The state dict, the meta data, and what is to be told.
    """
    if not any('warehouse_manager.weights.' in key for key in state_of(checkpoint)):
        parser.error(
            f'src {args.src} is no KernelWarehouse checkpoint. If it is of a static network, name '
            'the KernelWarehouse network that it is for: --config CONFIG'
        )
    state, unused = rewrite_published(checkpoint, args.library or 'mmdet')
    meta = {}
    told = checkpoint.get('meta')
    if classes := told.get('CLASSES') if isinstance(told, dict) else None:
        meta['dataset_meta'] = dict(classes=classes)
    return state, meta, f'.\nLeft out, beyond the backbone: {", ".join(unused) or "nothing"}.'


def warm_started(
    parser: argparse.ArgumentParser, args: argparse.Namespace, checkpoint: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Starts the KernelWarehouse network of a config from static weights, and compares both.

    Args:
        parser: Reports mistakes of the command line.
        args: The command line.
        checkpoint: Of SRC.

    Returns:
        The state dict, the meta data, and what is to be told.
    """
    config = config_of(parser, args.config, args.cfg_options)
    state = state_of(checkpoint)
    if any('warehouse_manager.weights.' in key for key in state):
        parser.error(
            f'src {args.src} is a KernelWarehouse checkpoint, not a static one; leave out --config'
        )
    model = model_of(parser, args, config)
    static = build_static(config)
    whole = library_of(config) == 'mmpretrain'  # A classifier takes an ImageNet file whole.
    if not whole and not any(key.startswith('backbone.') for key in state):
        model, static = model.backbone, static.backbone
    networks = dynamic_networks(model)
    if not networks:
        parser.error(
            f'config {args.config} builds no network with warehouses; use a backbone such as '
            "'mmkw.KWResNet' or 'mmkw.KWModule'"
        )
    load_state_dict(model, dict(state))
    load_state_dict(static, dict(state))
    torch.manual_seed(0)
    image = torch.randn(1, 3, *(args.shape or (224, 224)))
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
    # Below a budget of 1 a start is not exact, but it gives numbers.
    allowed = TOLERANCE if min(budgets) >= 1 else sys.float_info.max
    if max(differences.values(), default=0) > allowed:
        parser.error(
            f'the outputs differ by more than {allowed:g}, or are no numbers; nothing is written'
        )
    meta = {}
    told = checkpoint.get('meta')
    if isinstance(told, dict) and 'dataset_meta' in told:
        meta['dataset_meta'] = told['dataset_meta']
    start_tau = max(network.warehouse_manager.start_tau for network in networks.values())
    if start_tau:
        meta['temperature'] = start_tau
    return model.state_dict(), meta, f', for a start at temperature {start_tau:g}.'
