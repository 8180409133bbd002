"""What the commands share: sizes of images, and the model of a config."""

import argparse

from mmengine.config import Config
from torch import nn

from ..engine.building import build_model
from ..engine.command_line import check_scopes


def pixels(text: str) -> int:
    """Reads a height or a width.

    Args:
        text: A number of at least 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is no number of pixels such as 224')
    return int(text)


def model_of(
    parser: argparse.ArgumentParser, args: argparse.Namespace, config: Config, on_meta: bool = False
) -> nn.Module:
    """Builds the model of a config, or stops with a usage error if an option does not fit.

    Args:
        parser: Reports the error.
        args: With ``config``, for the message.
        config: Of :func:`~mmkw.engine.command_line.config_of`.
        on_meta: As in :func:`~mmkw.engine.building.build_model`.
    """
    check_scopes(parser, config)
    try:
        return build_model(config, on_meta)
    except (ValueError, TypeError, KeyError) as error:
        # A KeyError shows its message as a string of Python.
        parser.error(f'config {args.config}: {error.args[0] if error.args else error!r}')
