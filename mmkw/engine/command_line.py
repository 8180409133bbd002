"""What the command lines of the tools have in common: configs, checks and the runner."""

import argparse
import os
import os.path as osp
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ..checkpoints import (
    CheckpointMismatchError,
    DamagedCheckpointError,
    UnsafeCheckpointError,
)
from .building import LIBRARIES, dicts_of, is_pretrained, read_config, scope_of, type_name

# Weights to download, by the names under which the configs expect them.
PUBLISHED_WEIGHTS = {
    f'checkpoints/{name}.pth': f'{text}, github.com/OSVAI/KernelWarehouse'
    for name, text in (
        ('resnet18', 'static ResNet18, ImageNet top-1 70.44'),
        ('kw1d4x_resnet18', 'KernelWarehouse 1/4x ResNet18, ImageNet top-1 72.73'),
        ('kw1d2x_resnet18', 'KernelWarehouse 1/2x ResNet18, ImageNet top-1 73.33'),
        ('kw1x_resnet18', 'KernelWarehouse 1x ResNet18, ImageNet top-1 74.77'),
        ('kw2x_resnet18', 'KernelWarehouse 2x ResNet18, ImageNet top-1 75.19'),
        ('kw4x_resnet18', 'KernelWarehouse 4x ResNet18, ImageNet top-1 76.05'),
        ('resnet50', 'static ResNet50, ImageNet top-1 78.44'),
        ('kw1d2x_resnet50', 'KernelWarehouse 1/2x ResNet50, ImageNet top-1 79.30'),
        ('kw1x_resnet50', 'KernelWarehouse 1x ResNet50, ImageNet top-1 80.38'),
        ('kw4x_resnet50', 'KernelWarehouse 4x ResNet50, ImageNet top-1 81.05'),
        ('mobilenet_v2', 'static MobileNetV2, ImageNet top-1 72.04'),
        ('kw1d2x_mobilenet_v2', 'KernelWarehouse 1/2x MobileNetV2, ImageNet top-1 72.59'),
        ('kw1x_mobilenet_v2', 'KernelWarehouse 1x MobileNetV2, ImageNet top-1 74.68'),
        ('kw4x_mobilenet_v2', 'KernelWarehouse 4x MobileNetV2, ImageNet top-1 75.92'),
        ('mobilenet_v2_0.5', 'static MobileNetV2 0.5, ImageNet top-1 64.32'),
        ('kw1d2x_mobilenet_v2_0.5', 'KernelWarehouse 1/2x MobileNetV2 0.5, ImageNet top-1 65.20'),
        ('kw1x_mobilenet_v2_0.5', 'KernelWarehouse 1x MobileNetV2 0.5, ImageNet top-1 68.29'),
        ('kw4x_mobilenet_v2_0.5', 'KernelWarehouse 4x MobileNetV2 0.5, ImageNet top-1 70.26'),
        ('convnext_tiny', 'static ConvNeXt-Tiny, ImageNet top-1 82.07'),
        ('kw1x_convnext_tiny', 'KernelWarehouse 1x ConvNeXt-Tiny, ImageNet top-1 82.51'),
    )
}
PUBLISHED_WEIGHTS['checkpoints/odconv4x_resnet50.pth'] = (
    'ODConv 4x ResNet50, ImageNet top-1 78.50, github.com/OSVAI/ODConv'
)


# Data sets of MMPretrain that are downloaded where they are missing.
_DOWNLOADING = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')


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


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that training and testing share."""
    parser.add_argument(
        'config',
        help='config file of MMDetection, MMSegmentation or MMPretrain, or PACKAGE::CONFIG such as '
        'mmkw::mask_rcnn/...',
    )
    parser.add_argument('--work-dir', help='folder for logs and results')
    add_config_options(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher',
    )
    # torch.distributed.launch passes this option.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def check_file(parser: argparse.ArgumentParser, path: str) -> None:
    """Stops with a usage error if a local checkpoint does not exist."""
    if '://' not in path and not osp.isfile(osp.expanduser(path)):
        parser.error(f'checkpoint {path} does not exist')


def config_of(
    parser: argparse.ArgumentParser, path: str, overrides: Mapping[str, Any] | None = None
) -> Config:
    """Reads the config of a command line with its overrides, or stops with a usage error.

    Its default scope is the library of its model: there are the backbones of this package.

    Args:
        parser: Reports the error.
        path: A file or ``PACKAGE::CONFIG``.
        overrides: As ``--cfg-options`` gives them.
    """
    try:
        config = read_config(path)
    except (OSError, ValueError, SyntaxError) as error:
        parser.error(f'config {path}: {error}')
    except Exception as error:
        # A config is code, and its faults are those of code.
        parser.error(f'config {path}: {type(error).__name__}: {error}')
    try:
        config.merge_from_dict(overrides or {})
    except Exception as error:
        parser.error(f'--cfg-options {overrides}: {type(error).__name__}: {error}')
    if not isinstance(config.get('model'), dict):
        found: Any = config.get('model')
        parser.error(
            f'config {path} has '
            + ('no model' if found is None else f'the model {found!r}, which is no dict')
        )
    if (scope := scope_of(config)) in LIBRARIES:
        config.default_scope = scope
    return config


def load_config(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Config:
    """Reads the config of a command line, with its overrides, or stops with a usage error.

    The work folder is taken from the option, else from the config. By default it is
    ``work_dirs/NAME`` with the config's name.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    config = config_of(parser, args.config, args.cfg_options)
    config.launcher = args.launcher
    name = osp.splitext(osp.basename(args.config))[0]
    config.work_dir = args.work_dir or config.get('work_dir') or osp.join('work_dirs', name)
    if osp.exists(config.work_dir) and not osp.isdir(config.work_dir):
        parser.error(f'--work-dir {config.work_dir} is a file; name a folder')
    return config


def check_data(parser: argparse.ArgumentParser, config: Config, *parts: str) -> None:
    """Stops with a usage error if local annotations, or without these a data folder, are missing.

    Args:
        parser: Reports the error.
        config: Of :func:`load_config`.
        parts: Names of data loaders and evaluators in the config; those it lacks do not count.
    """
    for part in parts:
        for place, cfg in dicts_of(part, config.get(part)):
            option, path = _data_of(cfg)
            if path and '://' not in path and not osp.exists(osp.expanduser(path)):
                parser.error(
                    f'{place}.{option}: {path} does not exist. For another place use '
                    f'--cfg-options {place}.{option}=PATH'
                )


def _data_of(cfg: dict) -> tuple[str, str]:
    """The option and the path at which a data set or an evaluator begins to read."""
    root, annotations = cfg.get('data_root'), cfg.get('ann_file')
    # Another backend than the local disk has other paths.
    if not isinstance(cfg.get('type'), (str, type)) or cfg.get('backend_args'):
        return '', ''
    if cfg.get('download', type_name(cfg) in _DOWNLOADING):
        return '', ''
    root = osp.expanduser(root) if isinstance(root, str) else ''
    if not isinstance(annotations, str) or not annotations:
        return 'data_root', root
    if root and not osp.isabs(annotations) and not osp.isdir(root):
        return 'data_root', root
    return 'ann_file', osp.join(root, annotations)


@contextmanager
def checkpoint_faults(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Makes a usage error of a checkpoint that is damaged, unsafe, or of another network."""
    try:
        yield
    except (CheckpointMismatchError, DamagedCheckpointError, UnsafeCheckpointError) as error:
        parser.error(str(error))


def build_runner(config: Config) -> Runner:
    """Builds the runner of a config, also for several processes on the CPU.

    MMEngine expects CUDA devices and gives DistributedDataParallel one device per process. On the
    CPU the processes communicate by gloo, and DistributedDataParallel must get no device.
    """
    if config.launcher == 'pytorch' and get_device() == 'cpu':
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group('gloo')
        config.setdefault(
            'model_wrapper_cfg',
            dict(
                type='MMDistributedDataParallel',
                broadcast_buffers=False,
                find_unused_parameters=config.get('find_unused_parameters', False),
            ),
        )
        config.model_wrapper_cfg.device_ids = None
    return RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)


def leave_processes() -> None:
    """Leaves the process group at the end of a script.

    A thread of gloo needs the interpreter to free the tensors of its last exchange. If the process
    ends first, the thread aborts it. If the group is destroyed first, the thread waits for ever. So
    this function waits half a second for the thread.
    """
    if torch.distributed.is_initialized():
        time.sleep(0.5)
        torch.distributed.destroy_process_group()


def check_weights(parser: argparse.ArgumentParser, config: Config) -> None:
    """Stops with a usage error if a local file of pretrained weights does not exist."""
    for place, option, path in _pretrained_files('model', config.model):
        if '://' not in path and not osp.isfile(osp.expanduser(path)):
            source = PUBLISHED_WEIGHTS.get(path)
            download = f' Download the weights ({source}) and save them there.' if source else ''
            parser.error(
                f'{option}: {path} does not exist.{download} For another place use '
                f'--cfg-options {option}=PATH, to train from scratch {place}=None'
            )


def library_of(config: Config) -> str:
    """The library of a config, by its default scope or its model's type.

    Returns:
        ``mmdet``, ``mmseg`` or ``mmpretrain``.
    """
    scope = scope_of(config)
    return scope if scope in LIBRARIES else 'mmdet'


def check_scopes(parser: argparse.ArgumentParser, config: Config) -> None:
    """Stops with a usage error if a type of mmkw is named without its scope."""
    from ..registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS

    for registry, part in (
        (MODELS, 'model'),
        (HOOKS, 'custom_hooks'),
        (OPTIM_WRAPPER_CONSTRUCTORS, 'optim_wrapper'),
    ):
        registry.import_from_location()
        for place, name in _types(part, config.get(part)):
            if name not in registry.module_dict:
                continue
            # Some types of mmkw, such as ResNet, are also types of the library.
            if registry.parent.get(f'{library_of(config)}.{name}') is None:
                parser.error(f"{place} is {name!r}, a type of mmkw: write 'mmkw.{name}'")


def _types(place: str, cfg: Any) -> Iterator[tuple[str, str]]:
    for where, part in dicts_of(place, cfg):
        for name in ('type', 'constructor'):
            if isinstance(part.get(name), str):
                yield f'{where}.{name}', part[name]


def _pretrained_files(place: str, cfg: Any) -> Iterator[tuple[str, str, str]]:
    for where, part in dicts_of(place, cfg):
        if is_pretrained(part) and isinstance(part.get('checkpoint'), str):
            yield where, f'{where}.checkpoint', part['checkpoint']
        if isinstance(part.get('pretrained'), str):
            yield f'{where}.pretrained', f'{where}.pretrained', part['pretrained']
