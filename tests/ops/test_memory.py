"""Large tensors lie where others lay, and never where one still lies."""

import copy
import io
import threading

import pytest
import torch
from torch import nn

from mmkw import convert
from mmkw.ops import backend, memory
from mmkw.ops.memory import recycled
from mmkw.sharing import pattern_plan

LIKE = torch.empty(0)


class Two(nn.Module):
    """Two layers of one warehouse."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 32, 3), nn.Conv2d(32, 16, 3)

    def forward(self, x):
        return self.b(self.a(x).relu())


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    monkeypatch.setattr(memory, '_MAPPED_BYTES', 1024)
    monkeypatch.setattr(memory, '_of_thread', threading.local())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_memory_is_used_again(dtype):
    first = recycled(LIKE, (3, 400), dtype)
    assert first.shape == (3, 400) and first.dtype == dtype and first.is_contiguous()
    assert first.data_ptr() % 64 == 0
    place = first.data_ptr()
    first.fill_(1)
    other = recycled(LIKE, (3, 400), dtype)
    assert other.data_ptr() != place
    other.fill_(2)
    assert (first == 1).all()
    del first
    # A little smaller fits, much smaller or larger does not.
    assert recycled(LIKE, (3, 380), dtype).data_ptr() == place
    assert recycled(LIKE, (3, 300), dtype).data_ptr() != place
    assert recycled(LIKE, (3, 401), dtype).data_ptr() != place


@pytest.mark.parametrize(
    'share',
    [
        lambda t: t[1],
        lambda t: t.detach(),
        lambda t: t.untyped_storage(),
        lambda t: t.numpy(),
        lambda t: nn.Parameter(t),
    ],
    ids=['view', 'detached', 'storage', 'array', 'parameter'],
)
def test_memory_that_anything_shares_is_not_used_again(share):
    tensor = recycled(LIKE, (3, 400))
    place = tensor.data_ptr()
    shared = share(tensor)
    del tensor
    assert recycled(LIKE, (3, 400)).data_ptr() != place
    del shared
    two = [recycled(LIKE, (3, 400)) for _ in range(2)]
    assert place in {tensor.data_ptr() for tensor in two}


def test_copies_have_memory_of_their_own():
    tensor = recycled(LIKE, (3, 400)).fill_(3)
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    copies = [copy.deepcopy(tensor), torch.load(file, weights_only=True), tensor.clone()]
    place = tensor.data_ptr()
    del tensor
    assert recycled(LIKE, (3, 400)).fill_(4).data_ptr() == place
    for some in copies:
        assert (some == 3).all()


def test_small_tensors_and_other_threads_have_memory_of_their_own():
    assert recycled(LIKE, (3, 4)).shape == (3, 4)
    assert not memory._of_thread.__dict__
    place = recycled(LIKE, (3, 400)).data_ptr()
    found = []
    thread = threading.Thread(target=lambda: found.append(recycled(LIKE, (3, 400))))
    thread.start()
    thread.join()
    assert found[0].data_ptr() != place
    assert recycled(torch.empty(0, device='meta'), (3, 400)).is_meta


def test_memory_without_use_is_freed():
    recycled(LIKE, (3, 400))
    busy = recycled(LIKE, (3, 4000)).fill_(5)
    for _ in range(memory._IDLE_CALLS):
        recycled(LIKE, (3, 40000))
    assert [piece.size for piece in memory._of_thread.pieces] == [48000, 480000]
    assert (busy == 5).all()


@pytest.mark.parametrize('compiled', [True, False], ids=['compiled', 'PyTorch'])
def test_gradients_of_a_step_outlive_the_next(compiled, monkeypatch):
    """Beside the static network, whose gradients nothing overwrites either."""
    monkeypatch.setattr(backend, '_switched_on', compiled)
    torch.manual_seed(0)
    static = Two()
    plan = pattern_plan(static, [{'match': '[ab]', 'warehouse': 'both'}], cell_num_ratio=1)
    dynamic = convert(copy.deepcopy(static), plan)
    for network in (static, dynamic):
        held, places = [], []
        for _ in range(3):
            network(torch.randn(2, 16, 9, 9)).sum().backward()
            gradients = [p.grad for p in network.parameters()]
            held.append((gradients, [g.clone() for g in gradients]))
            network.zero_grad()
        for gradients, expected in held:
            for found, right in zip(gradients, expected, strict=True):
                assert torch.equal(found, right)
        del held, gradients, found
        for _ in range(3):
            network(torch.randn(2, 16, 9, 9)).sum().backward()
            if network is dynamic:
                places += [
                    p.grad.data_ptr()
                    for name, p in network.named_parameters()
                    if 'warehouse' in name and p.grad.nbytes > 1024
                ]
            network.zero_grad()
    # Autograd takes the sum as it is: with a copy nothing would be gained.
    ours = {piece.as_tensor((1,), torch.uint8).data_ptr() for piece in memory._of_thread.pieces}
    assert places and set(places) <= ours
