"""One rank of a training run that survives as torchrun has it: all ranks are started again and go on
from the newest checkpoint on disk. The peer of `bench/time_to_steps.py`, which starts it.

The model and its step are those of `bench/pytorch.py`. Checkpoints are written by rank 0 under
another name, synced and renamed; batches are functions of step and rank, so that a restart repeats
or skips nothing.
"""

import argparse
import json
import os
import pathlib
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import pytorch


def save(path, step, model, optimizer):
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save-every", type=int, required=True)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    a = parser.parse_args()
    shape = argparse.Namespace(**a.shape)
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # Without names of its own a start finds the addresses of ranks that are gone, and connects to nobody.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
    model = pytorch.Llama(shape)
    optimizer = pytorch.adamw(model, "fused")
    checkpoint, step = a.folder / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    (a.folder / f"process-{rank}").write_text(str(os.getpid()))
    while step < a.steps:
        generator = torch.Generator().manual_seed(step * dist.get_world_size() + rank)
        tokens = torch.randint(shape.vocabulary, (shape.batch, shape.sequence + 1), generator=generator)
        parallel(tokens[:, :-1], tokens[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if rank == 0:
            if step % a.save_every == 0 or step == a.steps:
                save(checkpoint, step, model, optimizer)
            with open(a.folder / "steps", "a") as file:
                file.write(f"{step} {time.time()}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
