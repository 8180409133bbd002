"""What PyTorch does not promise and mmkw asks it for: each name does what is expected of it."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mmkw.ops import modes

# Of PyTorch, by an underscore: a module, an attribute of one, or of its modules and operators.
PRIVATE = re.compile(
    r'\btorch(\.\w+)*\._[a-z]\w*|\btorch(\.\w+)*\._C\b|from torch[.\w]* import .*\b_\w+'
    r'|\._(forward|backward)_(pre_)?hooks|\._reversed_padding'
)


def test_private_names_are_in_one_module(root):
    found = {
        path.relative_to(root).as_posix()
        for folder in ('ops', 'layers', 'sharing', 'backbones', 'engine')
        for path in (root / 'mmkw' / folder).rglob('*.py')
        for line in path.read_text().splitlines()
        if PRIVATE.search(line)
    }
    assert found == {'mmkw/ops/modes.py'}


def seen(*tensors):
    return modes.is_seen_through(*tensors)


def test_plain_calls_are_not_seen_through():
    x = torch.randn(2)
    assert not seen(x, nn.Parameter(x))
    with torch.no_grad():
        assert not seen(x)
    with torch.inference_mode():
        assert not seen(torch.randn(2))
    with torch.autocast('cpu'):
        assert not seen(x)
    assert modes.autocast_dtype(x) is None


def test_autocast_is_seen():
    x = torch.randn(2)
    with torch.autocast('cpu', torch.bfloat16):
        assert modes.autocast_dtype(x) == torch.bfloat16
        with torch.autocast('cpu', enabled=False):
            assert modes.autocast_dtype(x) is None
        assert modes.autocast_dtype(x.to('meta')) is None


@pytest.mark.parametrize(
    'transform',
    [
        lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
        lambda f, x: torch.func.vmap(f)(x),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.functionalize(f)(x),
    ],
)
def test_functional_transformations_are_seen(transform):
    found = []

    def function(x):
        found.append((modes.is_transforming(), seen(x)))
        return x * 1

    transform(function, torch.randn(3))
    assert found == [(True, True)]
    assert not modes.is_transforming()


def test_forward_mode_is_seen():
    x = torch.randn(3)
    with torch.autograd.forward_ad.dual_level():
        assert modes.is_transforming() and seen(x)
    assert not modes.is_transforming()


def test_modes_that_see_operators_are_seen():
    x = torch.randn(3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert seen(x)
    with FlopCounterMode(display=False):
        assert seen(x)
    assert not seen(x)


def test_tensors_without_values_and_subclasses_are_seen():
    class Subclass(torch.Tensor):
        pass

    assert seen(torch.empty(3, device='meta'))
    assert seen(torch.randn(3).as_subclass(Subclass))
    with FakeTensorMode():
        fake = torch.empty(3)
    assert seen(fake)


def test_batched_gradients_are_seen():
    found = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            found.append(seen(grad))
            return grad

    x = torch.randn(3, requires_grad=True)
    torch.autograd.grad(Spy.apply(x), x, torch.randn(2, 3), is_grads_batched=True)
    torch.autograd.grad(Spy.apply(x), x, torch.randn(3))
    assert found == [True, False]


def test_tracers_are_seen():
    found = []

    def function(x):
        found.append((modes.is_compiling(), modes.is_exporting()))
        return x * 1

    torch.jit.trace(function, torch.randn(3), check_trace=False)
    assert found == [(False, True)]

    def by_result(x):
        return x * (2 if modes.is_compiling() else 1) * (3 if modes.is_exporting() else 1)

    compiled = torch.compile(by_result, backend='eager', fullgraph=True)
    # Before torch 2.7 the two cannot be told apart, and PyTorch's own operators are taken in both.
    told_apart = hasattr(torch.compiler, 'is_exporting')
    assert compiled(torch.ones(())).item() == (2 if told_apart else 6)

    class Module(nn.Module):
        def forward(self, x):
            return by_result(x)

    exported = torch.export.export(Module(), (torch.ones(2),)).module()
    assert exported(torch.ones(2)).tolist() == [6, 6]


def test_a_backward_pass_has_a_number_and_knows_where_it_goes():
    found = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, other):
            ctx.node = other.grad_fn
            return x.clone(), other.clone()

        @staticmethod
        def backward(ctx, grad, grad_other):
            found.append((modes.backward_pass(), modes.will_run(ctx.node)))
            return grad, grad_other

    x, y = (torch.randn(3, requires_grad=True) for _ in range(2))
    result = sum(Spy.apply(x, y * 2))
    torch.autograd.grad(result.sum(), x, retain_graph=True)
    torch.autograd.grad(result.sum(), (x, y))
    (first, without), (second, whole) = found
    assert first != second and (without, whole) == (False, True)


def test_hooks_are_seen():
    for register in (
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
        nn.Module.register_full_backward_pre_hook,
        lambda _, hook: nn.modules.module.register_module_forward_hook(hook),
        lambda _, hook: nn.modules.module.register_module_forward_pre_hook(hook),
        lambda _, hook: nn.modules.module.register_module_full_backward_hook(hook),
        lambda _, hook: nn.modules.module.register_module_full_backward_pre_hook(hook),
    ):
        module, other = nn.Linear(2, 2), nn.Linear(2, 2)
        assert not modes.is_patched(other, module)
        handle = register(module, lambda *args: None)
        assert modes.is_patched(module) and modes.is_patched(other, module)
        handle.remove()
        assert not modes.is_patched(other, module)


@pytest.mark.parametrize('padding', [0, 2, (1, 3), 'same', 'valid'])
def test_padding_is_as_the_convolution_has_it(padding):
    convolution = nn.Conv2d(2, 2, (3, 4), padding=padding, dilation=2, padding_mode='circular')
    x = torch.randn(1, 2, 9, 9)
    padded = F.pad(x, modes.padding_before(convolution), 'circular')
    alone = F.conv2d(padded, convolution.weight, convolution.bias, dilation=2)
    torch.testing.assert_close(alone, convolution(x))


def test_a_reshaped_temporary_may_be_changed_in_place():
    class Reshape(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return modes.reshaped(x * 2, (6,))

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad.view(2, 3)

    x = torch.randn(2, 3, requires_grad=True)
    Reshape.apply(x).relu_().sum().backward()
    torch.testing.assert_close(x.grad, 2 * (x > 0).float())


def test_shards_are_seen():
    from torch.distributed.tensor import DTensor

    # Its own attribute is what tells it from a whole tensor; tests/test_train.py has real ones.
    assert hasattr(DTensor, 'device_mesh') and not hasattr(torch.Tensor, 'device_mesh')
    assert modes.is_sharded(torch.randn(8)) and not modes.is_sharded(torch.randn(2, 2, 2, 1, 1))
