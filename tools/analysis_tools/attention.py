"""Draws what the attentions of a trained network do: ``attention.py CONFIG CHECKPOINT IMAGES...``.

Runs images through a detector, segmentor or classifier and records the attention of every dynamic
layer. Writes pictures and the numbers in them:

    attention_WAREHOUSE.png  mean attention: a row a mixture of every layer, a column a cell
    classes_WAREHOUSE.png    the same by class of image, where folders name the classes
    images.png               how far the attentions of images differ, layer by layer
    usage.png                what every cell of a warehouse gets
    attention.json           the numbers

Example:
    python tools/analysis_tools/attention.py CONFIG CHECKPOINT data/photographs --out-dir pictures
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from torch import Tensor, nn

from mmkw.engine.building import build_model, load_trained
from mmkw.engine.command_line import add_config_options, config_of
from mmkw.engine.images import IMAGE_TYPES, images_in, test_pipeline
from mmkw.layers import LayerAttention
from mmkw.layers.dynamic_layers import DynamicLayer

# Of so many images the attentions are kept, to be compared with each other.
MOST_COMPARED = 256


@dataclass(frozen=True)
class Image:
    """An image file and the class that its folder names, if any."""

    path: Path
    label: str | None = None


@dataclass
class Record:
    """Sums over images of the attentions of one layer.

    Attributes:
        warehouse: Name of the layer's warehouse, with the network that owns it.
        position: Of the layer among those of its warehouse.
        count: Images.
        total: Tensor[mixtures, cells], the sum of the attentions.
        squares: Tensor[mixtures, cells], the sum of their squares.
        magnitudes: Tensor[mixtures, cells], the sum of their magnitudes.
        first: The attentions of the first images: Tensor[mixtures * cells] in float32.
        by_class: For every class Tensor[cells], the sum of the attentions over its images and over
            the mixtures.
    """

    warehouse: str
    position: int
    count: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    magnitudes: Tensor | float = 0.0
    first: list[Tensor] = field(default_factory=list)
    by_class: dict[str, Tensor] = field(default_factory=dict)

    def add(self, alpha: Tensor, label: str | None) -> None:
        """Adds the attention of an image: Tensor[mixtures, cells]."""
        self.count += 1
        self.total = self.total + alpha
        self.squares = self.squares + alpha.square()
        self.magnitudes = self.magnitudes + alpha.abs()
        if len(self.first) < MOST_COMPARED:
            self.first.append(alpha.flatten().float())
        if label is not None:
            self.by_class[label] = self.by_class.get(label, 0.0) + alpha.sum(0)

    @property
    def mean(self) -> Tensor:
        """The mean attention over the images: Tensor[mixtures, cells]."""
        return self.total / self.count

    @property
    def usage(self) -> Tensor:
        """The sum of the magnitudes that each cell gets from the layer, a mean over images."""
        return self.magnitudes.sum(0) / self.count

    @property
    def magnitude(self) -> float:
        """The mean magnitude of an attention."""
        return float(self.magnitudes.mean()) / self.count

    @property
    def spread(self) -> float:
        """The standard deviation over images relative to the mean magnitude; 0 if none differ."""
        variance = self.squares / self.count - self.mean.square()
        return float(variance.clamp(min=0).sqrt().mean()) / self.magnitude

    @property
    def directions(self) -> float:
        """In how many directions the attentions of images differ, of the first MOST_COMPARED.

        With the variances v along their principal axes, (sum of v)^2 / (sum of v^2): k if k of them
        are alike and the others 0; 0 if no images differ.
        """
        values = torch.stack(self.first).double()
        values -= values.mean(0)
        # Its eigenvalues are the variances: their sum is its trace, that of their squares its norm.
        products = values @ values.T
        squares = float(products.square().sum())
        return float(products.trace().square()) / squares if squares > 0 else 0.0


def find_images(paths: Sequence[str | Path]) -> list[Image]:
    """Finds images in files, in folders, and in folders of folders that are named by class.

    Args:
        paths: Files and folders. Folders in a folder are classes, and only they are looked into.

    Returns:
        At least one image, in the order of the paths and of names.

    Raises:
        SystemExit: If a path does not exist, or if there is no image in it.
    """
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise SystemExit(f'IMAGES: {path} does not exist')
        images = [Image(path)] if path.is_file() else [Image(p) for p in images_in(path)]
        if path.is_dir() and not images:
            folders = sorted(p for p in path.iterdir() if p.is_dir())
            images = [Image(p, folder.name) for folder in folders for p in images_in(folder)]
        if not images:
            raise SystemExit(
                f'IMAGES: {path} holds no image ({", ".join(IMAGE_TYPES)}), nor do the folders in '
                'it; name files, a folder of images, or a folder with one folder a class'
            )
        found += images
    return found


def load_model(config: Config, checkpoint: str) -> nn.Module:
    """Builds the model of a config with a checkpoint's weights and temperature, for inference.

    Raises:
        SystemExit: If the model has no dynamic layer, or if the checkpoint does not exist, is
            damaged, is unsafe, or does not fit.
    """
    model = build_model(config)
    if not any(isinstance(module, LayerAttention) for module in model.modules()):
        raise SystemExit(
            f'{config.filename} builds no dynamic layer, so there is no attention to draw; use a '
            "backbone such as 'mmkw.KWResNet'"
        )
    try:
        load_trained(model, checkpoint)
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from error
    return model.to(get_device()).eval()


def record(model: nn.Module, pipeline: Compose, images: Sequence[Image]) -> dict[str, Record]:
    """Records the attentions of all dynamic layers, one image at a time.

    A layer that computes several times for an image, as in heads over several scales or regions,
    counts by the mean.

    Args:
        model: Of :func:`load_model`.
        pipeline: Of :func:`~mmkw.engine.images.test_pipeline`.
        images: At least one.

    Returns:
        The layers by name, those of a warehouse together and in its order. Layers that did not
        compute for every image are left out.

    Raises:
        SystemExit: If an image cannot be read.
    """
    names = {module: name for name, module in model.named_modules()}
    records, seen = {}, {}
    for name, layer in model.named_modules():
        if isinstance(layer, DynamicLayer):
            manager, index, position = layer.place
            owner = names[manager].rpartition('warehouse_manager')[0].rstrip('.')
            warehouse = f'{owner} {manager.partitions[index].name}'.strip()
            records[name] = Record(warehouse, position)
            seen[name] = []
            layer.attention.register_forward_hook(
                # Of ODConv's four attentions that of the kernels.
                lambda module, inputs, alpha, calls=seen[name]: calls.append(
                    getattr(alpha, 'kernels', alpha)
                )
            )
    for number, image in enumerate(images):
        try:
            data = pipeline(dict(img_path=str(image.path), img_id=number))
        except Exception as error:
            raise SystemExit(
                f'{image.path} cannot be read as an image: {type(error).__name__}: {error}'
            ) from error
        with torch.no_grad():
            model.test_step(pseudo_collate([data]))
        for name, calls in seen.items():
            if any(len(alpha) for alpha in calls):
                records[name].add(torch.cat(calls).double().mean(0).cpu(), image.label)
            calls.clear()
    whole = {name: one for name, one in records.items() if one.count == len(images)}
    warehouses = list(dict.fromkeys(one.warehouse for one in whole.values()))
    return dict(
        sorted(
            whole.items(), key=lambda item: (warehouses.index(item[1].warehouse), item[1].position)
        )
    )


def by_warehouse(records: dict[str, Record]) -> dict[str, dict[str, Record]]:
    """Groups layers by their warehouse."""
    groups: dict[str, dict[str, Record]] = {}
    for name, one in records.items():
        groups.setdefault(one.warehouse, {})[name] = one
    return groups


def class_means(layers: dict[str, Record], counts: dict[str, int]) -> dict[str, Tensor]:
    """What each cell gets for the images of a class: for every class Tensor[cells].

    Args:
        layers: Of one warehouse.
        counts: Images of every class.

    Returns:
        Means over a class's images of the attentions, summed over all mixtures of all layers.
    """
    return {
        label: sum(one.by_class[label] for one in layers.values()) / count
        for label, count in counts.items()
    }


def class_counts(images: Sequence[Image]) -> dict[str, int]:
    """Images of every class; empty if an image has no class, or if there is one class only."""
    labels = [image.label for image in images]
    counts = {label: labels.count(label) for label in dict.fromkeys(labels)}
    return {} if None in counts or len(counts) < 2 else counts


def numbers(records: dict[str, Record], counts: dict[str, int]) -> dict[str, Any]:
    """What the pictures show, for JSON."""

    def listed(values: Tensor) -> list:
        return np.round(values.numpy(), 6).tolist()

    return dict(
        layers={
            name: dict(
                warehouse=one.warehouse,
                magnitude=one.magnitude,
                spread=one.spread,
                directions=one.directions,
                mean=listed(one.mean),
            )
            for name, one in records.items()
        },
        warehouses={
            warehouse: dict(
                usage=listed(sum(one.usage for one in layers.values())),
                classes={k: listed(v) for k, v in class_means(layers, counts).items()},
            )
            for warehouse, layers in by_warehouse(records).items()
        },
    )


def table(records: dict[str, Record]) -> Iterator[str]:
    """The lines of a table: means over layers, and usage relative to the mean of cells."""
    yield (
        '| warehouse | layers | mixtures | cells | spread | directions | least used cell '
        '| most used cell |'
    )
    yield '|---|---|---|---|---|---|---|---|'
    for warehouse, layers in by_warehouse(records).items():
        usage = sum(one.usage for one in layers.values())
        values = list(layers.values())
        spread = sum(one.spread for one in values) / len(values)
        directions = sum(one.directions for one in values) / len(values)
        yield (
            f'| {warehouse} | {len(layers)} | {sum(len(one.mean) for one in values)} '
            f'| {len(usage)} | {spread:.2f} | {directions:.1f} '
            f'| {float(usage.min() / usage.mean()):.2f} '
            f'| {float(usage.max() / usage.mean()):.2f} |'
        )


def draw_attention(warehouse: str, layers: dict[str, Record]) -> Figure:
    """A heat map of the mean attention: a row a mixture of every layer, a column a cell."""
    rows = np.concatenate([one.mean.numpy() for one in layers.values()])
    height = min(max(2.5, 0.2 * len(layers), 0.05 * len(rows)) + 1.2, 14)
    figure = Figure((8, height), layout='constrained')
    axes = figure.subplots()
    _heat(figure, axes, rows, 'mean attention')
    starts = np.cumsum([0, *(len(one.mean) for one in layers.values())])
    for start in starts[1:-1]:
        axes.axhline(start - 0.5, color='black', linewidth=0.4)
    axes.set_yticks((starts[:-1] + starts[1:] - 1) / 2, _short(layers), fontsize=7)
    axes.tick_params(axis='y', length=0)
    axes.set(xlabel='cell', ylabel='mixtures, by layer')
    axes.set_title(f'{warehouse}: mean attention', fontsize='medium')
    return figure


def draw_classes(warehouse: str, means: dict[str, Tensor]) -> Figure:
    """Two heat maps, a row a class, a column a cell: the means, and how they differ."""
    rows = np.stack([mean.numpy() for mean in means.values()])
    figure = Figure((11, min(max(2.5, 0.22 * len(rows)) + 1.2, 14)), layout='constrained')
    for axes, values, title in zip(
        figure.subplots(1, 2, sharey=True),
        (rows, rows - rows.mean(0)),
        ('mean attention of a class', 'minus the mean of all classes'),
    ):
        _heat(figure, axes, values, 'sum over mixtures')
        axes.set_title(title, fontsize='medium')
        axes.set_xlabel('cell')
        if len(rows) <= 60:
            axes.set_yticks(range(len(rows)), means, fontsize=8)
    figure.suptitle(f'{warehouse}: attention by class of image', fontsize='medium')
    return figure


def _heat(figure: Figure, axes: Axes, values: np.ndarray, label: str) -> None:
    """A heat map around 0. Its colours end where one value in 200 is larger."""
    end = float(np.quantile(np.abs(values), 0.995)) or 1.0
    image = axes.imshow(
        values, cmap='RdBu_r', vmin=-end, vmax=end, aspect='auto', interpolation='nearest'
    )
    figure.colorbar(image, ax=axes, label=label, extend='both', pad=0.01)


def draw_spread(records: dict[str, Record], images: int) -> Figure:
    """Bars: how far the attentions of images differ, a bar a layer, a colour a warehouse."""
    figure = Figure((8, 0.19 * len(records) + 1.5), layout='constrained')
    axes = figure.subplots()
    at = 0
    for number, (warehouse, layers) in enumerate(by_warehouse(records).items()):
        places = range(at, at + len(layers))
        spreads = [one.spread for one in layers.values()]
        axes.barh(places, spreads, color=f'C{number % 10}', label=warehouse)
        at += len(layers)
    axes.set_yticks(range(at), _short(records), fontsize=7)
    axes.set_ylim(at - 0.4, -0.6)
    axes.grid(axis='x', alpha=0.4)
    axes.set_axisbelow(True)
    axes.set_xlabel('standard deviation over images / mean magnitude')
    axes.set_title(f'How far the attentions of {images} images differ', fontsize='medium')
    axes.legend(fontsize='small', loc='center left', bbox_to_anchor=(1, 0.5))
    return figure


def draw_usage(records: dict[str, Record]) -> Figure:
    """Bars: what every cell of a warehouse gets from all mixtures; the mean dashed."""
    groups = by_warehouse(records)
    figure = Figure((8, 1.4 * len(groups) + 0.6), layout='constrained')
    for number, (axes, (warehouse, layers)) in enumerate(
        zip(figure.subplots(len(groups), squeeze=False)[:, 0], groups.items())
    ):
        usage = sum(one.usage for one in layers.values()).numpy()
        axes.bar(range(len(usage)), usage, width=0.9, color=f'C{number % 10}')
        axes.axhline(usage.mean(), color='black', linestyle='--', linewidth=0.8)
        axes.set_xlim(-0.7, len(usage) - 0.3)
        axes.set_title(warehouse, fontsize='small', loc='left')
    axes.set_xlabel('cell')
    figure.supylabel('sum of |attention| over all mixtures', fontsize='small')
    figure.suptitle('Usage of cells (dashed: the mean)', fontsize='medium')
    return figure


def _short(names: dict[str, Record]) -> list[str]:
    """Names of layers without the part that all have in common."""
    parts = [name.split('.') for name in names]
    same = 0
    while all(len(p) > same + 1 and p[same] == parts[0][same] for p in parts):
        same += 1
    return ['.'.join(p[same:]) for p in parts]


def draw(records: dict[str, Record], counts: dict[str, int], out_dir: Path) -> None:
    """Writes all pictures.

    Args:
        records: Of :func:`record`.
        counts: Of :func:`class_counts`.
        out_dir: An existing folder.
    """
    images = next(iter(records.values())).count
    figures = {'images': draw_spread(records, images), 'usage': draw_usage(records)}
    for warehouse, layers in by_warehouse(records).items():
        name = warehouse.replace(' ', '_').replace('.', '_')
        figures[f'attention_{name}'] = draw_attention(warehouse, layers)
        if counts:
            figures[f'classes_{name}'] = draw_classes(warehouse, class_means(layers, counts))
    for name, figure in figures.items():
        figure.savefig(out_dir / f'{name}.png', dpi=110)


def main() -> None:
    """Reads the command line, records and draws."""
    parser = argparse.ArgumentParser(description='Draw the attentions of a trained network')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint of its model')
    parser.add_argument(
        'images', nargs='+', help='files, folders, or a folder with one folder a class'
    )
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/attention'))
    add_config_options(parser)
    args = parser.parse_args()
    images = find_images(args.images)
    config = config_of(parser, args.config, args.cfg_options)
    model = load_model(config, args.checkpoint)
    records = record(model, test_pipeline(config), images)
    if not records:
        raise SystemExit(f'no dynamic layer of {args.config} computes for every image')
    counts = class_counts(images)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    draw(records, counts, args.out_dir)
    about = dict(config=args.config, checkpoint=args.checkpoint, images=len(images), classes=counts)
    content = {**about, **numbers(records, counts)}
    (args.out_dir / 'attention.json').write_text(json.dumps(content))
    print('\n'.join(table(records)))
    print(f'\n{len(images)} images; pictures and attention.json in {args.out_dir}')


if __name__ == '__main__':
    main()
