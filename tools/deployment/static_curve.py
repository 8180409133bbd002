"""What static layers cost and spare: ``static_curve.py CONFIG CHECKPOINT IMAGES...``.

Makes static twins of a trained model that keep more and more layers dynamic, those first whose
kernels vary most over the images. Tests each on the config's test set, and times it beside the
dynamic model, in turns.

Example:
    python tools/deployment/static_curve.py
    configs/demo/mask-rcnn_kw1x-r18-half_fpn_warm-start_mini-conditions.py
    work_dirs/demo/epoch_2.pth data/mini_conditions/train --most 200
"""

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from mmengine.runner import Runner
from testing import evaluate, model_parser, trained
from torch import Tensor, nn

from mmkw.deploy import DenseNetwork, to_static
from mmkw.engine.images import ImageLoader


def medians(models: Mapping[str, nn.Module], images: Tensor, repeats: int) -> dict[str, float]:
    """Milliseconds of backbone, neck and dense head, measured in turns."""
    networks = {name: DenseNetwork(model).eval() for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    with torch.no_grad():
        for _ in range(repeats):
            for name, network in networks.items():
                network(images)
                begin = time.perf_counter()
                network(images)
                seconds[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, makes the twins, tests and times them, and prints a table."""
    parser = model_parser(
        'Cost and accuracy over the layers kept dynamic', 'work_dirs/static_curve'
    )
    parser.add_argument('images', nargs='+', help='images, or folders, to average kernels over')
    parser.add_argument('--most', type=int, default=200, help='images at most (default: 200)')
    parser.add_argument('--keep', nargs='+', type=float, default=[0, 10, 20, 30, 50, 75, 100])
    parser.add_argument('--shape', nargs=2, type=int, default=(128, 128), help='of timed images')
    parser.add_argument('--repeats', type=int, default=30)
    args = parser.parse_args(argv)
    config, model = trained(parser, args)
    try:
        # Batches are read once, and gone through often.
        loader = list(itertools.islice(ImageLoader(config, args.images), args.most))
        models, distances = {}, {}
        for percent in args.keep:
            name = f'{percent:g} %'
            models[name], report = to_static(model, loader, f'top {percent:g} %')
            distances[name] = f'{100 * report.distance:.2f}'
            print(f'{report}\n', flush=True)
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    models['the dynamic model'], distances['the dynamic model'] = model, '0'
    runner = Runner.from_cfg(config)
    metrics = {name: evaluate(runner, one) for name, one in models.items()}
    times = medians(models, torch.rand(1, 3, *args.shape), args.repeats)
    names = list(next(iter(metrics.values())))
    print(f'| dynamic layers | {" | ".join(names)} | outputs differ, % | ms |')
    print('|---' * (len(names) + 3) + '|')
    for kept, found in metrics.items():
        values = ' | '.join(f'{found[name]:.3f}' for name in names)
        print(f'| {kept} | {values} | {distances[kept]} | {times[kept]:.1f} |')


if __name__ == '__main__':
    main()
