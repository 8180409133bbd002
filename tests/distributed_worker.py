"""What each process of the distributed test runs."""

import functools
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import mmkw
from mmkw import SharingPlan, convert


class Chain(nn.Module):
    """A network whose dynamic twin shares a warehouse."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.b(self.a(self.a(x).tanh()).tanh())


def make_network(with_cp, tau):
    """The same thin network in every process."""
    from mmkw.layers import set_temperature

    torch.manual_seed(0)
    network = mmkw.KWResNet(
        18, base_channels=8, norm_eval=True, frozen_stages=1, cell_num_ratio=2, with_cp=with_cp
    )
    set_temperature(network, tau)
    network.train()
    return network


def images():
    """Two images, one for each process."""
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def loss_of(network, x):
    """A loss that is a mean over images."""
    return sum(out.square().mean() for out in network(x))


def gradients(network):
    """Gradients by name, without DDP's prefix."""
    return {
        name.removeprefix('module.'): p.grad.clone()
        for name, p in network.named_parameters()
        if p.requires_grad
    }


def sharded(kind, network):
    """The network as FSDP has it."""
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

    from mmkw.layers import WarehouseManager

    if kind.startswith('FSDP'):
        policy = None
        if kind == 'FSDP, parts by size':
            policy = functools.partial(
                size_based_auto_wrap_policy,
                min_num_params=200,
                force_leaf_modules={WarehouseManager},
                exclude_wrap_modules={WarehouseManager, nn.ModuleList, nn.ModuleDict},
            )
        elif kind == 'FSDP, warehouse too':
            policy = functools.partial(size_based_auto_wrap_policy, min_num_params=200)
        device = torch.device('cpu')
        return fsdp.FullyShardedDataParallel(
            network, auto_wrap_policy=policy, device_id=device, use_orig_params=True
        )
    mesh = init_device_mesh('cpu', (2,))
    parts = {'fully_shard, layers': [network[0].a, network[0].b, network[1]]}
    if hasattr(network[0], 'warehouse_manager'):
        parts['fully_shard, warehouse too'] = [network[0].warehouse_manager]
    for part in parts.get(kind, ()):
        fsdp.fully_shard(part, mesh=mesh)
    return fsdp.fully_shard(network, mesh=mesh)


SHARDED = ['FSDP', 'FSDP, parts by size', 'fully_shard', 'fully_shard, layers']
REFUSED = ['FSDP, warehouse too', 'fully_shard, warehouse too']


def work_sharded(rank, port, path):
    """Losses of three steps, by kind of network and of wrapping; process 0 saves them."""
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    x = torch.randn(2, 2, 8, 6, 6, generator=torch.Generator().manual_seed(1))[rank]
    found = {}
    for kind in ['DDP', *SHARDED, *REFUSED]:
        for dynamic in (False, True):
            torch.manual_seed(0)
            network = nn.Sequential(Chain(), nn.Conv2d(8, 8, 3))
            if dynamic:
                plan = SharingPlan.make([('a', 'one'), ('b', 'one')], cell_num_ratio=2)
                network[0] = convert(network[0], plan, dict(type='LN'))
            try:
                wrapped = DDP(network) if kind == 'DDP' else sharded(kind, network)
                optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
                losses = []
                for _ in range(3):
                    optimizer.zero_grad()
                    loss = wrapped(x).square().mean()
                    loss.backward()
                    optimizer.step()
                    dist.all_reduce(loss.detach())
                    losses.append(loss.item())
                found[kind, dynamic] = losses
            except RuntimeError as error:
                found[kind, dynamic] = str(error)
    if rank == 0:
        torch.save(found, path)
    dist.barrier()
    os._exit(0)


def work(rank, port, path, ways):
    """Takes steps on this process's image; process 0 saves the averaged gradients of each way."""
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    from mmengine.model import MMDistributedDataParallel

    averaged = {}
    for with_cp, tau in ways:
        network = MMDistributedDataParallel(make_network(with_cp, tau), broadcast_buffers=False)
        for _ in range(2):
            # DDP reports parameters that took no part in a step at the start of the next.
            network.zero_grad()
            loss_of(network, images()[rank : rank + 1]).backward()
        averaged[with_cp, tau] = gradients(network)
    if rank == 0:
        torch.save(averaged, path)
    dist.barrier()
    # Without taking the process group apart: torch does so holding the interpreter's lock, for
    # which the group's own thread may be waiting to let go of the barrier.
    os._exit(0)
