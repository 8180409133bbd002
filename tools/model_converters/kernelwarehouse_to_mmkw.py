"""Rewrites a checkpoint of the paper's authors: ``kernelwarehouse_to_mmkw.py SRC DST``.

The networks of mmkw load these checkpoints as they are; rewritten ones hold nothing else than what
is loaded, under the names of MMDetection, MMSegmentation or MMPretrain.
"""

import argparse
import os.path as osp

import torch

from mmkw.backbones import rewrite_published
from mmkw.checkpoints import read_checkpoint


def main() -> None:
    """Reads the command line and converts."""
    parser = argparse.ArgumentParser(description='Rewrite a published KernelWarehouse checkpoint')
    parser.add_argument('src', help='checkpoint as downloaded, of ImageNet or of a detector')
    parser.add_argument('dst', help='file to write')
    parser.add_argument(
        '--library',
        choices=['mmdet', 'mmseg', 'mmpretrain'],
        default='mmdet',
        help='for the MobileNetV2 of mmdet or mmseg (other backbones have the same names in both) '
        'or for a classifier of mmpretrain',
    )
    args = parser.parse_args()
    if osp.exists(args.dst):
        parser.error(f'dst {args.dst} exists; remove it or give another name')
    try:
        checkpoint = read_checkpoint(args.src, map_location='cpu')
        state_dict, unused = rewrite_published(checkpoint, args.library)
    except (RuntimeError, FileNotFoundError) as error:
        parser.error(str(error))
    meta = dict(source=osp.basename(args.src))
    told = checkpoint.get('meta')
    if classes := told.get('CLASSES') if isinstance(told, dict) else None:
        meta['dataset_meta'] = dict(classes=classes)
    torch.save(dict(meta=meta, state_dict=state_dict), args.dst)
    print(f'{len(state_dict)} tensors written to {args.dst}.')
    print(f'Left out, beyond the backbone: {", ".join(unused) or "nothing"}.')


if __name__ == '__main__':
    main()
