"""A script as users have them: data parallel training, told on the command line over which backend."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


def main(backend):
    dist.init_process_group(backend)
    torch.manual_seed(0)
    inputs = torch.randn(512, 10)
    targets = inputs @ torch.randn(10, 5)
    data = TensorDataset(inputs, targets)
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=32, sampler=sampler)
    network = DistributedDataParallel(nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 5)))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for epoch in range(5):
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            loss = nn.functional.mse_loss(network(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean, dist.ReduceOp.SUM)
        if dist.get_rank() == 0:
            print(f"   epoch {epoch}: loss {mean.item() / dist.get_world_size():.4f} over {dist.get_backend()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    main(sys.argv[1])
