"""Times the training step of a Llama in eager PyTorch, fp32, on the CPU: the peer to beat.

    golden/python.sh bench/pytorch.py --ranks 2

One rank trains alone; more are processes under DistributedDataParallel, or with `--shard` under
FSDP2, over gloo: on loopback, or wherever a launcher has started them (RANK, MASTER_ADDR).
Prints one JSON line. README.md says what is timed and what was done to make it fast.
"""

import argparse
import json
import os
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

LOOPBACK = "127.0.0.1"


def rotary_table(sequence, head_dim, theta=500000.0):
    """Cosine and sine of every position's angles, `[sequence, head_dim]` each."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(sequence).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x, cosine, sine):
    """Turns the pairs (i, i + head_dim / 2) of `x`, `[batch, heads, sequence, head_dim]`."""
    low, high = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-high, low), dim=-1) * sine


class Layer(nn.Module):
    """Grouped-query attention and a SwiGLU feed-forward block, each behind an RMSNorm."""

    def __init__(self, a):
        super().__init__()
        self.head_dim = a.hidden // a.heads
        self.heads, self.kv_heads = a.heads, a.kv_heads
        qkv_width = (a.heads + 2 * a.kv_heads) * self.head_dim
        self.attention_norm = nn.RMSNorm(a.hidden, eps=1e-5)
        self.qkv = nn.Linear(a.hidden, qkv_width, bias=False)
        self.output = nn.Linear(a.hidden, a.hidden, bias=False)
        self.feed_forward_norm = nn.RMSNorm(a.hidden, eps=1e-5)
        self.gate_up = nn.Linear(a.hidden, 2 * a.feed_forward, bias=False)
        self.down = nn.Linear(a.feed_forward, a.hidden, bias=False)

    def forward(self, x, cosine, sine):
        batch, sequence, hidden = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, sequence, -1, self.head_dim)
        qk, v = qkv.transpose(1, 2).split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(qk, cosine, sine).split([self.heads, self.kv_heads], dim=1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.output(attended.transpose(1, 2).reshape(batch, sequence, hidden))
        gate, up = self.gate_up(self.feed_forward_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    """Token ids and targets in, mean cross-entropy out; the head is not tied."""

    def __init__(self, a):
        super().__init__()
        self.embedding = nn.Embedding(a.vocabulary, a.hidden)
        self.layers = nn.ModuleList(Layer(a) for _ in range(a.layers))
        self.norm = nn.RMSNorm(a.hidden, eps=1e-5)
        self.head = nn.Linear(a.hidden, a.vocabulary, bias=False)
        # Not buffers, which DistributedDataParallel would send to every rank.
        self.cosine, self.sine = rotary_table(a.sequence, a.hidden // a.heads)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cosine, self.sine)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def adamw(model, kind):
    """AdamW as `kind`, "fused" or "foreach"; decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    scales = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": scales, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), **{kind: True})


def time_steps(a, model, optimizer, rank):
    """Trains on random tokens; the wall time of each step after the warm-up, the processor time of
    all of those, and the last loss."""
    generator = torch.Generator().manual_seed(1 + rank)
    times = []
    for step in range(a.warmup + a.steps):
        tokens = torch.randint(a.vocabulary, (a.batch, a.sequence + 1), generator=generator)
        if step == a.warmup:
            cpu_start = time.process_time()
        start = time.perf_counter()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= a.warmup:
            times.append(time.perf_counter() - start)
    return times, time.process_time() - cpu_start, loss.item()


def replicated(model, a):
    return DistributedDataParallel(
        model,
        gradient_as_bucket_view=True,
        static_graph=True,
        bucket_cap_mb=a.bucket_mb,
    )


def sharded(model):
    """Layer by layer, the rest together; parameters are gathered again for the backward pass."""
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def run_rank(rank, a, port):
    """One rank from start to end; rank 0 prints the result."""
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    model = Llama(a)
    parameters = sum(p.numel() for p in model.parameters())
    if a.ranks > 1:
        if port is None:
            dist.init_process_group("gloo")
        else:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            store = dist.TCPStore(LOOPBACK, port, is_master=False)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=a.ranks)
        model = sharded(model) if a.shard else replicated(model, a)
    times, cpu_s, loss = time_steps(a, model, adamw(model, a.optimizer), rank)
    if a.ranks > 1:
        total = torch.tensor(cpu_s, dtype=torch.float64)
        dist.all_reduce(total)
        cpu_s = total.item()
        dist.destroy_process_group()
    if rank == 0:
        step_tokens = a.ranks * a.batch * a.sequence
        result = {
            "tokens_per_s": step_tokens / statistics.median(times),
            "step_time_s": statistics.median(times),
            "tokens_per_cpu_s": step_tokens * a.steps / cpu_s,
            "ranks": a.ranks,
            "threads": a.threads,
            "parameters": parameters,
            "optimizer": a.optimizer,
            "loss": loss,
            "torch": torch.__version__,
        }
        print(json.dumps(result), flush=True)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {
        "ranks": 1, "threads": 1, "layers": 8, "hidden": 512, "heads": 8, "kv-heads": 4,
        "feed-forward": 1536, "vocabulary": 4096, "sequence": 256, "batch": 4, "steps": 20,
        "warmup": 3, "bucket-mb": 25,
    }  # fmt: skip
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--optimizer", choices=["fused", "foreach"], default="fused")
    parser.add_argument("--shard", action="store_true")
    return parser.parse_args()


def main():
    a = parse()
    if a.ranks == 1 or "RANK" in os.environ:
        run_rank(int(os.environ.get("RANK", 0)), a, port=None)
    else:
        store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
        multiprocessing.spawn(run_rank, args=(a, store.port), nprocs=a.ranks)


if __name__ == "__main__":
    main()
