"""The config that a command is given."""

import argparse
from collections.abc import Sequence
from typing import Any

from mmengine.config import Config, DictAction
from torch import nn

from ..engine.building import LIBRARIES, build_model, read_config, scope_of


class _Overrides(DictAction):
    """MMEngine's action, but with usage errors."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Sequence[str],
        option_string: str | None = None,
    ) -> None:
        """Adds values such as ``model.backbone.depth=18``."""
        for value in values:
            try:
                super().__call__(parser, namespace, [value], option_string)
            except (ValueError, AssertionError):
                parser.error(
                    f'{option_string} {value}: not a key=value whose brackets are closed; what '
                    'has no key stands before the option'
                )


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--cfg-options``."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_Overrides,
        default={},
        help='overrides of the config as key=value, such as model.backbone.cell_num_ratio=2; lists '
        'as key="[a,b]" or key=a,b',
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
    """Reads the config of a command line with its overrides, or stops with a usage error.

    Its default scope is the library of its model: there are the backbones of this package.

    Args:
        parser: Reports the error.
        args: With ``config``, a file or ``PACKAGE::CONFIG``, and ``cfg_options``.
    """
    try:
        config = read_config(args.config)
    except (OSError, ValueError, SyntaxError) as error:
        parser.error(f'config {args.config}: {error}')
    except Exception as error:
        # A config is code, and its faults are those of code.
        parser.error(f'config {args.config}: {type(error).__name__}: {error}')
    try:
        config.merge_from_dict(args.cfg_options)
    except Exception as error:
        parser.error(f'--cfg-options {args.cfg_options}: {type(error).__name__}: {error}')
    if not isinstance(config.get('model'), dict):
        found: Any = config.get('model')
        parser.error(
            f'config {args.config} has '
            + ('no model' if found is None else f'the model {found!r}, which is no dict')
        )
    if (scope := scope_of(config)) in LIBRARIES:
        config.default_scope = scope
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
