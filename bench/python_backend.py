#!/usr/bin/env python3
"""Speed of the torch.distributed backend `phalanx` beside Gloo: all-reduce, and a step of DDP.

Both run in the same processes, by turns; times are medians over rounds, of the slowest rank. Needs PyTorch
and the wheel (see checks/python).

    python bench/python_backend.py [--ranks 2,4] [--rounds 15]
"""

import argparse
import os
import socket
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

SIZES = [1 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20]


def timed(works, rounds):
    """Median seconds of each, by turns; of the slowest rank."""
    times = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            dist.barrier()
            begun = time.perf_counter()
            work()
            if turn:
                times[name].append(time.perf_counter() - begun)
    for name, taken in times.items():
        slowest = torch.tensor(taken)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        times[name] = statistics.median(slowest.tolist())
    return times


def row(what, times):
    if dist.get_rank() == 0:
        ours, theirs = times["phalanx"], times["gloo"]
        print(f"| {dist.get_world_size()} | {what} | {1e3 * ours:.3f} | {1e3 * theirs:.3f} | {theirs / ours:.2f} |", flush=True)


def step(group, inputs):
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    network = DistributedDataParallel(nn.Sequential(*layers), process_group=group)

    def work():
        network.zero_grad()
        network(inputs).square().mean().backward()

    return work


def rank(index, ranks, port, rounds):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(index), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    import phalanx.torch

    dist.init_process_group("phalanx")
    groups = {"phalanx": dist.group.WORLD, "gloo": dist.new_group(backend="gloo")}
    for size in SIZES:
        tensor, repeats = torch.ones(size // 4), max(1, min(20, (1 << 20) // size))

        def reduce(group):
            for _ in range(repeats):
                dist.all_reduce(tensor, group=group)

        times = timed({name: lambda group=group: reduce(group) for name, group in groups.items()}, rounds)
        row(f"all-reduce, {size >> 10:,} KiB", {name: time / repeats for name, time in times.items()})
    inputs = torch.randn(32, 1024)
    row("step of DDP, 8.4 million parameters", timed({name: step(group, inputs) for name, group in groups.items()}, rounds))
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print("| ranks | what | phalanx, ms | gloo, ms | ratio |\n| --- | --- | --- | --- | --- |")
    for ranks in map(int, arguments.ranks.split(",")):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        processes.start_processes(rank, (ranks, port, arguments.rounds), ranks, start_method="fork")
