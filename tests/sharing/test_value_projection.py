"""Split projections compute what the fused ones did, and one kernel serves an image."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmkw.layers import KWLinear, PlanError
from mmkw.sharing import SharingPlan, convert, pattern_plan
from mmkw.sharing.value_projection import (
    SplitMultiheadAttention,
    WindowProjection,
    fused_projections,
    split_projections,
)

MASKS = ['none', 'bool', 'float', 'padding', 'per head', 'causal', 'both']


@pytest.mark.parametrize('layout', ['batch first', 'batch second', 'one sequence'])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('masks', MASKS)
@pytest.mark.parametrize(
    'options', [{}, dict(need_weights=False), dict(average_attn_weights=False)], ids=str
)
def test_split_attention_equals_torch_s(layout, bias, masks, options):
    fused = nn.MultiheadAttention(12, 3, bias=bias, batch_first=layout == 'batch first').eval()
    if bias:
        nn.init.normal_(fused.in_proj_bias)
    split = SplitMultiheadAttention(fused).eval()
    query, memory = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    per_head = torch.randn(6, 5, 7)
    if layout == 'batch second':
        query, memory = query.transpose(0, 1), memory.transpose(0, 1)
    elif layout == 'one sequence':
        query, memory, padding, per_head = query[0], memory[0], padding[1], per_head[:3]
    causal = torch.ones(5, 7, dtype=torch.bool).triu(1)
    arguments = {
        'none': {},
        'bool': dict(attn_mask=causal),
        'float': dict(attn_mask=torch.randn(5, 7)),
        'per head': dict(attn_mask=per_head),
        'padding': dict(key_padding_mask=padding),
        'causal': dict(attn_mask=causal, is_causal=True),
        'both': dict(attn_mask=causal, key_padding_mask=padding),
    }[masks]
    expected, expected_weights = fused(query, memory, memory, **arguments, **options)
    found, weights = split(query, memory, memory, **arguments, **options)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(weights, expected_weights, atol=1e-6, rtol=1e-5)


def test_a_hint_without_a_mask_is_refused_by_both():
    fused = nn.MultiheadAttention(12, 3)
    x = torch.randn(2, 5, 12)
    for attention in (fused, SplitMultiheadAttention(fused)):
        with pytest.raises(RuntimeError, match='is_causal'):
            attention(x, x, x, is_causal=True)


@pytest.mark.parametrize('need_weights', [True, False])
def test_dropout_is_of_the_weights_in_training(need_weights):
    fused = nn.MultiheadAttention(12, 3, dropout=0.5)
    x = torch.randn(4, 5, 12)
    for attention in (fused, SplitMultiheadAttention(fused)):
        torch.manual_seed(0)
        found, weights = attention(x, x, x, need_weights=need_weights, average_attn_weights=False)
        again, _ = attention.eval()(x, x, x, need_weights=need_weights)
        assert not torch.allclose(found, again)
        assert not need_weights or 0.2 < (weights == 0).float().mean() < 0.8


class Holder(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention


@pytest.mark.parametrize(
    'arguments, message',
    [
        (dict(kdim=8), 'one fused projection'),
        (dict(add_bias_kv=True), 'without add_bias_kv'),
        (dict(add_zero_attn=True), 'without add_zero_attn'),
    ],
)
def test_attentions_of_other_kinds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        split_projections(Holder(nn.MultiheadAttention(12, 3, **arguments)), ['attention'])


def test_state_dicts_of_the_fused_module_and_its_own_are_read():
    holder = Holder(nn.MultiheadAttention(12, 3))
    state = {key: torch.randn_like(value) for key, value in holder.state_dict().items()}
    split_projections(holder, ['attention'])
    holder.load_state_dict(state)
    fused = torch.cat([holder.attention.query_key.weight, holder.attention.value.weight])
    assert fused.equal(state['attention.in_proj_weight'])
    other = Holder(nn.MultiheadAttention(12, 3))
    split_projections(other, ['attention'])
    other.load_state_dict(holder.state_dict())
    assert other.attention.value.weight.equal(holder.attention.value.weight)


def test_a_frozen_projection_stays_frozen():
    holder = Holder(nn.MultiheadAttention(12, 3)).requires_grad_(False)
    split_projections(holder, ['attention'])
    assert not any(p.requires_grad for p in holder.parameters())


def test_windows_of_an_image_share_its_value_kernel():
    swin = pytest.importorskip('mmdet.models.backbones.swin', reason='the windows are its')
    block = Holder(swin.ShiftWindowMSA(8, 2, 2, shift_size=1))
    assert list(fused_projections(block)) == ['attention.w_msa.qkv']
    plan = SharingPlan.make([('attention.w_msa.qkv.value', 'value')], cell_num_ratio=4)
    convert(block, plan, dict(type='LN'))
    projection = block.attention.w_msa.qkv
    assert isinstance(projection, WindowProjection) and isinstance(projection.value, KWLinear)
    seen = []
    projection.value.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    tokens = torch.randn(3, 16, 8)
    together = block.attention(tokens, (4, 4))
    assert seen == [(3, 16, 8)]
    alone = torch.cat([block.attention(tokens[i : i + 1], (4, 4)) for i in range(3)])
    torch.testing.assert_close(together, alone)
    named = block.attention(query=tokens, hw_shape=(4, 4))
    torch.testing.assert_close(together, named)


@pytest.mark.parametrize('how', ['a part is compiled', 'computed again by another thread'])
def test_a_part_that_computes_alone_knows_the_number_of_images(how):
    swin = pytest.importorskip('mmdet.models.backbones.swin', reason='the windows are its')
    block = Holder(swin.ShiftWindowMSA(8, 2, 2))
    plan = SharingPlan.make([('attention.w_msa.qkv.value', 'value')], cell_num_ratio=4)
    network = convert(block, plan, dict(type='LN'))
    nn.init.normal_(network.attention.w_msa.qkv.value.attention.fc2.weight)
    tokens = torch.randn(4, 16, 8, requires_grad=True)
    expected = network.attention(tokens, (4, 4))
    (gradient,) = torch.autograd.grad(expected.square().sum(), tokens)
    windows = network.attention.w_msa
    if how == 'a part is compiled':
        windows.compile(backend='eager')
    else:
        own = windows.forward
        windows.forward = lambda *x, **more: checkpoint(own, *x, **more, use_reentrant=False)
    found = network.attention(tokens, (4, 4))
    torch.testing.assert_close(found, expected)
    thread = threading.Thread(target=found.square().sum().backward)
    thread.start()
    thread.join()
    torch.testing.assert_close(tokens.grad, gradient)


def test_threads_that_share_a_network_do_not_share_its_number_of_images():
    swin = pytest.importorskip('mmdet.models.backbones.swin', reason='the windows are its')
    block = Holder(swin.ShiftWindowMSA(8, 2, 2))
    plan = SharingPlan.make([('attention.w_msa.qkv.value', 'value')], cell_num_ratio=4)
    network = copy.deepcopy(convert(block, plan, dict(type='LN')))
    nn.init.normal_(network.attention.w_msa.qkv.value.attention.fc2.weight)
    tokens = torch.randn(4, 16, 8)
    alone = [network.attention(tokens[:n], (4, 4)) for n in (1, 4)]
    threads, found = [], []

    def compute_one(*_):
        # While four images are under way.
        if not threads:
            threads.append(threading.Thread(target=append, args=(1,)))
            threads[0].start()
            threads[0].join()

    def append(number):
        found.append(network.attention(tokens[:number], (4, 4)))

    network.attention.w_msa.register_forward_pre_hook(compute_one)
    append(4)
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_an_encoder_of_pytorch_stays_as_it_is():
    """It reads the parameters of its attention, in evaluation alone."""
    network = nn.Module()
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    network.encoder = nn.TransformerEncoder(layer, 2)
    network.last = nn.Linear(32, 32)
    with pytest.raises(PlanError, match='decides nothing: no layer matches'):
        pattern_plan(network, [dict(match=r'encoder\.layers\.\d\.self_attn\.value')])
    x = torch.randn(2, 5, 32)
    expected = network.encoder.eval()(x)
    convert(network)
    torch.testing.assert_close(network.encoder.eval()(x), expected, atol=1e-5, rtol=1e-5)
