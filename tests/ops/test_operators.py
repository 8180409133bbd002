"""``torch.ops.mmkw``: what PyTorch is told of them is true, and wrong calls are refused."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkw.ops import SampleConv, apply_mixed, backend, mix_cells
from mmkw.ops.compiled import MISSING, has_bfloat16, multiplies_bfloat16
from mmkw.ops.kernels import cut_kernels

pytestmark = pytest.mark.skipif(MISSING is not None, reason=f'compiled kernels: {MISSING}')
ops = torch.ops.mmkw
# Two images of 3x3 kernels, 8 to 8 channels, from six cells of 8 x 4.
GRID, CELLS, MIXTURES = (3, 3, 1, 2), (6, 8, 4, 1, 1), 18


def floats(*shape):
    return torch.randn(shape)


def mixing(**changes):
    return dict(attention=floats(2, MIXTURES, 6), cells=floats(*CELLS), grid=GRID) | changes


def kernels(batch=2):
    return floats(batch, 8, 8, 3, 3)


def backward(**changes):
    return dict(grad_kernels=list(kernels()), **mixing(), kernels=None, rows=None) | changes


def panels(*shape, dtype=torch.bfloat16):
    """One panel of 64 columns, and the rest of its rows."""
    return floats(*(shape or (1, 6, 96))).to(dtype)


def packing(**changes):
    return dict(cells=floats(*CELLS), panels=panels()) | changes


def addition(**changes):
    sizes = dict(weights=floats(5, 6), rows=floats(5, *CELLS[1:]), sum=floats(*CELLS), begin=False)
    return sizes | changes


def attention(**changes):
    hidden = dict(pooled=floats(2, 8), fc1_weight=floats(16, 8), fc1_bias=None)
    norm = dict(mean=floats(16), variance=floats(16).exp(), norm_weight=floats(16))
    output = dict(norm_bias=floats(16), norm_eps=1e-5, fc2_weight=floats(21, 16))
    return hidden | norm | output | dict(fc2_bias=floats(21), mixtures=3, eps=1e-3) | changes


def to_learn(norm='batch', **changes):
    given = attention(**dict.fromkeys(('mean', 'variance')) if norm == 'layer' else {})
    del given['mixtures']
    start = dict(assigned=torch.tensor([0, 6, 2]), temperature=0.3, batches=torch.tensor(3))
    return given | start | dict(norm=norm, momentum=0.1) | changes


def from_learning(norm='batch', **changes):
    """The operands of attend_backward."""
    names = ('pooled', 'fc1_weight', 'norm_weight', 'fc2_weight', 'norm', 'temperature', 'eps')
    given = {name: to_learn(norm)[name] for name in names}
    inverses = floats(2 if norm == 'layer' else 16).exp()
    saved = dict(hidden=floats(2, 16), normed=floats(2, 16), inverses=inverses, z=floats(2, 21))
    return given | dict(grad=floats(2, 3, 6)) | saved | changes


def image(x=None, grid=GRID, cells=None, **changes):
    x = floats(1, 8, 7, 6) if x is None else x
    cells = floats(*CELLS) if cells is None else cells
    attending = attention(fc2_weight=floats(MIXTURES * 7, 16), fc2_bias=floats(MIXTURES * 7))
    del attending['pooled']
    settings = dict(stride=[1, 2], padding=[1, 1], dilation=[1, 1], groups=1)
    operands = dict(attending, mixtures=MIXTURES, cells=cells, grid=grid, bias=floats(8))
    return dict(x=x, seen=x) | operands | settings | changes


def tokens():
    settings = dict(stride=[], padding=[], dilation=[], bias=floats(9))
    return image(floats(1, 5, 8), (1, 9, 2), floats(6, 1, 4, 1), **settings)


def applying(x=None, kernel=(6, 4, 3, 3), **changes):
    """The operands of apply_kernels."""
    x = floats(2, 8, 7, 6) if x is None else x
    settings = dict(stride=[1, 2], padding=[1, 0], dilation=[1, 1], groups=2)
    kernels = floats(x.shape[0], *kernel)
    return dict(x=x, kernels=kernels, bias=floats(kernel[0])) | settings | changes


def of_tokens(**changes):
    settings = dict(stride=[], padding=[], dilation=[], groups=1)
    return applying(floats(2, 5, 7, 8), (6, 8, 1), **settings, **changes)


def pointwise(**changes):
    return applying(kernel=(6, 8, 1, 1), padding=[0, 0], groups=1, **changes)


def to_images(given):
    """The operands of backward_images, by those of apply_kernels."""
    grad = torch.randn_like(ops.apply_kernels(**given))
    return dict(grad=grad) | {key: value for key, value in given.items() if key != 'bias'}


def to_kernels(given):
    """The operands of backward_kernels."""
    operands = to_images(given)
    return dict(operands, kernel=operands.pop('kernels').shape[1:])


CALLS = {
    'mix_cells': ('mix_cells', mixing),
    'mix_cells for no image': ('mix_cells', lambda: mixing(attention=floats(0, MIXTURES, 6))),
    'mix_cells_into': ('mix_cells_into', lambda: dict(**mixing(), kernels=kernels())),
    'mix_cells_into of half': (
        'mix_cells_into',
        lambda: dict(mixing(cells=floats(*CELLS).bfloat16()), kernels=kernels().bfloat16()),
    ),
    'mix_cells_into from integers': (
        'mix_cells_into',
        lambda: dict(mixing(cells=floats(*CELLS).to(torch.int8)), kernels=kernels()),
    ),
    'mix_backward': ('mix_backward', backward),
    'mix_backward of half': (
        'mix_backward',
        lambda: backward(grad_kernels=list(kernels().bfloat16()), kernels=kernels().bfloat16()),
    ),
    'mix_backward and kernels': ('mix_backward', lambda: backward(kernels=kernels())),
    'mix_backward and rows': (
        'mix_backward',
        lambda: backward(rows=floats(2, MIXTURES, *CELLS[1:])),
    ),
    'add_to_cells': ('add_to_cells', addition),
    'add_to_cells at first': ('add_to_cells', lambda: addition(begin=True)),
    'bmm': ('bmm', lambda: dict(a=floats(2, 3, 5), b=floats(2, 5, 7))),
    'bmm of many columns': ('bmm', lambda: dict(a=floats(2, 32, 64), b=floats(2, 64, 1600))),
    'bmm by tiles': ('bmm', lambda: dict(a=floats(2, 3, 5), b=floats(2, 5, 7), by_tiles=True)),
    'average': ('average', lambda: dict(seen=floats(2, 33, 7, 9).bfloat16(), is_tokens=False)),
    'average of float32': ('average', lambda: dict(seen=floats(2, 33, 7, 9), is_tokens=False)),
    'average of a place': ('average', lambda: dict(seen=floats(2, 33), is_tokens=True)),
    'average of tokens': ('average', lambda: dict(seen=floats(2, 33, 7), is_tokens=True)),
    'attend': ('attend', attention),
    'attend of half': (
        'attend',
        lambda: {k: v.bfloat16() if hasattr(v, 'dim') else v for k, v in attention().items()},
    ),
    'attend by own statistics': (
        'attend',
        lambda: attention(mean=None, variance=None, fc1_bias=floats(16)),
    ),
    'attend_to_learn': ('attend_to_learn', to_learn),
    'attend_to_learn by running statistics': ('attend_to_learn', lambda: to_learn('running')),
    'attend_to_learn by own statistics': (
        'attend_to_learn',
        lambda: to_learn('layer', fc1_bias=floats(16)),
    ),
    'attend_backward': ('attend_backward', from_learning),
    'attend_backward by own statistics': ('attend_backward', lambda: from_learning('layer')),
    'apply_kernels': ('apply_kernels', applying),
    'apply_kernels of size one': ('apply_kernels', pointwise),
    'apply_kernels to tokens': ('apply_kernels', of_tokens),
    'apply_kernels of half': (
        'apply_kernels',
        lambda: {k: v.bfloat16() if hasattr(v, 'dim') else v for k, v in applying().items()},
    ),
    'backward_kernels': ('backward_kernels', lambda: to_kernels(applying())),
    'backward_kernels of size one': ('backward_kernels', lambda: to_kernels(pointwise())),
    'backward_kernels of tokens': ('backward_kernels', lambda: to_kernels(of_tokens())),
    'backward_images': ('backward_images', lambda: to_images(applying())),
    'backward_images of size one': ('backward_images', lambda: to_images(pointwise())),
    'backward_images of tokens': ('backward_images', lambda: to_images(of_tokens())),
    'apply_to_image': ('apply_to_image', lambda: image()),
    'apply_to_image with channels last': (
        'apply_to_image',
        lambda: image(floats(1, 8, 7, 6).to(memory_format=torch.channels_last)),
    ),
    'apply_to_image of half': (
        'apply_to_image',
        lambda: {k: v.bfloat16() if hasattr(v, 'dim') else v for k, v in image().items()},
    ),
    'apply_to_image by kernels of size one': (
        'apply_to_image',
        lambda: image(grid=(1, 1, 9, 2), cells=floats(6, 1, 4, 1, 1), bias=None, padding=[0, 0]),
    ),
    'apply_to_image of tokens': ('apply_to_image', lambda: tokens()),
}
if MISSING is None and multiplies_bfloat16(floats(*CELLS)):
    CALLS['pack_cells'] = ('pack_cells', packing)
    CALLS['mix_cells_into from panels'] = (
        'mix_cells_into',
        lambda: dict(mixing(), kernels=kernels().bfloat16(), panels=panels()),
    )
    CALLS['mix_backward from panels'] = (
        'mix_backward',
        lambda: backward(rows=floats(2, MIXTURES, *CELLS[1:]).bfloat16(), panels=panels()),
    )
    CALLS['add_to_cells of half'] = (
        'add_to_cells',
        lambda: addition(rows=floats(5, *CELLS[1:]).bfloat16()),
    )


def test_every_operator_is_checked():
    names = {
        name.split('::')[1] for name in torch._C._dispatch_get_all_op_names() if 'mmkw::' in name
    }
    # The convolution, which needs no compiled kernels, has a test of its own.
    names = {name for name in names if not name.startswith('convolve')}
    # It takes sizes.
    names.remove('is_convolution_faster')
    if not has_bfloat16():
        names.remove('pack_cells')
    assert names == {name for name, _ in CALLS.values()}


# Writing into arguments is nothing to learn from.
WRITING = (
    'mix_cells_into',
    'mix_cells_into of half',
    'mix_backward and kernels',
    'mix_backward of half',
    'mix_backward and rows',
    'attend_to_learn',
    'attend_to_learn by running statistics',
    'mix_cells_into from panels',
    'mix_backward from panels',
)
LEARNING = [
    call
    for call in CALLS
    if call not in WRITING and not call.startswith(('add_to_cells', 'pack_cells'))
]


@pytest.mark.parametrize('call', CALLS)
def test_constants_are_what_their_registration_says(call):
    """Schema, shapes without values, and ``torch.compile`` with sizes unknown."""
    name, arguments = CALLS[call]
    torch.library.opcheck(getattr(ops, name).default, (), arguments())


@pytest.mark.parametrize('call', LEARNING)
def test_gradients_are_what_their_registration_says(call):
    """The same, and that there is a gradient or an error."""
    name, arguments = CALLS[call]
    given = arguments()
    learning = next(name for name in ('attention', 'pooled', 'seen', 'a', 'x') if name in given)
    given[learning].requires_grad_()
    checks = ['test_schema', 'test_autograd_registration', 'test_faketensor']
    if name == 'mix_cells':
        checks.append('test_aot_dispatch_dynamic')
    torch.library.opcheck(getattr(ops, name).default, (), given, test_utils=checks)


def test_what_has_no_gradient_says_so():
    for name, arguments, learning in (
        ('attend', attention(), 'pooled'),
        ('attend_to_learn', to_learn('layer'), 'pooled'),
        ('attend_backward', from_learning(), 'grad'),
        ('apply_kernels', applying(), 'kernels'),
        ('backward_kernels', to_kernels(applying()), 'x'),
        ('backward_images', to_images(applying()), 'grad'),
        ('apply_to_image', image(), 'seen'),
        ('mix_backward', backward(), 'attention'),
        ('bmm', dict(a=floats(2, 3, 5), b=floats(2, 5, 7)), 'b'),
    ):
        arguments[learning].requires_grad_()
        result = getattr(ops, name)(**arguments)
        result = result if torch.is_tensor(result) else result[0]
        with pytest.raises(RuntimeError, match=f'{name} is not implemented'):
            result.sum().backward()


# Whether channels lie last, and what is averaged, of so many images as `of` makes: many places,
# channels that fill no vectors, one place, tokens, and what lies in no order.
SEEN = {
    'maps': (False, lambda of: of(8, 300, 301)),
    'maps of a few places': (False, lambda of: of(64, 3, 5)),
    'pixels': (False, lambda of: of(64, 300, 40).to(memory_format=torch.channels_last)),
    'pixels of a few channels': (
        False,
        lambda of: of(5, 30, 40).to(memory_format=torch.channels_last),
    ),
    'maps with gaps': (False, lambda of: of(64, 8, 18)[..., ::2]),
    'voxels': (False, lambda of: of(32, 9, 10, 11)),
    'voxels with channels last': (
        False,
        lambda of: of(32, 9, 10, 11).to(memory_format=torch.channels_last_3d),
    ),
    'a map of one place': (False, lambda of: of(70, 1, 1)),
    'maps of a part': (False, lambda of: of(13, 32, 32)),
    'maps of a part and a place': (False, lambda of: of(13, 1025)),
    'the second of two images': (
        False,
        lambda of: torch.cat([of(33, 7, 9), of(33, 7, 9)])[-len(of(1)) :],
    ),
    'some of the channels': (False, lambda of: of(70, 7, 9)[:, 3:]),
    'a place': (True, lambda of: of(64)),
    'tokens': (True, lambda of: of(70, 96)),
    'tokens of a few channels': (True, lambda of: of(7, 9, 6)),
    'tokens in turns': (True, lambda of: of(32, 70).mT),
}


def images(batch, dtype):
    """What makes so many images of a shape, of values around 1."""
    return lambda *shape: (floats(batch, *shape) / 8 + 1).to(dtype)


@pytest.mark.parametrize('case', SEEN)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('batch', [1, 3])
def test_images_are_averaged_as_in_float64(batch, dtype, case):
    is_tokens, make = SEEN[case]
    seen = make(images(batch, dtype))
    space = range(1, seen.dim() - 1) if is_tokens else range(2, seen.dim())
    right = seen.double().mean(tuple(space)) if space else seen.double()
    found = ops.average(seen, is_tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), right, atol=0, rtol=1e-6)


@pytest.mark.parametrize('dtype', [torch.float16, torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 5)])
def test_averages_are_as_the_mean_of_pytorch(shape, dtype):
    seen = floats(*shape).to(dtype)
    right = seen.mean((2, 3), dtype=torch.float32)
    torch.testing.assert_close(ops.average(seen, False), right, equal_nan=True)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_averages_of_images_are_no_copies_and_no_sums_of_pytorch(memory_format, dtype):
    seen = floats(2, 64, 14, 14).to(dtype).contiguous(memory_format=memory_format)
    with torch.profiler.profile() as profile:
        ops.average(seen, False)
    found = {event.key for event in profile.key_averages()}
    assert 'mmkw::average' in found and not found & {'aten::mean', 'aten::sum', 'aten::copy_'}


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_sums_of_many_places_lose_nothing(memory_format):
    """One after the other in float32, values of one sign would lose a thousandth."""
    seen = torch.full((2, 32, 512, 384), 0.7).bfloat16().contiguous(memory_format=memory_format)
    right = torch.full((2, 32), float(seen[0, 0, 0, 0]))
    torch.testing.assert_close(ops.average(seen, False), right, atol=0, rtol=1e-6)


@pytest.mark.parametrize('case', SEEN)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_one_image_is_attended_to_as_in_float64(case, dtype):
    """A kernel of size one is read out by an image of one."""
    is_tokens, make = SEEN[case]
    seen = make(images(1, dtype))
    channels = seen.shape[-1 if is_tokens else 1]
    given = attention(
        pooled=None,
        fc1_weight=floats(16, channels),
        fc1_bias=floats(16),
        fc2_weight=floats(7, 16),
        fc2_bias=floats(7),
        mixtures=1,
    )
    given = {key: v.to(dtype) if hasattr(v, 'dim') else v for key, v in given.items()}
    cells = floats(6, 5).to(dtype)
    # Space is all but the first dimension and the channels'.
    space = [dim for dim in range(1, seen.dim()) if dim != (seen.dim() - 1 if is_tokens else 1)]
    pooled = seen.double().mean(space) if space else seen.double()
    precise = {key: v.double() if hasattr(v, 'dim') else v for key, v in given.items()}
    hidden = pooled @ precise['fc1_weight'].T + precise['fc1_bias']
    scale = precise['norm_weight'] / (precise['variance'] + given['norm_eps']).sqrt()
    hidden = ((hidden - precise['mean']) * scale + precise['norm_bias']).relu()
    z = hidden @ precise['fc2_weight'].T + precise['fc2_bias']
    alpha = (z / (z.abs().sum(1, keepdim=True) + given['eps']))[:, :-1]
    right = alpha @ cells.double()

    del given['pooled']
    # Kernels of linear maps have one place.
    x, dims, taps = (torch.ones(1, 1), 0, 1) if is_tokens else (torch.ones(1, 1, 1, 1), 2, 2)
    found = ops.apply_to_image(
        x=x.to(dtype),
        seen=seen,
        **given,
        cells=cells.view(6, 5, 1, *[1] * taps),
        grid=[1] * (2 + taps),
        bias=None,
        stride=[1] * dims,
        padding=[0] * dims,
        dilation=[1] * dims,
        groups=1,
    )
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(found.double().view(1, 5), right, atol=tolerance, rtol=tolerance)


def test_attentions_of_one_image_are_read_as_they_lie():
    warehouse, gradient = floats(*CELLS), floats(8, 8, 3, 3)
    for attention in (floats(1, 6, MIXTURES).mT, floats(1, 1, 6).expand(1, MIXTURES, 6)):
        results = []
        for values in (attention, attention.contiguous()):
            mixed, rows = kernels(1), floats(1, MIXTURES, *CELLS[1:])
            found = ops.mix_backward([gradient], values, warehouse, GRID, mixed, rows)
            results.append([ops.mix_cells(values, warehouse, GRID), found, mixed, rows])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


# Batch, rows, terms and columns; columns that fill tiles or not, fewer of them than rows, many
# terms, and as many images as threads or more.
PRODUCTS = [
    (1, 1, 1, 1),
    (1, 5, 3, 2000),
    (2, 64, 200, 1536),
    (2, 13, 200, 1600),
    (3, 40, 250, 1601),
    (8, 50, 7, 1664),
    (2, 300, 60, 49),
    (1, 2000, 3, 5),
    (3, 129, 250, 1),
]


@pytest.mark.parametrize('by_tiles', [True, False, None])
@pytest.mark.parametrize('batch, m, k, n', PRODUCTS)
def test_products_are_as_in_float64(batch, m, k, n, by_tiles):
    a, b = floats(batch, m, k), floats(batch, k, n)
    right = a.double() @ b.double()
    # And transposed in memory, as the kernels of a backward pass are.
    for left in (a, a.mT.contiguous().mT):
        for below in (b, b.mT.contiguous().mT):
            with torch.inference_mode():
                found = ops.bmm(left, below, by_tiles)
            torch.testing.assert_close(found.double(), right, atol=2e-4, rtol=1e-4)
            if by_tiles:
                alone = ops.bmm(left[:1], below[:1], True)
                assert torch.equal(alone, found[:1]), 'an image is the same in every batch'


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('batch', [1, 3, 8])
@pytest.mark.parametrize('grid, cell', [((3, 3, 2, 1), (20, 12, 1, 1)), ((1, 2, 3), (5, 7, 3))])
def test_cells_may_lie_in_any_order(grid, cell, batch, dtype):
    """As where the values of all cells at one place lie together."""
    cells, attention = floats(30, *cell), floats(batch, torch.Size(grid).numel(), 30)
    turned = cells.movedim(0, -1).contiguous().movedim(-1, 0)
    exact = attention.double().requires_grad_()
    right = mix_cells(exact, cells.double(), grid)
    gradients = floats(*right.shape)
    (right_attention,) = torch.autograd.grad(right, exact, gradients.double())
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for laid in (cells, turned):
        mixed = torch.empty(right.shape, dtype=dtype)
        ops.mix_cells_into(attention, laid, grid, mixed)
        torch.testing.assert_close(mixed.double(), right, atol=tolerance, rtol=tolerance)
        found = ops.mix_backward(list(gradients), attention, laid, grid, None, None)
        torch.testing.assert_close(found.double(), right_attention, atol=1e-3, rtol=1e-4)


def test_products_of_nothing():
    for shapes in (
        ((0, 3, 5), (0, 5, 1600)),
        ((0, 80, 256), (0, 256, 20000)),
        ((2, 0, 5), (2, 5, 1600)),
        ((2, 3, 0), (2, 0, 1600)),
    ):
        a, b = (floats(*shape) for shape in shapes)
        assert torch.equal(ops.bmm(a, b), a @ b)


def test_products_are_chosen_whatever_precision_pytorch_is_set_to():
    """The measurement is the first of a process, and has a precision of its own."""
    code = """
import torch, mmkw.ops
a, b = torch.ones(1, 64, 128), torch.ones(1, 128, 1600)
torch.set_default_dtype(torch.float64)
with torch.autocast('cpu', torch.bfloat16):
    c = torch.ops.mmkw.bmm(a, b)
assert c.dtype == torch.float32 and bool((c == 128).all())
"""
    subprocess.run([sys.executable, '-c', code], check=True)


def test_products_where_all_runs_must_compute_the_same_bits():
    a, b = floats(2, 33, 500), floats(2, 500, 1700)
    try:
        torch.use_deterministic_algorithms(True)
        assert torch.equal(ops.bmm(a, b), torch.bmm(a, b))
    finally:
        torch.use_deterministic_algorithms(False)


def test_mix_cells_has_the_gradient_of_its_definition():
    given = mixing()
    operands = [given[name].requires_grad_() for name in ('attention', 'cells')]
    results = []
    for mix in (ops.mix_cells, mix_cells):
        mixed = mix(*operands, GRID)
        results.append([mixed, *torch.autograd.grad(mixed.square().sum(), operands)])
    for found, right in zip(*results, strict=True):
        torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)


def test_operations_are_counted():
    """Two for every multiplication of the products that the definitions name."""
    from torch.utils.flop_counter import FlopCounterMode

    mixed = 2 * 2 * MIXTURES * torch.Size(CELLS).numel()
    expected = dict.fromkeys(('mix_cells', 'mix_cells_into', 'mix_backward'), mixed)
    expected['mix_backward and kernels'] = 2 * mixed
    expected['add_to_cells'] = 2 * 5 * torch.Size(CELLS).numel()
    expected['bmm'] = 2 * 2 * 3 * 5 * 7
    attended = 2 * 2 * (16 * 8 + 21 * 16)
    expected |= dict(attend=attended, attend_to_learn=attended, attend_backward=2 * attended)
    for call, flops in expected.items():
        name, arguments = CALLS[call]
        with FlopCounterMode(display=False) as counter:
            getattr(ops, name)(**arguments())
        assert counter.get_total_flops() == flops, call


WRONG = {
    'an average of nothing': ('average', lambda: dict(seen=floats(), is_tokens=False)),
    'an average of a vector': ('average', lambda: dict(seen=floats(7), is_tokens=True)),
    'no grid': ('mix_cells', lambda: mixing(grid=[])),
    'a short grid': ('mix_cells', lambda: mixing(grid=[3, 3, 2])),
    'a grid of nothing': ('mix_cells', lambda: mixing(grid=[3, 3, 0, 2])),
    'a negative grid': ('mix_cells', lambda: mixing(grid=[-3, -3, 1, 2])),
    'no cells': ('mix_cells', lambda: mixing(cells=floats(0, 8, 4, 1, 1))),
    'other cells': ('mix_cells', lambda: mixing(cells=floats(7, *CELLS[1:]))),
    'cells of two dimensions': ('mix_cells', lambda: mixing(cells=floats(6, 32))),
    'a cell between one place and all': (
        'mix_cells',
        lambda: mixing(cells=floats(6, 8, 4, 2, 2)),
    ),
    'an attention for one image': ('mix_cells', lambda: mixing(attention=floats(MIXTURES, 6))),
    'a scalar': ('mix_cells', lambda: mixing(attention=floats())),
    'too few mixtures': ('mix_cells', lambda: mixing(attention=floats(2, 17, 6))),
    'a double attention': ('mix_cells', lambda: mixing(attention=floats(2, MIXTURES, 6).double())),
    'double cells': ('mix_cells', lambda: mixing(cells=floats(*CELLS).double())),
    'kernels of one image': ('mix_cells_into', lambda: dict(**mixing(), kernels=kernels(1))),
    'kernels of as many values': (
        'mix_cells_into',
        lambda: dict(**mixing(), kernels=floats(2, 8, 8, 9)),
    ),
    'kernels transposed': (
        'mix_cells_into',
        lambda: dict(**mixing(), kernels=kernels().transpose(1, 2)),
    ),
    'half kernels': ('mix_cells_into', lambda: dict(**mixing(), kernels=kernels().half())),
    'too few gradients': ('mix_backward', lambda: backward(grad_kernels=list(kernels(1)))),
    'small gradients': (
        'mix_backward',
        lambda: backward(grad_kernels=list(floats(2, 8, 8, 2, 2))),
    ),
    'gradients of as many values': (
        'mix_backward',
        lambda: backward(grad_kernels=list(floats(2, 8, 8, 9))),
    ),
    'double gradients': ('mix_backward', lambda: backward(grad_kernels=list(kernels().double()))),
    'integers that give integers': (
        'mix_cells',
        lambda: mixing(cells=floats(*CELLS).to(torch.int8)),
    ),
    'integers that learn': (
        'mix_backward',
        lambda: backward(cells=floats(*CELLS).to(torch.int8)),
    ),
    'cells of half that learn': ('mix_backward', lambda: backward(cells=floats(*CELLS).bfloat16())),
    'rows of half without panels': (
        'mix_backward',
        lambda: backward(rows=floats(2, MIXTURES, *CELLS[1:]).bfloat16()),
    ),
    'full rows and panels': (
        'mix_backward',
        lambda: backward(rows=floats(2, MIXTURES, *CELLS[1:]), panels=panels()),
    ),
    'full kernels and panels': (
        'mix_backward',
        lambda: backward(kernels=kernels(), panels=panels()),
    ),
    'panels of other cells': ('pack_cells', lambda: packing(panels=panels(1, 7, 96))),
    'too few panels': ('pack_cells', lambda: packing(cells=floats(6, 8, 16, 1, 1))),
    'narrow panels': ('pack_cells', lambda: packing(panels=panels(1, 6, 64))),
    'panels without columns': ('pack_cells', lambda: packing(panels=panels(1, 6, 32))),
    'panels of two dimensions': ('pack_cells', lambda: packing(panels=panels(6, 96))),
    'full panels': ('pack_cells', lambda: packing(panels=panels(dtype=torch.float32))),
    'transposed panels': ('pack_cells', lambda: packing(panels=panels(1, 96, 6).transpose(1, 2))),
    'cells of other sizes than vectors': (
        'pack_cells',
        lambda: packing(cells=floats(6, 3, 4, 1, 1)),
    ),
    'double cells to pack': ('pack_cells', lambda: packing(cells=floats(*CELLS).double())),
    'no cells to pack': ('pack_cells', lambda: packing(cells=floats(0, 8, 4, 1, 1))),
    'panels that do not fit': (
        'mix_cells_into',
        lambda: dict(mixing(), kernels=kernels().bfloat16(), panels=panels(1, 5, 96)),
    ),
    'full kernels from panels': (
        'mix_cells_into',
        lambda: dict(mixing(), kernels=kernels(), panels=panels()),
    ),
    'panels for integers': (
        'mix_cells_into',
        lambda: dict(
            mixing(cells=floats(*CELLS).to(torch.int8)),
            kernels=kernels().bfloat16(),
            panels=panels(),
        ),
    ),
    'half rows of other sizes than vectors': (
        'add_to_cells',
        lambda: addition(rows=floats(5, 3, 4, 1, 1).bfloat16(), sum=floats(6, 3, 4, 1, 1)),
    ),
    'small rows': ('mix_backward', lambda: backward(rows=floats(2, 9, *CELLS[1:]))),
    'rows of as many values': (
        'mix_backward',
        lambda: backward(rows=floats(1, 2 * MIXTURES, *CELLS[1:])),
    ),
    'strided rows': (
        'mix_backward',
        lambda: backward(rows=floats(2, MIXTURES, 4, 8, 1, 1).transpose(2, 3)),
    ),
    'small kernels': ('mix_backward', lambda: backward(kernels=kernels(1))),
    'a sum of no cells': (
        'add_to_cells',
        lambda: addition(weights=floats(5, 0), sum=floats(0, *CELLS[1:])),
    ),
    'a sum of empty cells': (
        'add_to_cells',
        lambda: addition(rows=floats(5, 0, 4, 1, 1), sum=floats(6, 0, 4, 1, 1)),
    ),
    'a scalar sum': ('add_to_cells', lambda: addition(sum=floats())),
    'other weights': ('add_to_cells', lambda: addition(weights=floats(4, 6))),
    'other rows': ('add_to_cells', lambda: addition(rows=floats(5, 8, 5, 1, 1))),
    'a strided sum': ('add_to_cells', lambda: addition(sum=floats(6, 4, 8, 1, 1).transpose(1, 2))),
    'a product of other sizes': ('bmm', lambda: dict(a=floats(2, 3, 4), b=floats(2, 5, 7))),
    'a product of other batches': (
        'bmm',
        lambda: dict(a=floats(1, 3, 5), b=floats(2, 5, 7), by_tiles=True),
    ),
    'a product of matrices': ('bmm', lambda: dict(a=floats(3, 5), b=floats(5, 7), by_tiles=True)),
    'a product of nothing by tiles': (
        'bmm',
        lambda: dict(a=floats(2, 3, 0), b=floats(2, 0, 7), by_tiles=True),
    ),
    'a double product by tiles': (
        'bmm',
        lambda: dict(a=floats(2, 3, 5).double(), b=floats(2, 5, 7).double(), by_tiles=True),
    ),
    'kernels of other images': (
        'apply_kernels',
        lambda: applying(kernels=floats(3, 6, 4, 3, 3)),
    ),
    'no images': (
        'apply_kernels',
        lambda: applying(floats(0, 8, 7, 6)),
    ),
    'kernels of other channels': ('apply_kernels', lambda: applying(kernel=(6, 5, 3, 3))),
    'groups that do not divide': ('apply_kernels', lambda: applying(kernel=(5, 4, 3, 3))),
    'no groups': ('apply_kernels', lambda: applying(groups=0)),
    'kernels of a volume': ('apply_kernels', lambda: applying(kernel=(6, 4, 3, 3, 3))),
    'a stride of one number': ('apply_kernels', lambda: applying(stride=[1])),
    'no step': ('apply_kernels', lambda: applying(stride=[1, 0])),
    'no step of size one': ('apply_kernels', lambda: pointwise() | dict(stride=[0, 1])),
    'images smaller than kernels': ('apply_kernels', lambda: applying(floats(2, 8, 1, 1))),
    'double kernels': ('apply_kernels', lambda: applying(kernels=floats(2, 6, 4, 3, 3).double())),
    'double images': (
        'apply_kernels',
        lambda: applying(floats(2, 8, 7, 6).double(), kernels=floats(2, 6, 4, 3, 3).double()),
    ),
    'a bias of one number': ('apply_kernels', lambda: pointwise() | dict(bias=floats(1))),
    'a double bias': ('apply_kernels', lambda: pointwise() | dict(bias=floats(6).double())),
    'products of large kernels': ('apply_kernels', lambda: applying(way='products')),
    'groups of kernels of size one': ('apply_kernels', lambda: pointwise(way='groups')),
    'an unknown way': ('apply_kernels', lambda: applying(way='best')),
    'features of other kernels': ('apply_kernels', lambda: of_tokens(kernels=floats(2, 6, 7, 1))),
    'a place without features': (
        'apply_kernels',
        lambda: of_tokens() | dict(x=floats(2)),
    ),
    'gradients of kernels of another result': (
        'backward_kernels',
        lambda: to_kernels(applying()) | dict(grad=floats(2, 6, 7, 3)),
    ),
    'gradients of images of another result': (
        'backward_images',
        lambda: to_images(applying()) | dict(grad=floats(2, 6, 6, 2)),
    ),
    'gradients of more pixels': (
        'backward_images',
        lambda: to_images(pointwise()) | dict(grad=floats(2, 6, 7, 4)),
    ),
    'gradients of fewer tokens': (
        'backward_kernels',
        lambda: to_kernels(of_tokens()) | dict(grad=floats(2, 5, 6, 6)),
    ),
    'double gradients of images': (
        'backward_images',
        lambda: (given := to_images(applying())) | dict(grad=given['grad'].double()),
    ),
    'no mixtures': ('attend', lambda: attention(mixtures=0)),
    'negative mixtures': ('attend', lambda: attention(mixtures=-3)),
    'mixtures that do not divide': ('attend', lambda: attention(mixtures=4)),
    'no logits': ('attend', lambda: attention(fc2_weight=floats(0, 16), fc2_bias=floats(0))),
    'other hidden units': ('attend', lambda: attention(fc2_weight=floats(21, 15))),
    'a small norm': ('attend', lambda: attention(norm_weight=floats(15))),
    'small statistics': ('attend', lambda: attention(variance=floats(4))),
    'one statistic': ('attend', lambda: attention(variance=None)),
    'a small bias': ('attend', lambda: attention(fc2_bias=floats(20))),
    'maps': ('attend', lambda: attention(pooled=floats(2, 8, 1))),
    'an unknown norm': ('attend_to_learn', lambda: to_learn(norm='group')),
    'statistics of images': ('attend_to_learn', lambda: to_learn(norm='layer', mean=floats(16))),
    'no running statistics': ('attend_to_learn', lambda: to_learn(mean=None)),
    'small running statistics': ('attend_to_learn', lambda: to_learn(variance=floats(4))),
    'running statistics of half': (
        'attend_to_learn',
        lambda: to_learn(mean=floats(16).bfloat16()),
    ),
    'batches that are no number': (
        'attend_to_learn',
        lambda: to_learn(batches=torch.tensor([3, 4])),
    ),
    'the variance of one image': ('attend_to_learn', lambda: to_learn(pooled=floats(1, 8))),
    'other mixtures': ('attend_to_learn', lambda: to_learn(assigned=torch.tensor([0, 1]))),
    'cells that are no numbers': ('attend_to_learn', lambda: to_learn(assigned=floats(3))),
    'half to learn': ('attend_to_learn', lambda: to_learn(pooled=floats(2, 8).bfloat16())),
    'a small last bias': ('attend_to_learn', lambda: to_learn(fc2_bias=floats(20))),
    'gradients of other cells': ('attend_backward', lambda: from_learning(grad=floats(2, 3, 7))),
    'a gradient of two dimensions': ('attend_backward', lambda: from_learning(grad=floats(2, 18))),
    'other deviations': ('attend_backward', lambda: from_learning(inverses=floats(2))),
    'a double weight': ('attend', lambda: attention(fc1_weight=floats(16, 8).double())),
}


@pytest.mark.parametrize('wrong', WRONG)
def test_wrong_calls_are_refused_and_change_nothing(wrong):
    name, arguments = WRONG[wrong]
    given = arguments()
    written = [
        given[key]
        for key in ('kernels', 'rows', 'sum', 'panels', 'mean', 'variance', 'batches')
        if given.get(key) is not None
    ]
    before = [tensor.clone() for tensor in written]
    with pytest.raises(RuntimeError):
        getattr(ops, name)(**given)
    assert all(map(torch.equal, written, before))


def test_a_sum_of_nothing_is_zero():
    for begin in (True, False):
        given = addition(weights=floats(0, 6), rows=floats(0, *CELLS[1:]), begin=begin)
        before = given['sum'].clone()
        ops.add_to_cells(**given)
        assert torch.equal(given['sum'], torch.zeros_like(before) if begin else before)


def test_as_many_kernels_and_attentions_as_images():
    x, conv = floats(2, 8, 5, 5), SampleConv((1, 1), (1, 1), (1, 1))
    with pytest.raises(ValueError, match='2 images have 3 kernels'):
        ops.convolve(x, kernels(3), (1, 1), (1, 1), (1, 1), 1)
    for batch in (1, 3):
        with pytest.raises(ValueError, match=f'2 images have {batch} attentions'):
            apply_mixed(x, floats(batch, MIXTURES, 6), floats(*CELLS), GRID, conv)


sizes = st.integers(0, 5)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    attention_shape=st.lists(sizes, max_size=4),
    cells_shape=st.lists(sizes, max_size=6),
    grid=st.lists(st.integers(-1, 3), max_size=5),
)
def test_random_calls_are_right_or_refused(attention_shape, cells_shape, grid):
    attention, cells = floats(*attention_shape), floats(*cells_shape)
    try:
        mixed = ops.mix_cells(attention, cells, grid)
    except RuntimeError:
        return
    torch.testing.assert_close(mixed, mix_cells(attention, cells, grid), atol=1e-5, rtol=1e-4)
    rows = cells.new_empty(*attention.shape[:2], *cells.shape[1:])
    cut_kernels([mixed], grid, rows)
    found = ops.mix_backward(list(mixed), attention, cells, grid, None, None)
    expected = rows.flatten(0, 1).flatten(1) @ cells.flatten(1).t()
    torch.testing.assert_close(found, expected.view_as(found), atol=1e-4, rtol=1e-4)


def test_sums_of_many_threads_take_little_memory():
    """Each of them adds up columns of its own; what they add up has to be kept apart."""
    attention, cells = floats(16, 9, 376), floats(376, 256, 128, 1, 1)
    gradients = list(floats(16, 256, 128, 3, 3))
    before = torch.get_num_threads()
    torch.set_num_threads(128)
    try:
        with torch.profiler.profile(profile_memory=True) as profile:
            ops.mix_backward(gradients, attention, cells, (3, 3, 1, 1), None, None)
    finally:
        torch.set_num_threads(before)
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    sums = 4 * attention.numel()
    # One sum for a thread, or 32 MB; and the result.
    assert sums < taken <= max(128 * sums, 32 << 20) + 2 * sums


def test_compiled_kernels_can_be_switched_off(monkeypatch):
    assert backend.why_not_compiled() is None
    monkeypatch.setattr(backend, '_switched_on', True)
    backend.use_compiled(False)
    assert 'MMKW_COMPILED' in backend.why_not_compiled()
    assert not backend.is_compiled(floats(1))
