"""Draws the temperature of a config's training, by its own hook: ``temperature.py CONFIG OUT.png``.

Example:
    python tools/analysis_tools/temperature.py CONFIG temperature.png
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.registry import HOOKS

from mmkw.engine.building import type_name
from mmkw.engine.command_line import add_config_options, config_of
from mmkw.engine.hooks import TemperatureHook

# The curve over epochs is the same for all lengths of an epoch, except for the size of its steps.
ITERATIONS_PER_EPOCH = 100


def find_hook(config: Config) -> TemperatureHook:
    """Builds the temperature hook of a config.

    Raises:
        SystemExit: If it has none.
    """
    for cfg in config.get('custom_hooks', []):
        if type_name(cfg) == 'TemperatureHook':
            return HOOKS.build(cfg)
    raise SystemExit(
        f'{config.filename} has no temperature hook, so its temperature is 0 throughout; add '
        "custom_hooks=[dict(type='mmkw.TemperatureHook', length=20)]"
    )


def curve(hook: TemperatureHook, config: Config) -> tuple[list[float], list[float]]:
    """The temperature from before the first iteration to the end of training.

    Args:
        hook: Of :func:`find_hook`.
        config: Its config.

    Returns:
        Epochs, or iterations if the hook counts them, and temperatures. If the training counts
        otherwise than the hook, the curve ends a quarter after the schedule.
    """
    steps = ITERATIONS_PER_EPOCH if hook.by_epoch else 1
    end = config.train_cfg.get('max_epochs' if hook.by_epoch else 'max_iters')
    iterations = int((end or 1.25 * hook.length) * steps)
    places = range(iterations + 1)
    return [i / steps for i in places], [hook.temperature_at(i - 1, steps) for i in places]


def draw(hook: TemperatureHook, config: Config) -> Figure:
    """The curve as a picture."""
    figure = Figure((6, 3.2), layout='constrained')
    axes = figure.subplots()
    axes.plot(*curve(hook, config), linewidth=2)
    axes.set(xlabel='epoch' if hook.by_epoch else 'iteration', ylabel='temperature')
    axes.set(xlim=(0, None), ylim=(-0.03, 1.03))
    axes.grid(alpha=0.4)
    axes.set_title(Path(config.filename).stem, fontsize='medium')
    return figure


def main() -> None:
    """Reads the command line and draws."""
    parser = argparse.ArgumentParser(description="Draw the temperature of a config's training")
    parser.add_argument('config', help='config file')
    parser.add_argument('out', type=Path, help='picture to write, such as temperature.png')
    add_config_options(parser)
    args = parser.parse_args()
    config = config_of(parser, args.config, args.cfg_options)
    draw(find_hook(config), config).savefig(args.out, dpi=110)


if __name__ == '__main__':
    main()
