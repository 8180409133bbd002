"""Writes docs/model_zoo.md, model-index.yml and the figures in every metafile.yml from the configs.

What the configs do not say (the collection with its paper, published results) is kept from the
metafiles. ``--check`` writes nothing and fails if a file would change.
"""

import argparse
import sys
from concurrent.futures import Executor, ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import yaml
from complexity import count
from mmengine.config import Config

from mmkw.engine.command_line import PUBLISHED_WEIGHTS

ROOT = Path(__file__).parents[2]
HEADER = """# Model zoo

Made by `python tools/analysis_tools/model_zoo.py` from the configs and their `metafile.yml`.

AP and accuracy are those of the paper ([KernelWarehouse](https://arxiv.org/abs/2406.07879), ICML
2024), not measured here; where there is none, the paper has none. Parameters (of the whole model)
and FLOPs (multiply-adds of the backbone for one image of the given size, attentions and mixing
included) are measured: `python tools/analysis_tools/complexity.py CONFIG`.

## ImageNet weights

Download the file from the authors' release
([KernelWarehouse](https://github.com/OSVAI/KernelWarehouse), [ODConv](https://github.com/OSVAI/ODConv))
and save it under this name; other weights in the tables below are downloaded by themselves.
Published detectors and classifiers are for `load_from`, `tools/test.py CONFIG FILE` and the
libraries' own `init_detector`, `get_model` and inferencers, as downloaded. Weights of ODConv are
known by their names alone: the released file was not tried.

| save as | weights |
|---|---|
"""
BACKBONES = """
## Another backbone

Most detectors and segmentors are here once, with a 1x ResNet50. To have another backbone, name
another file of `configs/_base_/backbones` in `_base_`. In a config of your own:

```python
_base_ = [
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'mmkw::_base_/backbones/kw4x-r50.py',  # in configs/ it is '../_base_/backbones/...'
]
model = dict(backbone=_base_.backbone)
```

For the ResNet50 of any budget (`kw1d2x-r50.py`, `kw1x-r50.py`, `kw4x-r50.py`, the static `r50.py`)
that is all, as for those of [other dynamic convolutions](fine_tune.md#other-dynamic-convolutions),
`odconv4x-r50.py` and `dyconv4x-r50.py`. The others have other channels:

- ResNet18 (`kw1d4x-r18.py`, `kw1d2x-r18.py`, `kw1x-r18.py`, `kw2x-r18.py`, `kw4x-r18.py`, the
  static `r18.py`): `neck=dict(in_channels=[64, 128, 256, 512])`.
- MobileNetV2 (`kw1d2x-mobilenet-v2.py`, `kw1x-mobilenet-v2.py`, `kw4x-mobilenet-v2.py`, the static
  `mobilenet-v2.py`):
  `neck=dict(in_channels=[24, 32, 96, 1280])`, as in
  [Mask R-CNN](../configs/mask_rcnn/mask-rcnn_kw4x-mobilenet-v2_fpn_adamw-1x_coco.py). A segmentor
  inherits from one that MMSegmentation has made for MobileNetV2, as
  [DeepLabV3+](../configs/deeplabv3plus/deeplabv3plus_kw1x-mobilenet-v2-d8_4xb2-80k_cityscapes-512x1024.py).
- ConvNeXt-Tiny (`kw1x-convnext-tiny.py`, the static `convnext-tiny.py`):
  `neck=dict(in_channels=[96, 192, 384, 768])` and an optimizer of its own, as in
  [Mask R-CNN](../configs/mask_rcnn/mask-rcnn_kw1x-convnext-tiny_fpn_adamw-1x_coco.py) and, where
  the heads of a segmentor take the channels,
  [UPerNet](../configs/upernet/upernet_kw1x-convnext-tiny_8xb2-160k_ade20k-512x512.py).
- Where a neck takes only the last three stages (ATSS, DINO, RetinaNet), the backbone gives only
  these: `out_indices=(1, 2, 3)` of ConvNeXt, as in
  [ATSS](../configs/atss/atss_kw1x-convnext-tiny_fpn_adamw-1x_coco.py), `(2, 4, 7)` of MobileNetV2.
"""

DATA = dict(
    CocoDataset='COCO',
    CocoPanopticDataset='COCO panoptic',
    COCOStuffDataset='COCO-Stuff',
    ADE20KDataset='ADE20K',
    CityscapesDataset='Cityscapes',
    ImageNet='ImageNet-1k',
)


def leaf_configs() -> dict[str, list[Path]]:
    """The configs of every folder in the zoo."""
    folders = sorted(path for path in (ROOT / 'configs').iterdir() if path.is_dir())
    folders = [folder for folder in folders if folder.name not in ('_base_', 'demo')]
    return {folder.name: sorted(folder.glob('*.py')) for folder in folders}


def entry(path: Path, old: dict[str, Any], collection: str) -> dict[str, Any]:
    """The metafile's entry for a config; results are kept."""
    config = Config.fromfile(path)
    complexity = count(config)
    backbone = config.model.backbone
    wrapped = backbone.get('module') or {}
    initial = wrapped.get('init_cfg') or backbone.get('init_cfg') or {}
    checkpoint = initial.get('checkpoint') or config.model.get('pretrained')
    name = backbone.type.removeprefix('mmkw.') + (f' of {wrapped.type}' if wrapped else '')
    name += f', method {backbone.method}' if 'method' in backbone else ''
    dataset = config.train_dataloader.dataset
    height, width = complexity.shape
    metadata = {
        'Training Data': DATA[dataset.get('dataset', dataset).type],
        'Backbone': name,
        'Backbone Weights': checkpoint,
        'Parameters': complexity.parameters,
        'Backbone Parameters': complexity.backbone_parameters,
        'Backbone FLOPs': complexity.backbone_flops,
        'FLOPs Input': f'{height} x {width}',
    }
    if checkpoint in PUBLISHED_WEIGHTS:
        metadata['Backbone Weights Source'] = PUBLISHED_WEIGHTS[checkpoint]
    for unit, name in (('max_epochs', 'Epochs'), ('max_iters', 'Iterations')):
        if unit in config.train_cfg:
            metadata[name] = config.train_cfg[unit]
    new = {
        'Name': path.stem,
        'In Collection': collection,
        'Config': str(path.relative_to(ROOT)),
        'Weights': weights(old.get('Published Weights')),
        'Metadata': metadata,
    }
    for fact in ('Results', 'Published Weights'):
        if fact in old:
            new[fact] = old[fact]
    return new


def weights(published: str | None) -> str:
    """Says in words where weights are, since none have an address of their own.

    ``mim download`` takes commas for several addresses, and what follows the last slash for a file
    to download. Without any it only copies the config.

    Args:
        published: What the authors publish, and where, or under which name to save it; None if
            they publish nothing.
    """
    if published in PUBLISHED_WEIGHTS:
        published = f'{published}, github.com/OSVAI/KernelWarehouse'
    text = published.replace(', ', ' at ') if published else 'none are published; train this config'
    return f'{text}/'


def table(models: list[dict[str, Any]]) -> list[str]:
    """Lines of markdown."""
    metrics = dict.fromkeys(
        metric
        for model in models
        for result in model.get('Results', [])
        for metric in result['Metrics']
    )
    published = any('Published Weights' in model for model in models)
    columns = ['config', 'parameters', 'backbone FLOPs', 'at', *metrics, 'backbone weights']
    columns += ['published weights'] if published else []
    lines = ['| ' + ' | '.join(columns) + ' |', '|---' * len(columns) + '|']
    for model in models:
        metadata = model['Metadata']
        found = {k: v for result in model.get('Results', []) for k, v in result['Metrics'].items()}
        weights = metadata['Backbone Weights']
        cells = [
            f'[{model["Name"]}](../{model["Config"]})',
            f'{metadata["Parameters"] / 1e6:.2f} M',
            f'{metadata["Backbone FLOPs"] / 1e9:.2f} G',
            metadata['FLOPs Input'],
            *(str(found.get(metric, '')) for metric in metrics),
            f'`{weights}`' if weights else 'from scratch',
        ]
        if published:
            weights = model.get('Published Weights', '')
            cells.append(f'`{weights}`' if weights in PUBLISHED_WEIGHTS else weights)
        lines.append('| ' + ' | '.join(cells) + ' |')
    return lines


def zoo(pool: Executor) -> dict[Path, str]:
    """Every file that follows from the configs and the facts in the metafiles, with its text.

    Args:
        pool: Builds and counts the models.

    Raises:
        SystemExit: If a folder of configs has no metafile with a collection.
    """
    files, sections = {}, []
    contents, entries = {}, {}
    for folder, paths in leaf_configs().items():
        metafile = ROOT / 'configs' / folder / 'metafile.yml'
        if not metafile.exists():
            sys.exit(f'{metafile} is missing. Write one with the collection: name, paper.')
        content = yaml.safe_load(metafile.read_text())
        (collection,) = content['Collections']
        old = {model['Name']: model for model in content.get('Models') or []}
        before = [old.get(path.stem, {}) for path in paths]
        contents[metafile] = content
        # They are counted at the same time, those of all folders.
        entries[metafile] = pool.map(entry, paths, before, repeat(collection['Name']))
    for metafile, content in contents.items():
        (collection,) = content['Collections']
        content['Models'] = models = list(entries[metafile])
        files[metafile] = yaml.safe_dump(content, sort_keys=False, width=100)
        title, url = collection['Paper']['Title'], collection['Paper']['URL']
        sections += ['', f'## {collection["Name"]}', '', f'[{title}]({url})', '', *table(models)]
    rows = [f'| `{path}` | {source} |' for path, source in PUBLISHED_WEIGHTS.items()]
    page = [*rows, BACKBONES.rstrip(), *sections, '']
    files[ROOT / 'docs/model_zoo.md'] = HEADER + '\n'.join(page)
    imports = [str(path.relative_to(ROOT)) for path in files if path.name == 'metafile.yml']
    files[ROOT / 'model-index.yml'] = yaml.safe_dump(dict(Import=imports))
    return files


def main() -> None:
    """Reads the command line; writes or checks."""
    parser = argparse.ArgumentParser(description='Write or check the model zoo')
    parser.add_argument('--check', action='store_true', help='only see whether a file would change')
    args = parser.parse_args()
    with ProcessPoolExecutor() as pool:
        files = zoo(pool)
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    names = ', '.join(str(path.relative_to(ROOT)) for path in stale)
    if args.check and stale:
        sys.exit(f'Out of date: {names}. Run python tools/analysis_tools/model_zoo.py.')
    for path in stale:
        path.write_text(files[path])
    print(f'Written: {names}.' if stale else 'Everything is up to date.')


if __name__ == '__main__':
    main()
