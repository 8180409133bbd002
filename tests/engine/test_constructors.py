"""Rates and decays of an optimizer, for a static network and for its dynamic twin."""

import logging
import re
from functools import cache

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.optim import DefaultOptimWrapperConstructor, build_optim_wrapper
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn
from twin_networks import BACKBONES, HEADS, LIBRARIES, build

from mmkw.layers import DYConv2d, KWConv2d, StandsForStatic
from mmkw.sharing import SharingPlan, convert

BASE = dict(lr=1.0, weight_decay=0.5)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(force=True)
class ByStage(DefaultOptimWrapperConstructor):
    """Groups of many parameters with their names, as the libraries make them for transformers."""

    def add_params(self, params, module, **kwargs):
        groups = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            stage = sum(int(digit) for digit in name if digit.isdigit()) % 4
            decay = 0.0 if parameter.dim() == 1 else self.base_wd
            group = groups.setdefault(
                f'{stage} {decay}',
                dict(params=[], param_names=[], lr=0.1**stage, weight_decay=decay, scale=stage),
            )
            group['params'].append(parameter)
            group['param_names'].append(name)
        params.extend(groups.values())


def settings_of(model, paramwise, constructor='DefaultOptimWrapperConstructor'):
    """Rate and decay of every parameter that learns."""
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='SGD', **BASE),
            constructor=constructor,
            paramwise_cfg=paramwise,
        ),
    )
    found, by_name = {}, dict(model.named_parameters())
    for group in wrapper.optimizer.param_groups:
        names = group.get('param_names', [None] * len(group['params']))
        assert len(names) == len(group['params']) > 0
        for parameter, name in zip(group['params'], names):
            assert parameter not in found
            assert name is None or by_name[name] is parameter
            found[parameter] = (group['lr'], group['weight_decay'])
    learning = {parameter for parameter in model.parameters() if parameter.requires_grad}
    assert set(found) == learning
    return found


class Model(nn.Module):
    def __init__(self, kind, dynamic):
        super().__init__()
        place = 'backbone' if kind in BACKBONES else 'head'
        setattr(self, place, build(kind, dynamic))
        self.other = nn.Conv2d(3, 3, 1)


@cache
def models(kind):
    """The static model and its dynamic twin."""
    return Model(kind, False), Model(kind, True)


# Some heads use a layer at several places.
PARAMWISE = {
    'names': dict(
        bypass_duplicate=True,
        custom_keys={
            'layer1': dict(lr_mult=0.1),
            'stages.2': dict(lr_mult=0.2, decay_mult=0.0),
            'layers.1': dict(lr_mult=0.0),
            'convs.1': dict(lr_mult=0.3),
            'conv1': dict(decay_mult=0.25),
            'attn': dict(lr_mult=3.0),
        },
    ),
    'kinds': dict(
        bypass_duplicate=True,
        norm_decay_mult=0.0,
        bias_lr_mult=2.0,
        bias_decay_mult=0.125,
        dwconv_decay_mult=0.0,
        flat_decay_mult=0.75,
    ),
}


@pytest.mark.parametrize('constructor', ['DefaultOptimWrapperConstructor', 'ByStage'])
@pytest.mark.parametrize('paramwise', PARAMWISE)
@pytest.mark.parametrize('kind', [*BACKBONES, *HEADS])
def test_a_warehouse_is_given_what_its_layers_are(kind, paramwise, constructor):
    static, dynamic = models(kind)
    expected = settings_of(static, PARAMWISE[paramwise], constructor)
    found = settings_of(dynamic, PARAMWISE[paramwise], constructor)
    of_static = {name: expected[parameter] for name, parameter in static.named_parameters()}
    of_cells = {}
    own = set()
    for name, module in dynamic.named_modules():
        if not isinstance(module, StandsForStatic) or name.endswith('.value'):
            continue
        twin = module.static_twin()
        of_twin = dict((id(p), part) for part, p in twin.named_parameters())
        own |= {f'{name}.{part}' for part in of_twin.values()}
        for parameter, counterparts in module.counterparts(twin):
            given = of_static[f'{name}.{of_twin[id(parameter)]}']
            for counterpart in counterparts:
                of_cells.setdefault(counterpart, []).append(given)
    assert of_cells
    for parameter, given in of_cells.items():
        assert found[parameter] == max(given)
    same = dict(dynamic.named_parameters())
    for name, given in of_static.items():
        if name not in own and name in same:
            assert found[same[name]] == given, name


@pytest.fixture
def chain():
    """Two depthwise layers that share, and a plain one."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(8, 8, 3, groups=8)
            self.b = nn.Conv2d(8, 8, 3, groups=8, bias=False)
            self.c = nn.Conv2d(8, 8, 1)

    return convert(Chain(), SharingPlan.make([('a', 'ab'), ('b', 'ab'), ('c', 'c')]))


def test_a_key_that_names_a_warehouse_decides(chain):
    keys = {'a': dict(lr_mult=0.5), 'warehouse_manager.weights.1': dict(lr_mult=7.0)}
    found = settings_of(chain, dict(custom_keys=keys))
    weights = chain.warehouse_manager.weights
    # Layer b is not named by `a`, and has the larger rate.
    assert found[weights[0]] == (1.0, 0.5) and found[weights[1]] == (7.0, 0.5)
    keys = {'a': dict(lr_mult=0.5), 'warehouse_manager': dict(decay_mult=0.0)}
    assert settings_of(chain, dict(custom_keys=keys))[weights[0]] == (1.0, 0.0)


@pytest.mark.parametrize('constructor', ['DefaultOptimWrapperConstructor', 'ByStage'])
@pytest.mark.parametrize('paramwise', PARAMWISE)
@pytest.mark.parametrize('kind', ['mmdet.ResNet', 'mmdet.MobileNetV2'])
def test_a_rate_of_attentions(kind, paramwise, constructor):
    """It multiplies what they would have otherwise; all others keep what they have."""
    static, dynamic = models(kind)
    given = PARAMWISE[paramwise]
    for model in (static, dynamic):
        before = settings_of(model, given, constructor)
        after = settings_of(model, dict(given, attention_lr_mult=10), constructor)
        names = [name for name, p in model.named_parameters() if before[p] != after[p]]
        for name, parameter in model.named_parameters():
            (rate, decay), scale = before[parameter], 10 if '.attention.' in name else 1
            assert after[parameter] == (pytest.approx(rate * scale), decay)
        assert bool(names) == (model is dynamic)


def test_a_rate_of_attentions_alone_and_of_other_methods():
    network = nn.Sequential(KWConv2d(8, 8, 3), DYConv2d(8, 8, 3), nn.Conv2d(8, 8, 1))
    network[0].attention.requires_grad_(False)
    found = settings_of(network, dict(attention_lr_mult=0))
    rates = {name: found[p][0] for name, p in network.named_parameters() if p.requires_grad}
    assert {name for name, rate in rates.items() if rate == 0} == {
        name for name, p in network[1].named_parameters('1') if 'attention' in name
    }
    assert '2.weight' in rates and not any(name.startswith('0.attention') for name in rates)


@pytest.mark.parametrize('scale', [-1, 'ten', True, None, float('nan'), float('inf')])
def test_a_rate_of_attentions_that_is_none(chain, scale):
    for model in (chain, nn.Conv2d(8, 8, 3)):
        with pytest.raises(ValueError, match='attention_lr_mult must be a number of at least 0'):
            settings_of(model, dict(attention_lr_mult=scale))
    optimizer = dict(type='OptimWrapper', optimizer=dict(type='Adam'))
    with pytest.raises(ValueError, match='attention_lr_mult is 2, but optimizer'):
        build_optim_wrapper(chain, dict(optimizer, paramwise_cfg=dict(attention_lr_mult=2)))


def test_where_layers_differ_it_is_logged(chain, caplog):
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        settings_of(chain, dict(custom_keys={'b.': dict(lr_mult=0.5), 'c': dict(lr_mult=2.0)}))
    finally:
        logger.removeHandler(caplog.handler)
    (line,) = [r.message for r in caplog.records if 'largest rate' in r.message]
    assert line.startswith('warehouse_manager.weights.0: of its 2 layers 1 are given other')
    assert logging.root.manager.disable == 0


@pytest.mark.parametrize('dynamic', [False, True])
def test_everything_is_logged_again_afterwards(chain, dynamic):
    logger = MMLogger.get_current_instance()
    # MMEngine's loggers remember which levels are enabled; here they forget.
    logger.setLevel(logger.level)
    model = chain if dynamic else nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1))
    settings_of(model, dict(custom_keys={'0': dict(lr_mult=0.5), 'a': dict(lr_mult=0.5)}))
    assert logger.isEnabledFor(logging.INFO) and logger.isEnabledFor(logging.WARNING)


def test_a_rate_that_is_not_the_logged_one_is_logged(chain, caplog):
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        settings_of(chain, dict(custom_keys={'c': dict(lr_mult=2.0)}))
    finally:
        logger.removeHandler(caplog.handler)
    lines = [r.message for r in caplog.records if 'warehouse_manager' in r.message]
    assert lines[-1].startswith(
        "paramwise_options -- warehouse_manager.weights.1: its layers' lr=2.0, "
    )


@pytest.mark.skipif('mmseg' not in LIBRARIES, reason='the constructor is its')
@pytest.mark.parametrize(
    'kind, layers', [('mmseg.BEiT', 4), ('mmseg.MAE', 4), ('mmkw.ConvNeXt', 6)]
)
def test_mmsegs_decay_by_layers(kind, layers, capsys):
    import mmseg.engine  # noqa: F401

    found, printed = {}, {}
    for dynamic in (False, True):
        model = Model(kind, dynamic)
        paramwise = dict(num_layers=layers, decay_rate=0.5, decay_type='layer_wise')
        name = 'mmseg.LearningRateDecayOptimizerConstructor'
        found[dynamic] = model, settings_of(model, paramwise, name)
        printed[dynamic] = capsys.readouterr().out.count('Param groups')
    (static, expected), (dynamic, given) = found[False], found[True]
    of_static = {name: expected[parameter] for name, parameter in static.named_parameters()}
    of_cells = {}
    for name, module in dynamic.named_modules():
        if hasattr(module, 'cells'):
            fused = name.removesuffix('.value')
            of_static.setdefault(f'{name}.weight', of_static.get(f'{fused}.in_proj_weight'))
            of_cells.setdefault(module.cells, []).append(of_static[f'{name}.weight'])
    assert of_cells and len({rate for rates in of_cells.values() for rate, _ in rates}) > 2
    assert all(given[cells] == max(rates) for cells, rates in of_cells.items())
    assert printed[True] == printed[False]


def test_mmpretrains_decay_by_layers_names_no_parameter_twice(caplog):
    """Its groups hold the parameter's name, which is no setting that layers could differ by."""
    pytest.importorskip('mmpretrain.engine', reason='the constructor is its')
    swin = dict(embed_dims=16, depths=[1, 1, 2, 1], num_heads=[1, 1, 1, 1])
    module = dict(type='mmpretrain.SwinTransformer', arch=swin, img_size=64, window_size=2)
    name = 'mmpretrain.LearningRateDecayOptimWrapperConstructor'
    logger = MMLogger.get_current_instance()
    for dynamic in (False, True):
        backbone = dict(type='mmkw.KWModule', module=module) if dynamic else module
        model = MODELS.build(dict(type='mmpretrain.ImageClassifier', backbone=backbone))
        logger.addHandler(caplog.handler)
        settings_of(model, dict(layer_decay_rate=0.5), name)
        logger.removeHandler(caplog.handler)
    told = [r.message for r in caplog.records if 'other settings' in r.message]
    # Of blocks at several depths only: those of the third stage.
    stage = [p.name.startswith('stages_2') for p in model.backbone.warehouse_manager.partitions]
    numbers = {int(re.search(r'weights\.(\d+):', line)[1]) for line in told}
    assert numbers == {index for index, deeper in enumerate(stage) if deeper}
    assert not any('param_name' in line for line in told)


def test_frozen_layers_say_nothing(chain):
    chain.a.requires_grad_(False)
    found = settings_of(chain, dict(custom_keys={'b.': dict(lr_mult=0.5), 'a.': dict(lr_mult=9.0)}))
    assert found[chain.warehouse_manager.weights[0]] == (0.5, 0.5)
    chain.b.requires_grad_(False)
    found = settings_of(chain, dict(custom_keys={'b.': dict(lr_mult=0.5), 'a.': dict(lr_mult=9.0)}))
    # As frozen kernels of static layers.
    assert chain.warehouse_manager.weights[0] not in found


def test_a_layer_alone():
    static = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))
    dynamic = nn.Sequential(KWConv2d(8, 8, 3, groups=8), KWConv2d(8, 8, 1))
    paramwise = dict(dwconv_decay_mult=0.0, custom_keys={'1.': dict(lr_mult=0.5)})
    expected, found = settings_of(static, paramwise), settings_of(dynamic, paramwise)
    for one, other in zip(static, dynamic):
        assert found[other.cells] == expected[one.weight]
        assert found[other.bias] == expected[one.bias]


def test_without_settings_and_wrapped(chain):
    assert set(settings_of(chain, None).values()) == {(1.0, 0.5)}

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = chain

        def named_parameters(self, *args, **kwargs):
            return self.module.named_parameters(*args, **kwargs)

    found = settings_of(Wrapper(), dict(dwconv_decay_mult=0.0))
    assert found[chain.warehouse_manager.weights[0]] == (1.0, 0.0)
    assert found[chain.warehouse_manager.weights[1]] == (1.0, 0.5)


@pytest.mark.skipif('mmdet' not in LIBRARIES, reason='the constructor is its')
@pytest.mark.parametrize('decay_type', ['layer_wise', 'stage_wise'])
def test_mmdets_decay_by_layers(decay_type):
    import mmdet.engine  # noqa: F401

    kind, found = 'mmkw.ConvNeXt', {}
    for dynamic in (False, True):
        torch.manual_seed(0)
        model = Model(kind, dynamic)
        paramwise = dict(num_layers=6, decay_rate=0.5, decay_type=decay_type)
        name = 'mmdet.LearningRateDecayOptimizerConstructor'
        settings = settings_of(model, paramwise, name)
        found[dynamic] = model, settings
    (static, expected), (dynamic, given) = found[False], found[True]
    blocks = static.backbone.stages
    of_blocks = [expected[stage[0].pwconv1.weight] for stage in blocks]
    assert len(set(of_blocks)) == 4
    of_cells = [given[stage[0].pwconv1.cells] for stage in dynamic.backbone.stages]
    assert of_cells == of_blocks


@pytest.mark.parametrize('kind', [k for k in BACKBONES if k.endswith(('.ResNet', 'Transformer'))])
def test_networks_without_values(kind):
    """They have names and shapes, which is what settings depend on."""
    model = Model(kind, True)
    paramwise = dict(PARAMWISE['names'], norm_decay_mult=0.0)
    found = []
    for device in ('cpu', 'meta'):
        settings = settings_of(model.to(device), paramwise)
        found.append({name: settings[p] for name, p in model.named_parameters()})
    assert found[0] == found[1] and len(set(found[0].values())) > 2
