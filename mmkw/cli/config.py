"""The config that a command is given."""

import argparse

from mmengine.config import Config, DictAction

from ..engine.building import read_config


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--cfg-options``."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        help='overrides of the config, such as model.backbone.cell_num_ratio=2',
    )


def config_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Config:
    """Reads the config of a command line, or stops with a usage error.

    Args:
        parser: Reports the error.
        args: With ``config``, a file or ``PACKAGE::CONFIG``, and ``cfg_options``.
    """
    try:
        config = read_config(args.config)
    except (OSError, ValueError) as error:
        parser.error(f'config {args.config}: {error}')
    config.merge_from_dict(args.cfg_options)
    if not isinstance(config.get('model'), dict):
        parser.error(f'config {args.config} has no model')
    return config
