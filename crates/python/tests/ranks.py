"""The backend does what Gloo does: collectives, DistributedDataParallel, fully sharded data parallelism.

Takes the names of checks; all of them unless given.
"""

import itertools
import os
import socket
import sys
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

# Older names of collectives, which older versions of PyTorch know too.
warnings.filterwarnings("ignore", category=FutureWarning)
RANKS = 3
# Sums of so many numbers in another order differ by so much.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
Op = dist.ReduceOp


def values(shape, dtype, salt=0):
    torch.manual_seed(100 * salt + dist.get_rank())
    if dtype == torch.bool:
        return torch.rand(shape) > 0.5
    return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randint(-5, 5, shape).abs().to(dtype)


def same(ours, theirs):
    limit = TOLERANCE.get(ours.dtype, 0)
    torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit)


def on_both(collective, make):
    """Carries out a collective on the same tensors over both backends, and compares all of them."""
    ours, theirs = make(), make()
    collective(ours, None)
    collective(theirs, GLOO)
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        same(a, b)


def flat(tensors):
    return [tensors] if torch.is_tensor(tensors) else list(itertools.chain(*map(flat, tensors)))


def reductions():
    fractions = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    integers = [torch.int64, torch.int32, torch.int8, torch.uint8]
    cases = itertools.product(fractions + integers, [Op.SUM, Op.PRODUCT, Op.MIN, Op.MAX], [1, 7, 5000])
    for dtype, op, length in cases:
        on_both(lambda t, group: dist.all_reduce(t, op, group=group), lambda: values((length,), dtype))
    for op in (Op.BAND, Op.BOR, Op.BXOR):
        on_both(lambda t, group: dist.all_reduce(t, op, group=group), lambda: values((33,), torch.int32))
    for root in range(RANKS):
        ours, theirs = values((9,), torch.float32), values((9,), torch.float32)
        dist.reduce(ours, root), dist.reduce(theirs, root, group=GLOO)
        if dist.get_rank() == root:
            same(ours, theirs)
    mean = torch.full((4,), float(dist.get_rank()))
    dist.all_reduce(mean, Op.AVG)
    same(mean, torch.ones(4))
    flags = values((50,), torch.bool)
    everyone = [torch.empty_like(flags) for _ in range(RANKS)]
    dist.all_gather(everyone, flags, group=GLOO)
    for op, expected in ((Op.MAX, torch.stack(everyone).any(0)), (Op.MIN, torch.stack(everyone).all(0))):
        found = flags.clone()
        dist.all_reduce(found, op)
        same(found, expected)
    many = [values((n,), torch.float32, n) for n in (1, 3, 1000)]
    sums = [tensor.clone() for tensor in many]
    dist.group.WORLD.allreduce_coalesced(sums).wait()
    for found, tensor in zip(sums, many):
        dist.all_reduce(tensor, group=GLOO)
        same(found, tensor)


def copies():
    for dtype, length in itertools.product([torch.float32, torch.int64, torch.bool, torch.complex64], [1, 5, 999]):
        for root in range(RANKS):
            on_both(
                lambda t, group: dist.broadcast(t, root, group=group),
                lambda: values((length,), torch.float32).to(dtype),
            )
        make = lambda: ([torch.zeros(length, dtype=dtype) for _ in range(RANKS)], values((length,), torch.float32).to(dtype))
        on_both(lambda t, group: dist.all_gather(*t, group=group), make)
    make = lambda: (torch.zeros(RANKS * 5, 3), values((5, 3), torch.float32))
    on_both(lambda t, group: dist.all_gather_into_tensor(*t, group=group), make)
    for dtype in (torch.float32, torch.bfloat16):
        make = lambda: (torch.zeros(5, dtype=dtype), values((RANKS * 5,), dtype))
        ours, (theirs, whole) = make(), make()
        dist.reduce_scatter_tensor(*ours)
        dist.all_reduce(whole, group=GLOO)
        same(ours[0], whole.chunk(RANKS)[dist.get_rank()])
    make = lambda: (torch.zeros(5), [values((5,), torch.float32, salt) for salt in range(RANKS)])
    ours, (_, parts) = make(), make()
    dist.reduce_scatter(*ours)
    for part in parts:
        dist.all_reduce(part, group=GLOO)
    same(ours[0], parts[dist.get_rank()])
    for root in range(RANKS):
        here = dist.get_rank() == root
        make = lambda: ([torch.zeros(6) for _ in range(RANKS)] if here else [], values((6,), torch.float32))
        on_both(lambda t, group: dist.gather(t[1], t[0] if here else None, root, group=group), make)
        make = lambda: (torch.zeros(6), [values((6,), torch.float32, salt) for salt in range(RANKS)] if here else [])
        on_both(lambda t, group: dist.scatter(t[0], t[1] if here else None, root, group=group), make)
    objects = [None] * RANKS
    dist.all_gather_object(objects, {"rank": dist.get_rank()})
    assert objects == [{"rank": rank} for rank in range(RANKS)]


def exchanges():
    rank = dist.get_rank()
    sizes = lambda sender: [(sender + 2 * receiver) % 4 for receiver in range(RANKS)]
    split, received = sizes(rank), [sizes(sender)[rank] for sender in range(RANKS)]
    make = lambda: (torch.zeros(sum(received), 2), values((sum(split), 2), torch.float32))
    on_both(lambda t, group: dist.all_to_all_single(*t, received, split, group=group), make)
    outputs = [torch.zeros(4, dtype=torch.int64) for _ in range(RANKS)]
    dist.all_to_all(outputs, [torch.full((4,), 10 * rank + to) for to in range(RANKS)])
    assert [int(output[0]) for output in outputs] == [10 * sender + rank for sender in range(RANKS)]
    after, before = (rank + 1) % RANKS, (rank - 1) % RANKS
    found = [torch.zeros(1000), torch.zeros(3)]
    # Received in another order than sent.
    works = [dist.irecv(found[1], before, tag=1), dist.irecv(found[0], before, tag=0)]
    works += [dist.isend(torch.full((1000,), float(rank)), after, tag=0), dist.isend(torch.arange(3.0), after, tag=1)]
    for work in works:
        work.wait()
    same(found[0], torch.full((1000,), float(before))), same(found[1], torch.arange(3.0))
    ring = [
        dist.P2POp(dist.isend, torch.full((5,), rank), after),
        dist.P2POp(dist.irecv, incoming := torch.zeros(5, dtype=torch.int64), before),
    ]
    for work in dist.batch_isend_irecv(ring):
        work.wait()
    same(incoming, torch.full((5,), before))
    dist.barrier()


def groups_and_futures():
    rank = dist.get_rank()
    pair = dist.new_group([0, 2])
    if rank != 1:
        tensor = torch.full((3,), rank + 1.0)
        dist.all_reduce(tensor, group=pair)
        same(tensor, torch.full((3,), 4.0))
        dist.broadcast(tensor.fill_(rank), 2, group=pair)
        same(tensor, torch.full((3,), 2.0))
    works = [dist.all_reduce(torch.full((n,), 1.0), async_op=True) for n in range(1, 30)]
    for n, work in reversed(list(enumerate(works, 1))):
        same(work.get_future().then(lambda future: future.value()[0] * 2).wait(), torch.full((n,), 2.0 * RANKS))
    from torch.distributed._functional_collectives import all_gather_tensor, all_reduce, reduce_scatter_tensor

    world = dist.group.WORLD
    same(all_reduce(torch.ones(4), "sum", world), torch.full((4,), float(RANKS)))
    gathered = all_gather_tensor(torch.full((2,), float(rank)), 0, world)
    same(gathered, torch.arange(RANKS).repeat_interleave(2).float())
    same(reduce_scatter_tensor(gathered, "avg", 0, world), torch.full((2,), float(rank)))
    try:
        dist.all_reduce(torch.ones(4, 4).t())
        raise AssertionError("a tensor that is not contiguous was taken")
    except RuntimeError as error:
        assert "contiguous" in str(error)


def model(norm=nn.BatchNorm1d):
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), norm(64), nn.Linear(64, 5))


def losses(network, optimizer, steps=20):
    torch.manual_seed(dist.get_rank())
    found = []
    for _ in range(steps):
        inputs = torch.randn(16, 20)
        loss = nn.functional.mse_loss(network(inputs), inputs[:, :5].sin())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


def data_parallel():
    found = {}
    for name, group in (("phalanx", None), ("gloo", GLOO)):
        for views in (False, True):
            network = DistributedDataParallel(model(), process_group=group, gradient_as_bucket_view=views)
            found[name, views] = losses(network, torch.optim.SGD(network.parameters(), lr=0.1))
    for views in (False, True):
        ours, theirs = found["phalanx", views], found["gloo", views]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert ours[-1] < ours[0], ours
    if dist.get_rank() == 0:
        print(f"   loss {ours[0]:.4f} -> {ours[-1]:.4f}, from gloo's at most {(ours - theirs).abs().max():.1e}")
    half = DistributedDataParallel(model().bfloat16())
    assert losses_of_bf16(half).isfinite().all()


def losses_of_bf16(network):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    found = []
    for _ in range(3):
        loss = network(torch.randn(16, 20, dtype=torch.bfloat16)).float().square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def fully_sharded():
    from torch.distributed.device_mesh import DeviceMesh

    found = {}
    for name, group in (("phalanx", dist.group.WORLD), ("gloo", GLOO)):
        for precision in ("fp32", "bf16"):
            network, mesh = model(nn.LayerNorm), DeviceMesh.from_group(group, "cpu")
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            options = {"mp_policy": policy} if precision == "bf16" else {}
            for layer in network[0], network[3]:
                fully_shard(layer, mesh=mesh, **options)
            fully_shard(network, mesh=mesh, **options)
            optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
            found[name, precision] = losses(network, optimizer, steps=10)
            norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            assert norm.full_tensor().isfinite()
    for precision, limit in (("fp32", 1e-5), ("bf16", 2e-2)):
        ours, theirs = found["phalanx", precision], found["gloo", precision]
        torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit)
        assert ours[-1] < ours[0]


CHECKS = [reductions, copies, exchanges, groups_and_futures, data_parallel, fully_sharded]


def rank(index, names, port):
    global GLOO
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(index), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    import phalanx.torch

    dist.init_process_group("phalanx")
    assert dist.get_backend() == "phalanx"
    GLOO = dist.new_group(backend="gloo")
    for check in CHECKS:
        if not names or check.__name__ in names:
            check()
            dist.barrier()
            if index == 0:
                print("ok:", check.__name__.replace("_", " "), flush=True)
    dist.destroy_process_group()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


if __name__ == "__main__":
    processes.start_processes(rank, (sys.argv[1:], free_port()), RANKS, start_method="fork")
