"""What the scripts of this folder share that test a trained model in several forms."""

import argparse

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.runner import Runner
from torch import nn

from mmkw.engine.building import build_model, load_trained
from mmkw.engine.command_line import add_config_options, config_of


def model_parser(description: str, work_dir: str) -> argparse.ArgumentParser:
    """A parser of the arguments that name a trained model.

    Args:
        description: Of the script.
        work_dir: The folder for logs, if the command line names no other.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file, or PACKAGE::CONFIG')
    parser.add_argument('checkpoint', help='checkpoint of its model')
    parser.add_argument('--work-dir', default=work_dir)
    add_config_options(parser)
    return parser


def trained(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[Config, nn.Module]:
    """Loads the model that a command line names, or stops with a usage error."""
    config = config_of(parser, args.config, args.cfg_options)
    config.work_dir = args.work_dir
    # Or a runner would load the weights from which training started.
    config.load_from, config.resume = None, False
    model = build_model(config)
    try:
        load_trained(model, args.checkpoint)
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    return config, revert_sync_batchnorm(model)


def evaluate(runner: Runner, model: nn.Module) -> dict[str, float]:
    """The metrics of a model on the test set of a runner."""
    runner.model = model
    runner._test_loop = runner.cfg.test_cfg
    return runner.test()
