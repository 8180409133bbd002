"""Builds the models of configs for tools that do not train them."""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from ..checkpoints import read_checkpoint
from ..layers import LayerAttention, set_temperature
from ..layers.dynamic_layers import has_own_warehouse
from ..layers.twins import exchange
from ..sharing import is_converted, static_networks

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')


def read_config(name: str) -> Config:
    """Reads a config.

    Args:
        name: A file, or ``PACKAGE::CONFIG`` as in ``_base_``.

    Returns:
        The config.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If no such package has configs, or it is not installed.

    Example:
        ``read_config('mmkw::mask_rcnn/mask-rcnn_kw1x-r50_fpn_adamw-1x_coco.py')``
    """
    if '::' not in name:
        return Config.fromfile(name)
    try:
        path, _ = Config._get_cfg_path(name, '')
    except (AssertionError, ModuleNotFoundError) as error:
        raise ValueError(str(error)) from error
    return Config.fromfile(path)


def scope_of(config: Config) -> str:
    """The library of a config: its default scope, or else that of its model's type.

    Types may be names, or as in new-style configs classes.

    Args:
        config: Config of a detector, segmentor or classifier.

    Returns:
        A scope of MMEngine's registries; ``mmengine`` if the config does not say.
    """
    scope, kind = config.get('default_scope'), config.get('model', {}).get('type')
    if scope in (None, 'mmengine'):
        place = kind.__module__ if isinstance(kind, type) else str(kind)
        scope = place.partition('.')[0]
    if scope in LIBRARIES:
        return scope
    return config.get('default_scope') or 'mmengine'


def type_name(cfg: Mapping[str, Any]) -> str:
    """The name of the type of a part of a config, without a scope.

    Args:
        cfg: With ``type``, a name or a class.
    """
    kind = cfg.get('type')
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition('.')[2]


def is_pretrained(cfg: Mapping[str, Any]) -> bool:
    """Whether a part of a config is an initialiser that reads a file.

    Args:
        cfg: Any dict.
    """
    return type_name(cfg) in ('Pretrained', 'PretrainedInit')


def build_model(config: Config, on_meta: bool = False) -> nn.Module:
    """Builds the model of a config with random weights. Pretrained weights are not loaded.

    Args:
        config: Config of a detector, segmentor or classifier; not changed.
        on_meta: Whether tensors are on the meta device, without memory. This is enough to count.
    """
    init_default_scope(scope_of(config))
    cfg = _without_weights(copy.deepcopy(config.model))
    if 'data_preprocessor' in config:
        # As MMEngine's runner does.
        cfg.setdefault('data_preprocessor', config.data_preprocessor)
    if not on_meta:
        return MODELS.build(cfg)
    try:
        with torch.device('meta'):
            return MODELS.build(copy.deepcopy(cfg))
    except RuntimeError:
        # Some networks read numbers from tensors while they are built.
        return MODELS.build(cfg).to('meta')


def load_trained(model: nn.Module, path: str, part: str = '') -> None:
    """Loads a trained model's weights and temperature from a file.

    The log names what the file has beside them.

    Args:
        model: Of :func:`build_model`.
        path: The checkpoint's file.
        part: The name of the part of the model that has to be in the file, such as ``backbone``; by
            default the whole model.

    Raises:
        FileNotFoundError: If there is no such file.
        RuntimeError: If the file is damaged, is unsafe, or does not fit.
        ValueError: If tensors of the part are not in the file.
    """
    stored = read_checkpoint(path, map_location='cpu')
    missing, unexpected = model.load_state_dict(state_of(stored), strict=False)
    place = f'{part}.' if part else ''
    lacking = [name for name in missing if name.startswith(place)]
    if lacking:
        raise ValueError(
            f'{path} lacks {lacking[0]} and {len(lacking) - 1} more tensors of the '
            f'{part or "model"}; give a checkpoint of the whole model, as the runner saves it'
        )
    if unexpected:
        print_log(
            f'{path} has {len(unexpected)} tensors that the model lacks, such as {unexpected[0]}: '
            'they are not used',
            'current',
            logging.WARNING,
        )
    # Older files have it here alone.
    tau = (stored.get('meta') or {}).get('temperature')
    if tau is not None and any(isinstance(module, LayerAttention) for module in model.modules()):
        set_temperature(model, tau)


def build_static(config: Config, on_meta: bool = False) -> nn.Module:
    """Builds the static model of a config with dynamic networks or layers.

    Args:
        config: As in :func:`build_model`.
        on_meta: As in :func:`build_model`.
    """
    with static_networks():
        model = build_model(config, on_meta)
    layers = dynamic_networks(model).values()
    exchange(model, {layer: layer.static_twin() for layer in layers})
    return model


def dynamic_networks(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of a model that have warehouses, by name.

    Args:
        model: Any model with networks converted by :func:`~mmkw.sharing.convert`, or with layers
            made by ``conv_cfg``, which have a warehouse of their own.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if is_converted(module) or has_own_warehouse(module)
    }


def state_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The state dict in a checkpoint, without the prefix of models on several devices.

    Args:
        checkpoint: A state dict, or a dict with one.
    """
    state = checkpoint.get('state_dict', checkpoint)
    return {key.removeprefix('module.'): value for key, value in state.items()}


def dicts_of(place: str, cfg: Any) -> Iterator[tuple[str, dict]]:
    """Walks over a config: its dicts and those in them, each before what is in it.

    Args:
        place: The name of the config, such as ``model``.
        cfg: Dicts, lists and values.

    Yields:
        The name of a dict, such as ``model.backbone``, and the dict.
    """
    items: Iterable[tuple[Any, Any]] = enumerate(cfg) if isinstance(cfg, (list, tuple)) else ()
    if isinstance(cfg, dict):
        yield place, cfg
        items = list(cfg.items())
    for name, value in items:
        yield from dicts_of(f'{place}.{name}', value)


def _without_weights(model: dict) -> dict:
    for _, part in dicts_of('model', model):
        for name, value in part.items():
            if name == 'pretrained' or (isinstance(value, dict) and is_pretrained(value)):
                part[name] = None
    return model
