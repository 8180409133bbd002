"""The config that a command is given."""

import argparse

from mmengine.config import Config, DictAction
from torch import nn

from ..engine.building import build_model, read_config


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--cfg-options``."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        help='overrides of the config, such as model.backbone.cell_num_ratio=2',
    )


def pixels(text: str) -> int:
    """Reads a height or a width.

    Args:
        text: A number of at least 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is no number of pixels such as 224')
    return int(text)


def config_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Config:
    """Reads the config of a command line, or stops with a usage error.

    Args:
        parser: Reports the error.
        args: With ``config``, a file or ``PACKAGE::CONFIG``, and ``cfg_options``.
    """
    try:
        config = read_config(args.config)
    except (OSError, ValueError, SyntaxError) as error:
        parser.error(f'config {args.config}: {error}')
    config.merge_from_dict(args.cfg_options)
    if not isinstance(config.get('model'), dict):
        parser.error(f'config {args.config} has no model')
    return config


def model_of(
    parser: argparse.ArgumentParser, args: argparse.Namespace, config: Config, on_meta: bool = False
) -> nn.Module:
    """Builds the model of a config, or stops with a usage error if an option does not fit.

    Args:
        parser: Reports the error.
        args: With ``config``, for the message.
        config: Of :func:`config_of`.
        on_meta: As in :func:`~mmkw.engine.building.build_model`.
    """
    try:
        return build_model(config, on_meta)
    except (ValueError, TypeError, KeyError) as error:
        # A KeyError shows its message as a string of Python.
        parser.error(f'config {args.config}: {error.args[0] if error.args else error!r}')
