"""What libraries and users do to a network means the same for its dynamic twin, or is refused."""

import copy
import pickle
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from mmcv.cnn import ConvModule, fuse_conv_bn
from mmengine.analysis import get_model_complexity_info
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from small_networks import LAYERS, Block, gradients, images, twins
from torch import nn
from torch.ao.quantization import quantize_fx
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.fx import GraphModule, symbolic_trace
from torch.fx.experimental import optimization
from torch.nn.utils import fusion, parametrizations, parametrize, prune
from torch.optim.swa_utils import update_bn

from mmkw import KWConv1d, KWConv2d, KWConv3d, KWLinear, SharingPlan, convert
from mmkw.layers import StandsForStatic

close = torch.testing.assert_close


def shared(network):
    return network.warehouse_manager.weights


def evaluated(network, *inputs):
    with torch.no_grad():
        return network.eval()(*inputs)


# A weight


@pytest.mark.parametrize(
    'make',
    [
        lambda: KWConv1d(4, 4, 3),
        lambda: KWConv2d(4, 4, 3),
        lambda: KWConv3d(4, 4, 3),
        lambda: KWLinear(4, 4),
        lambda: twins()[0].a.conv1,
    ],
)
def test_a_dynamic_layer_says_why_it_has_no_weight(make):
    layer = make()
    assert not hasattr(layer, 'weight')
    assert getattr(layer, 'weight', None) is None
    message = f'{type(layer).__name__} has no weight of its own.* leave this layer static'
    with pytest.raises(AttributeError, match=message):
        _ = layer.weight
    with pytest.raises(AttributeError, match=message):
        layer.weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(AttributeError, match=message):
        layer.weight = torch.ones(4, 4)
    with pytest.raises(AttributeError, match="has no attribute 'wieght'"):
        _ = layer.wieght
    for name in ('in_proj_weight', 'biases'):
        assert not hasattr(layer, name)


# Fusing


def test_mmcv_fuses_static_convolutions_only():
    for network in twins():
        (x,) = images((7, 6))
        expected = evaluated(network, x)
        names = set(network.state_dict())
        assert fuse_conv_bn(network) is network
        close(evaluated(network, x), expected)
        dynamic = hasattr(network, 'warehouse_manager')
        fused = [name for name, m in network.named_modules() if isinstance(m, nn.Identity)]
        assert fused == ([] if dynamic else ['bn', 'a.bn1', 'a.bn2', 'b.bn1', 'b.bn2'])
        assert not dynamic or set(network.state_dict()) == names


def test_mmcv_fuses_static_convolutions_beside_dynamic_ones():
    layers = nn.Sequential(KWConv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    layers[2].running_var.fill_(3)
    (x,) = images((7, 6))
    expected = evaluated(layers, x)
    fuse_conv_bn(layers)
    assert isinstance(layers[2], nn.Identity)
    close(evaluated(layers, x), expected)


def test_explicit_fusing_is_refused():
    dynamic, static = (network.eval() for network in twins())
    block, twin = dynamic.a, static.a
    fusion.fuse_conv_bn_eval(twin.conv1, twin.bn1)
    with pytest.raises(AttributeError, match='KWConv2d has no weight of its own'):
        fusion.fuse_conv_bn_eval(block.conv1, block.bn1)
    torch.ao.quantization.fuse_modules(static, [['a.conv1', 'a.bn1']])
    with pytest.raises((NotImplementedError, AssertionError), match=r'KWConv2d.*BatchNorm2d'):
        torch.ao.quantization.fuse_modules(dynamic, [['a.conv1', 'a.bn1']])


def test_an_attentions_norm_may_be_fused_into_its_linear_layer():
    network, (x,) = twins()[0].eval(), images((7, 6))
    expected = evaluated(network, x)
    parts = [[f'{name}.attention.fc1', f'{name}.attention.norm1'] for name in LAYERS]
    fused = torch.ao.quantization.fuse_modules(network, parts)
    assert isinstance(fused.a.conv1.attention.norm1, nn.Identity)
    close(evaluated(fused, x), expected)


def test_fusing_in_a_traced_graph():
    for network in twins():
        (x,) = images((7, 6))
        expected = evaluated(network, x)
        fused = optimization.fuse(network)
        close(evaluated(fused, x), expected)
        dynamic = hasattr(network, 'warehouse_manager')
        # Of the static network all, of the dynamic one none, as only its stem is static.
        assert sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) == (5 if dynamic else 0)
        assert not dynamic or len(shared(fused)) == 1


@pytest.mark.parametrize('part', ['', 'a'])
def test_efficient_evaluation_of_batch_norms(part):
    for network in twins():
        (x,) = images((7, 6))
        expected = evaluated(network, x)
        learned = gradients(network, x)
        holder = nn.ModuleDict(dict(network=network))
        turn_on_efficient_conv_bn_eval(holder, f'network.{part}'.rstrip('.'))
        close(evaluated(network, x), expected)
        close(gradients(network, x), learned)


def test_efficient_evaluation_in_a_conv_module_is_refused():
    (x,) = images((7, 6))
    for conv_cfg in (None, dict(type='mmkw.KWConv2d')):
        layer = ConvModule(
            3, 4, 3, conv_cfg=conv_cfg, norm_cfg=dict(type='BN'), efficient_conv_bn_eval=True
        )
        if conv_cfg is None:
            evaluated(layer, x)
        else:
            with pytest.raises(AttributeError, match='KWConv2d has no weight of its own'):
                evaluated(layer, x)


# Statistics of BatchNorm


def batches(*sizes):
    return [torch.randn(size, 3, 6, 6) for size in sizes]


def test_statistics_are_estimated_anew_as_written_out():
    for network in twins():
        loader, seen = batches(3, 2, 4), {}
        for name, module in network.named_modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                seen[name] = []
                module.register_forward_pre_hook(
                    lambda _, inputs, kept=seen[name]: kept.append(inputs[0].detach().clone())
                )
        update_bn(loader, network.eval())
        assert not network.training
        for name, inputs in seen.items():
            norm = network.get_submodule(name)
            values = [x.transpose(0, 1).flatten(1) for x in inputs]
            close(norm.running_mean, torch.stack([x.mean(1) for x in values]).mean(0))
            close(norm.running_var, torch.stack([x.var(1) for x in values]).mean(0))
            assert norm.momentum == 0.1


def test_statistics_of_single_images():
    """One value per channel has no variance; a static network has many, those of a map."""
    dynamic, static = twins()
    update_bn(batches(1, 1), static)
    with pytest.raises(ValueError, match=r"batch has one image.*batches of two.*type='LN'"):
        update_bn(batches(1, 2), copy.deepcopy(dynamic))
    # The last batch of a loader may be one image: the attentions take it as in training.
    norm = dynamic.wide.attention.norm1
    loader = batches(3, 1)
    update_bn(loader, dynamic)
    kept = norm.running_var.clone()
    update_bn(loader[:1], dynamic)
    close(norm.running_var, kept)
    update_bn(batches(1, 1), twins('LN')[0])


@pytest.mark.parametrize('batch', [1, 3])
def test_precise_statistics(batch):
    """As hooks for it do: a momentum of one, and the average of what is then running."""
    for network in twins():
        before = copy.deepcopy(network.state_dict())
        norms = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
        }
        for norm in norms.values():
            norm.momentum = 1.0
        found = []
        for x in batches(batch, batch):
            network.train()(x)
            found.append({name: norm.running_var.clone() for name, norm in norms.items()})
        for name in norms:
            kept = batch == 1 and 'attention' in name
            changed = [not torch.equal(f[name], before[f'{name}.running_var']) for f in found]
            assert changed == [not kept] * 2
            assert all(f[name].isfinite().all() for f in found)


def test_norms_of_several_processes_and_back():
    for network in twins():
        x = images((7, 6))[0]
        expected = [evaluated(network, x), network.train()(x[:1]), network(x)]
        network = twins()[0 if hasattr(network, 'warehouse_manager') else 1]
        converted = convert_sync_batchnorm(network)
        count = sum(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
        assert count == (10 if hasattr(network, 'warehouse_manager') else 5)
        back = revert_sync_batchnorm(converted)
        assert not any(isinstance(m, nn.SyncBatchNorm) for m in back.modules())
        close([evaluated(back, x), back.train()(x[:1]), back(x)], expected)


# Tracing


def test_a_traced_network_takes_any_images():
    for network in twins():
        traced = symbolic_trace(network)
        for x in (*images((7, 6), (5, 9)), *images((6, 6), batch=1), *images((8, 8), batch=5)):
            close(evaluated(traced, x), evaluated(network, x), rtol=0, atol=0)
            close(gradients(traced.train(), x), gradients(network.train(), x))


def test_a_traced_network_has_all_parameters():
    for network in twins():
        traced = symbolic_trace(network)
        assert set(traced.state_dict()) == set(network.state_dict())
        own = dict(network.named_parameters())
        for name, parameter in traced.named_parameters():
            assert parameter is own[name]
        (x,) = images((7, 6))
        expected = evaluated(traced, x)
        for copier in (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))):
            twin = copier(traced)
            close(evaluated(twin, x), expected)
            if hasattr(twin, 'warehouse_manager'):
                with torch.no_grad():
                    shared(twin)[0].zero_()
                assert not torch.equal(evaluated(twin, x), expected)
        close(evaluated(traced.double(), x.double()).float(), expected)


def test_features_of_a_traced_network():
    for network in twins():
        (x,) = images((7, 6))
        traced = symbolic_trace(network)
        # One call for a layer, named after it.
        calls = [node.target for node in traced.graph.nodes if node.op == 'call_module']
        assert [name for name in calls if name in LAYERS] == LAYERS
        (end,) = (node for node in traced.graph.nodes if node.op == 'output')
        end.args = tuple(node for node in traced.graph.nodes if node.target == 'a.conv2')
        traced.graph.eliminate_dead_code()
        features = GraphModule(network, traced.graph)
        assert not hasattr(features, 'b')
        assert hasattr(features, 'warehouse_manager') == hasattr(network, 'warehouse_manager')
        kept = []
        network.a.conv2.register_forward_hook(lambda *args, kept=kept: kept.append(args[2]))
        evaluated(network, x)
        close(evaluated(features, x), kept[0])


def test_a_part_of_a_network_is_traced_as_such():
    for network in twins():
        part = symbolic_trace(network.a)
        assert set(part.state_dict()) == set(network.a.state_dict())
        x = torch.randn(2, 8, 5, 5)
        close(evaluated(part, x), evaluated(network.a, x))


@pytest.mark.parametrize('make', [lambda: KWConv2d(4, 4, 3), lambda: KWLinear(5, 5)])
def test_a_layer_alone_in_a_traced_network(make):
    network, x = nn.Sequential(make(), nn.ReLU()), torch.randn(2, 4, 5, 5)
    traced = symbolic_trace(network)
    assert set(traced.state_dict()) == set(network.state_dict())
    assert [node.op for node in traced.graph.nodes].count('call_module') == 2
    close(evaluated(traced, x), evaluated(network, x))


def test_hooks_are_not_traced_twice():
    dynamic, static = twins()
    (x,) = images((7, 6))
    for network in (dynamic, static):
        handle = network.a.conv1.register_forward_hook(lambda *args: 2 * args[2])
        if network is static:
            close(evaluated(symbolic_trace(network), x), evaluated(network, x))
            continue
        with pytest.raises(RuntimeError, match=r'a\.conv1, a KWConv2d, has forward hooks'):
            symbolic_trace(network)
        handle.remove()
        traced = symbolic_trace(network)
        network.a.conv1.register_forward_hook(lambda *args: 2 * args[2])
        close(evaluated(traced, x), evaluated(network, x))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def test_an_attention_whose_values_are_dynamic():
    network = convert(Attending(), SharingPlan.make([('attention.value', 'values')]))
    for net in (network, Attending()):
        traced = symbolic_trace(net)
        assert set(traced.state_dict()) == set(net.state_dict())
        for shape in ((2, 5, 8), (3, 4, 8)):
            x = torch.randn(shape)
            close(evaluated(traced, x), evaluated(net, x))


@pytest.mark.parametrize('kind', ['ResNet', 'KWResNet'])
def test_a_backbone_in_a_traced_network(kind):
    pytest.importorskip('mmdet', reason="needs MMDetection's ResNet")
    from mmkw import backbones

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = getattr(backbones, kind)(depth=18, base_channels=8)

        def forward(self, x):
            return self.backbone(x)[-1]

    network = Model().eval()
    traced = symbolic_trace(network)
    for x in images((32, 32), (40, 64)):
        close(evaluated(traced, x), evaluated(network, x), rtol=0, atol=0)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_scripts_are_refused():
    dynamic, static = twins()
    (x,) = images((7, 6))
    close(evaluated(torch.jit.script(static), x), evaluated(static, x))
    for network, kind in ((dynamic, 'KWConv2d'), (KWLinear(4, 4), 'KWLinear')):
        with pytest.raises(TypeError, match=rf'cannot compile a {kind}.* Use torch\.export'):
            torch.jit.script(network)


def test_hooks_for_all_modules_see_all():
    for network in twins():
        seen = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_, seen=seen: seen.append(module)
        )
        try:
            evaluated(network, *images((7, 6)))
        finally:
            handle.remove()
        unseen = {m for m in network.modules() if m not in seen}
        assert all('warehouse_manager' in n for n, m in network.named_modules() if m in unseen)


@pytest.mark.parametrize('how', ['fused', 'quantized'])
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::UserWarning')
def test_quantizing_in_a_traced_graph(how):
    """Of the dynamic network only the static layers: the rest stays as it is."""
    for network in twins():
        (x,) = images((7, 6))
        expected = evaluated(network, x)
        if how == 'fused':
            close(evaluated(quantize_fx.fuse_fx(network), x), expected)
            continue
        mapping = torch.ao.quantization.get_default_qconfig_mapping('x86')
        prepared = quantize_fx.prepare_fx(network, mapping, (x,))
        evaluated(prepared, x)
        converted = quantize_fx.convert_fx(prepared)
        close(evaluated(converted, x), expected, atol=0.05, rtol=0)
        names = [type(m).__name__ for m in converted.modules()]
        dynamic = hasattr(network, 'warehouse_manager')
        assert names.count('KWConv2d') == (len(LAYERS) if dynamic else 0)
        assert any('quantized' in type(m).__module__ for m in converted.modules())


# Pruning and parametrising


def trained(network, mode=True, steps=2):
    """Some steps on the same images."""
    torch.manual_seed(1)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05)
    for x in images(*[(6, 6)] * steps):
        optimiser.zero_grad()
        network.train(mode)(x).square().mean().backward()
        optimiser.step()
    return network


METHODS = {
    'l1': lambda module, name: prune.l1_unstructured(module, name, 0.5),
    'random rows': lambda module, name: prune.random_structured(module, name, 0.5, dim=0),
    'weak rows': lambda module, name: prune.ln_structured(module, name, 0.5, n=2, dim=0),
    'mask': lambda module, name: prune.custom_from_mask(
        module, name, torch.rand_like(getattr(module, name)) < 0.5
    ),
    'globally': lambda module, name: prune.global_unstructured(
        [(module, name)], prune.L1Unstructured, amount=0.5
    ),
    'twice': lambda module, name: [prune.l1_unstructured(module, name, 0.25) for _ in range(2)],
}
TARGETS = {
    'cells': lambda network: (shared(network), '0'),
    'fc1': lambda network: (network.a.conv1.attention.fc1, 'weight'),
    'fc2': lambda network: (network.a.conv1.attention.fc2, 'weight'),
    'norm1': lambda network: (network.a.conv1.attention.norm1, 'weight'),
    'bias': lambda network: (network.a.conv2, 'bias'),
}


@pytest.mark.parametrize('how', METHODS)
@pytest.mark.parametrize('target', TARGETS)
def test_what_is_pruned_stays_zero(how, target):
    dynamic, static = twins()
    cases = [(dynamic, *TARGETS[target](dynamic)), (static, static.a.conv1, 'weight')]
    for network, module, name in cases:
        if how.endswith('rows') and getattr(module, name).dim() == 1:
            continue  # Not by PyTorch either.
        METHODS[how](module, name)
        mask = getattr(module, f'{name}_mask').bool()
        assert 0 < mask.sum() < mask.numel()
        assert prune.is_pruned(network)
        original = getattr(module, f'{name}_orig').detach().clone()
        # A bias before a norm that learns has no effect.
        trained(network, mode=target != 'bias')
        # Also images that come one by one.
        for x in images((6, 6), (6, 6), batch=1):
            gradients(network.train(), x)
        moved = getattr(module, f'{name}_orig')
        assert torch.equal(moved[~mask], original[~mask])
        assert not torch.equal(moved[mask], original[mask])
        (x,) = images((7, 6))
        found, known = evaluated(network, x), gradients(network.eval(), x)
        prune.remove(module, name)
        assert isinstance(getattr(module, name), nn.Parameter) and not prune.is_pruned(network)
        assert (getattr(module, name)[~mask] == 0).all()
        close(getattr(module, name)[mask], moved[mask])
        close(evaluated(network, x), found)
        plain = gradients(network.eval(), x)
        key = next(key for key in known if key.endswith(f'{name}_orig'))
        close(known.pop(key), plain[key.removesuffix('_orig')] * mask)
        close(known, {name: plain[name] for name in known})


def test_a_layers_weight_cannot_be_pruned():
    dynamic, static = twins()
    prune.l1_unstructured(static.a.conv1, 'weight', 0.5)
    for attempt in (
        lambda: prune.l1_unstructured(dynamic.a.conv1, 'weight', 0.5),
        lambda: prune.global_unstructured(
            [(dynamic.a.conv1, 'weight')], prune.L1Unstructured, amount=0.5
        ),
    ):
        with pytest.raises(AttributeError, match=r"take warehouse_manager\.weights and .* '0'"):
            attempt()
        assert not prune.is_pruned(dynamic)


CHANGES = {
    'prune': lambda layer: prune.l1_unstructured(layer, 'weight', 0.5),
    'spectral norm': nn.utils.spectral_norm,
    'weight norm': parametrizations.weight_norm,
}


@pytest.mark.parametrize('how', CHANGES)
def test_weights_cannot_be_changed_by_applying_to_all(how):
    """It would be a throw-away twin that is pruned."""

    def change(module):
        if isinstance(module, nn.Conv2d):
            CHANGES[how](module)

    dynamic, static = twins()
    static.apply(change)
    before = dynamic.state_dict()
    with pytest.raises(AttributeError, match=r"KWConv2d has no weight .* '0'"):
        dynamic.wide.apply(change)
    assert all(map(torch.equal, dynamic.state_dict().values(), before.values()))
    # Who catches the refusal has a network that computes.
    assert not dynamic.wide._forward_pre_hooks and not dynamic.wide._buffers
    evaluated(dynamic, *images((6, 6)))


def count_calls(module, *_):
    module.calls += 1


def put_a_number(module):
    if isinstance(module, nn.Conv2d):
        module.calls = 0
        module.register_buffer('total', torch.zeros(1), persistent=False)
        module.add_module('watch', nn.Identity())
        module.handle = module.register_forward_hook(count_calls)
        module.stride = (2, 2)


def remove_it(module):
    if hasattr(module, 'handle'):
        module.handle.remove()
        del module.handle


def forget_hooks(module):
    module._forward_hooks = OrderedDict()


def test_what_is_put_on_layers_by_applying_is_there_the_next_time():
    """As counters of operations do that look for layers by their class."""
    for network in twins():
        network.apply(put_a_number)
        layers = [network.get_submodule(name) for name in LAYERS]
        (x,) = images((6, 6))
        y = network.wide(network.stem(x))
        assert y.shape[2:] == (2, 2) and network.wide.calls == 1 and len(network.wide.total) == 1
        assert isinstance(network.wide.watch, nn.Identity)
        network.apply(remove_it)
        network.wide(network.stem(x))
        assert network.wide.calls == 1 and not hasattr(network.wide, 'handle')
        for layer in layers:
            layer.register_forward_hook(count_calls)
        network.apply(forget_hooks)
        network.wide(network.stem(x))
        assert network.wide.calls == 1


def test_what_is_beside_dynamic_values_is_pruned_once():
    def change(module):
        if isinstance(module, nn.Linear):
            prune.l1_unstructured(module, 'weight', 0.5)
            pruned.append(module)

    static = nn.Module()
    static.attn = nn.MultiheadAttention(32, 4)
    dynamic = convert(copy.deepcopy(static), SharingPlan.make([('attn.value', 'one')]))
    for network in (static, dynamic):
        pruned = []
        network.apply(change)
        assert pruned.count(network.attn.out_proj) == 1


@pytest.mark.parametrize('kind', [nn.Conv2d, nn.Module])
def test_hooks_registered_by_applying_run_once_for_every_layer(kind):
    for network in twins():
        (x,) = images((6, 6))
        seen, handles = [], []

        def register(module, handles=handles, seen=seen):
            if isinstance(module, kind):
                handles.append(module.register_forward_hook(lambda m, *_: seen.append(m)))
                handles.append(module.register_full_backward_hook(lambda m, *_: seen.append(m)))

        network.apply(register)
        network(x).sum().backward()
        layers = [network.get_submodule(name) for name in LAYERS]
        assert [seen.count(layer) for layer in layers] == [2] * len(layers)
        assert seen.count(network.stem) == 2
        for handle in handles:
            handle.remove()
        seen.clear()
        network(x)
        assert not seen


def test_pruned_networks_are_saved_and_loaded():
    for index in (0, 1):
        source, target, plain = (twins()[index] for _ in range(3))
        for network in (source, target):
            where = (shared(network), '0') if index == 0 else (network.a.conv1, 'weight')
            prune.random_unstructured(*where, 0.5)
        state = trained(source).state_dict()
        target.load_state_dict(state)
        (x,) = images((7, 6))
        close(evaluated(target, x), evaluated(source, x))
        with pytest.raises(RuntimeError, match='prune.remove' if index == 0 else 'weight_orig'):
            plain.load_state_dict(state)


@pytest.mark.parametrize('how', ['pruned', 'parametrised'])
def test_a_warehouse_is_frozen_with_its_layers_as_ever(how):
    network = twins()[0]
    if how == 'pruned':
        prune.l1_unstructured(shared(network), '0', 0.5)
    else:
        parametrizations.weight_norm(shared(network), '0')
    parameters = list(shared(network).parameters())
    layers = [network.get_submodule(name) for name in LAYERS]
    for learns in (True, False, True):
        for layer in layers:
            layer.requires_grad_(learns)
        (x,) = images((6, 6))
        network.zero_grad()
        network(x).sum().backward()
        assert {p.requires_grad for p in parameters} == {learns}
        assert {p.grad is not None for p in parameters} == {learns}


PARAMETRISATIONS = {
    'weight_norm': parametrizations.weight_norm,
    'spectral_norm': parametrizations.spectral_norm,
    'old weight_norm': nn.utils.weight_norm,
    'old spectral_norm': nn.utils.spectral_norm,
}


@pytest.mark.parametrize('how', PARAMETRISATIONS)
def test_cells_may_be_parametrised_but_no_weight(how):
    dynamic, static = twins()
    apply = PARAMETRISATIONS[how]
    apply(static.a.conv1)
    with pytest.raises((AttributeError, ValueError, KeyError), match=r'KWConv2d|weight'):
        apply(dynamic.a.conv1)
    dynamic = twins()[0]
    apply(shared(dynamic), '0')
    for network, module, name in (
        (static, static.a.conv1, 'weight'),
        (dynamic, shared(dynamic), '0'),
    ):
        before = {n: p.detach().clone() for n, p in module.named_parameters() if name in n}
        trained(network).eval()
        moved = [n for n, p in module.named_parameters() if n in before if not p.equal(before[n])]
        assert sorted(moved) == sorted(before)
        (x,) = images((7, 6))
        found = evaluated(network, x)
        network.double().float()
        close(evaluated(network, x), found, rtol=1e-4, atol=1e-4)
        if how.startswith('old'):
            remove = nn.utils.remove_weight_norm
            (remove if 'weight' in how else nn.utils.remove_spectral_norm)(module, name)
        else:
            parametrize.remove_parametrizations(module, name)
        close(evaluated(network, x), found, rtol=1e-4, atol=1e-4)


# Parameters, memory, counting


@pytest.mark.parametrize('kind', [Block, nn.Conv2d, nn.BatchNorm2d])
def test_files_load_where_activations_are_checkpointed(kind):
    """A module is put around others, which has another place for their names than a state dict."""
    (x,) = images((7, 6))
    files = [network.state_dict() for network in reversed(twins())]
    for network in twins():
        static = not any(isinstance(module, StandsForStatic) for module in network.modules())
        apply_activation_checkpointing(network, check_fn=lambda module: isinstance(module, kind))
        plain = copy.deepcopy(network)
        for file in files[:1] if static else files:
            trained(network)
            network.load_state_dict(file)
        close(evaluated(network, x), evaluated(plain, x), rtol=1e-4, atol=1e-4)
        with pytest.raises(RuntimeError, match='conv1'):
            network.load_state_dict({k: v for k, v in file.items() if 'conv1' not in k})


def test_parameters_as_a_vector():
    for network in twins():
        (x,) = images((7, 6))
        network.train()
        vector = nn.utils.parameters_to_vector(network.parameters())
        assert vector.numel() == sum(p.numel() for p in network.parameters())
        expected, learned = evaluated(network, x), gradients(network, x)
        # Some place between two values of float32, unlike what an allocator gives.
        moved = torch.cat([torch.zeros(1), vector.detach()])[1:]
        nn.utils.vector_to_parameters(moved, network.parameters())
        close(evaluated(network, x), expected)
        close(gradients(network, x), learned)
        with torch.no_grad():
            moved.zero_()
        assert all((p == 0).all() for p in network.parameters())


def test_clipped_gradients():
    for network in twins():
        (x,) = images((7, 6))
        learned = gradients(network.train(), x)
        norm = nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        close(norm, torch.stack([g.norm() for g in learned.values()]).norm())
        for name, parameter in network.named_parameters():
            close(parameter.grad, learned[name] * 0.1 / (norm + 1e-6))


def test_layers_made_without_initialisation():
    for make in (KWConv2d, nn.Conv2d):
        source = make(3, 4, 3, padding=1)
        layer = nn.utils.skip_init(make, 3, 4, kernel_size=3, padding=1)
        assert {p.device.type for p in layer.parameters()} == {'cpu'}
        layer.load_state_dict(source.state_dict())
        (x,) = images((7, 6))
        close(evaluated(layer, x), evaluated(source, x))


def test_the_format_of_weights_is_for_images():
    for network in twins():
        (x,) = images((7, 6))
        expected = evaluated(network, x)
        nn.utils.convert_conv2d_weight_memory_format(network, torch.channels_last)
        assert network.stem.weight.is_contiguous(memory_format=torch.channels_last)
        assert 'warehouse_manager' not in dir(network) or shared(network)[0].is_contiguous()
        close(evaluated(network, x), expected)


def test_mmengine_counts_mixing_and_attention():
    dynamic, static = (network.eval() for network in twins())
    counts = [
        get_model_complexity_info(network, (3, 7, 6), show_table=False, show_arch=False)
        for network in (dynamic, static)
    ]
    more = 0
    for name in LAYERS:
        attention, cells = dynamic.get_submodule(name).attention, shared(dynamic)[0]
        more += attention.num_mixtures * cells.numel()
        more += attention.fc1.weight.numel() + attention.fc2.weight.numel()
        # A norm counts as a scale and a shift.
        more += 2 * attention.norm1.num_features
    assert counts[0]['flops'] == counts[1]['flops'] + more
    assert counts[0]['params'] == sum(p.numel() for p in dynamic.parameters())


def test_torchscript_files_are_loaded_beside_converted_networks(tmp_path):
    """Every new submodule is looked at, those of TorchScript too."""
    static, x = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3))), torch.randn(2, 3, 5, 5)
    torch.jit.script(static).save(tmp_path / 'a.pt')
    torch.testing.assert_close(torch.jit.load(tmp_path / 'a.pt')(x), static(x))


def test_parameters_may_be_swapped_after_training():
    """``swap_tensors`` refuses what others refer to."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for network in twins():
            (x,) = images((9, 9))
            network.train()(x).square().mean().backward()
            network.double().eval()(x.double()).mean().backward()
            assert {p.dtype for p in network.parameters()} == {torch.float64}
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_compiled_autograd_of_static_modules_beside_converted_networks():
    import torch._dynamo as dynamo

    twins()
    static, x = nn.Conv2d(4, 4, 3), torch.randn(2, 4, 5, 5)
    expected = torch.autograd.grad(static(x).square().sum(), static.weight)[0]
    with dynamo.config.patch(compiled_autograd=True):
        loss = static(x).square().sum()
        torch.compile(lambda: loss.backward(), backend='aot_eager')()
    dynamo.reset()
    close(static.weight.grad, expected)


def test_a_network_from_a_file_is_checked_where_nothing_was_converted(tmp_path):
    """A model that holds it takes all of a state dict or nothing."""
    dynamic, _ = twins()
    torch.save(dynamic, tmp_path / 'whole.pt')
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
import torch
from torch import nn
network = torch.load({str(tmp_path / 'whole.pt')!r}, weights_only=False)
model = nn.Sequential(nn.Conv2d(3, 3, 1), network)
state = model.state_dict()
state['0.weight'] = state['0.weight'] + 1
name = next(name for name in state if 'warehouse_manager' in name)
state[name] = state[name][:-1]
before = model[0].weight.clone()
try:
    model.load_state_dict(state)
except RuntimeError:
    print(torch.equal(model[0].weight, before))
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.stdout == 'True\n', result.stderr
