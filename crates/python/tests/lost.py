"""A rank that is killed is named by the exceptions of all others, with the operation that it broke."""

import json
import os
import signal
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from ranks import free_port
from torch import nn
from torch.nn.parallel import DistributedDataParallel

RANKS, LOST = 3, 1


def trained(index):
    network = DistributedDataParallel(nn.Linear(50, 50))
    for step in range(10**6):
        if index == LOST and step == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        network(torch.randn(4, 50)).sum().backward()


def reduced(index):
    for step in range(10**6):
        if index == LOST and step == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1000))


def rank(index, work, port, told, folder):
    os.environ.update(PHALANX_FLIGHT=folder, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(index), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    import phalanx.torch

    dist.init_process_group("phalanx")
    try:
        work(index)
    except RuntimeError as error:
        record = json.load(open(f"{folder}/rank-{index}.json"))
        told.put((index, time.time(), str(error), record))


def check(work, folder):
    told, port = processes.get_context("fork").Queue(), free_port()
    context = processes.start_processes(rank, (work, port, told, folder), RANKS, join=False, start_method="fork")
    context.processes[LOST].join()
    killed, said = time.time(), [told.get(timeout=60) for _ in range(RANKS - 1)]
    for index, when, message, record in said:
        # PyTorch adds where in its own code the error came up.
        message = message.partition("\n")[0]
        assert index != LOST and f"rank {LOST}" in message and "all-reduce" in message, message
        failed = [operation for operation in record["operations"] if operation["failure"]]
        assert failed and record["peers"][0]["rank"] != index and "all-reduce" in failed[0]["label"], record
        print(f"   rank {index} after {max(0.0, when - killed):.2f} s: {message}")
    for process in context.processes:
        process.join()


if __name__ == "__main__":
    for work in (reduced, trained):
        with tempfile.TemporaryDirectory() as folder:
            check(work, folder)
        print("ok: a rank lost while others", work.__name__, flush=True)
