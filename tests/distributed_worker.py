"""What each process of the distributed test runs."""

import os

import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel

from mmkw.backbones import KWResNet


def make_network(with_cp, tau):
    """The same thin network in every process."""
    from mmkw.layers import set_temperature

    torch.manual_seed(0)
    network = KWResNet(
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


def work(rank, port, path, with_cp, tau):
    """Takes a step on this process's image; process 0 saves the averaged gradients."""
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=2)
    network = MMDistributedDataParallel(make_network(with_cp, tau), broadcast_buffers=False)
    for _ in range(2):
        # DDP reports parameters that took no part in a step at the start of the next.
        network.zero_grad()
        loss_of(network, images()[rank : rank + 1]).backward()
    if rank == 0:
        torch.save(gradients(network), path)
    dist.barrier()
    # Without taking the process group apart: torch does so holding the interpreter's lock, for
    # which the group's own thread may be waiting to let go of the barrier.
    os._exit(0)
