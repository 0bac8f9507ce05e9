"""Times Gloo's collectives, through PyTorch, as `phalanx bench collectives` times ours: JSON lines
{kind, bytes, median_s, best_s}. Arguments: seconds a cell, then sizes in bytes; rank and address as torchrun sets them."""
import json
import sys
import time

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
torch.set_num_threads(1)
rank, ranks = dist.get_rank(), dist.get_world_size()


def operation(kind, elements):
    block, whole = torch.zeros(elements // ranks), torch.zeros(elements)
    return {
        "all-reduce": lambda: dist.all_reduce(whole),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(block, whole),
        "all-gather": lambda: dist.all_gather_into_tensor(whole, block),
    }[kind]


for size in map(int, sys.argv[2:]):
    for kind in ("all-reduce", "reduce-scatter", "all-gather"):
        batch = 20 if size <= 65536 else 4 if size <= 1 << 20 else 1
        carry_out, times = operation(kind, size // 4), []
        carry_out()
        begin = time.perf_counter()
        carry_out()
        shorter = torch.tensor([1 if time.perf_counter() - begin > 0.002 else batch])
        dist.broadcast(shorter, 0)
        batch = int(shorter)
        while True:
            dist.barrier()
            start = time.perf_counter()
            for _ in range(batch):
                carry_out()
            times.append((time.perf_counter() - start) / batch)
            go = torch.tensor([len(times) < 5 or time.perf_counter() - begin < float(sys.argv[1])], dtype=torch.uint8)
            dist.broadcast(go, 0)
            if not go:
                break
        slowest = torch.tensor(times, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        slowest = sorted(slowest.tolist())
        if rank == 0:
            print(json.dumps({"kind": kind, "bytes": size, "median_s": slowest[len(slowest) // 2], "best_s": slowest[0]}), flush=True)
dist.destroy_process_group()
