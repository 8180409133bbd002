"""The command ``mmkw``: ``mmkw info``, ``plan``, ``convert`` and ``export``."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from ..requirements import UnsupportedVersionError
from ..version import __version__

# The modules of this package, each with a function ``main``. They are imported when they are named,
# because ``mmkw info`` also works without PyTorch.
COMMANDS = {
    'info': 'what is installed, and what computes',
    'plan': 'the warehouses of a config, before it is trained',
    'convert': 'write a checkpoint for a KernelWarehouse network, from a static or a published one',
    'export': 'write a network as ONNX or as a program of torch.export',
}

# The extras that bring a package.
EXTRAS = {
    'torch': ('det', 'seg', 'cls'),
    'mmengine': ('det', 'seg', 'cls'),
    'mmcv': ('det', 'seg'),
    'mmdet': ('det',),
    'mmseg': ('seg',),
    'mmpretrain': ('cls',),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: Arguments; by default those of the process.

    Raises:
        SystemExit: With status 2 and one message, if an argument is wrong or a package is missing.

    Example:
        ``main(['plan', 'mmkw::mask_rcnn/mask-rcnn_kw1x-r50_fpn_adamw-1x_coco.py'])``
    """
    parser = argparse.ArgumentParser(
        prog='mmkw',
        description='KernelWarehouse dynamic convolution',
        epilog='\n'.join(f'  mmkw {name:8} {text}' for name, text in COMMANDS.items())
        + '\n\nmmkw COMMAND -h has the options of a command.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action='version', version=f'mmkw {__version__}')
    parser.add_argument('command', choices=COMMANDS, metavar=f'{{{",".join(COMMANDS)}}}')
    rest = parser.add_argument('arguments', nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    rest.required = False
    args = parser.parse_args(argv)
    try:
        import_module(f'.{args.command}', __name__).main(args.arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who reads, such as `head`, has enough. What is still to be written, also when Python ends,
        # goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ModuleNotFoundError as error:
        if 'pip install' in str(error):
            parser.error(str(error))
        package = str(error.name).partition('.')[0]
        extras = EXTRAS.get(package, ())
        remedy = ' or '.join(f"pip install 'mmkw[{extra}]'" for extra in extras)
        parser.error(
            f'mmkw {args.command} needs {package}, which is not installed.'
            + (f' Run: {remedy}' if extras else '')
        )
    except UnsupportedVersionError as error:
        parser.error(str(error))
