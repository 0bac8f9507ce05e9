#!/usr/bin/env python3
"""How much of communication is exposed where it takes as long as computing.

    bench/overlap.py --python /path/to/python-with-torch [--steps N] [--rounds N]

Two ranks of one thread, each in a network namespace of its own, with a link between them that is shaped
by a token bucket (tc, tbf) so that what a rank sends in a step takes as long as the step of one rank
alone: of two that train alone at once, so that they share caches and memory as the two of a job do.
Phalanx and PyTorch (DistributedDataParallel, FSDP2; gloo) take turns; each has the rate that its own
computing asks for. Exposed is what the step takes longer than alone, over what its communication takes:
what ranks waited, which Phalanx tells of its own, and what the transfers took of the cores.
Needs root, for the namespaces. Prints one line for each system and way of sharding.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
ADDRESSES = ["10.77.0.1", "10.77.0.2"]
SPACES = ["overlap0", "overlap1"]
PORT = "29713"
MODEL = {"layers": 48, "hidden": 128, "heads": 2, "kv-heads": 1, "feed-forward": 512,
         "vocabulary": 1024}
# Bytes that each of two ranks sends in a step, for each parameter of four bytes: half of the buffer
# for every gather and every reduction to shares.
SENT = {
    "data parallel": 4,  # reduced to shares and gathered, gradients or parameters
    "fully sharded": 6,  # gathered forward and backward, reduced to shares
}


def sh(command):
    subprocess.run(command.split(), check=True)


def join():
    """Two namespaces and the link between them."""
    for space in SPACES:
        subprocess.run(["ip", "netns", "del", space], capture_output=True)
        sh(f"ip netns add {space}")
    sh(f"ip link add veth0 netns {SPACES[0]} type veth peer name veth0 netns {SPACES[1]}")
    for space, address in zip(SPACES, ADDRESSES):
        # Of large frames headers are less than 1 %: the rate is that of what is sent.
        for command in (f"ip addr add {address}/24 dev veth0", "ip link set veth0 mtu 9000 up",
                        "ip link set lo up"):
            sh(f"ip netns exec {space} {command}")


def shape(bytes_per_s):
    for space in SPACES:
        subprocess.run(f"ip netns exec {space} tc qdisc del dev veth0 root".split(),
                       capture_output=True)
        if bytes_per_s:
            sh(f"ip netns exec {space} tc qdisc add dev veth0 root tbf rate {int(8 * bytes_per_s)}bit "
               f"burst 256kb latency 100ms")


def at_once(commands):
    """Runs one command in each namespace; what the first prints last, as JSON."""
    started = []
    for rank, (space, command) in enumerate(zip(SPACES, commands)):
        environment = dict(os.environ, MASTER_ADDR=ADDRESSES[0], MASTER_PORT=PORT,
                           PHALANX_TRANSPORT="tcp", GLOO_SOCKET_IFNAME="veth0", OMP_NUM_THREADS="1")
        if command["ranks"] > 1:
            environment |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0",
                            "LOCAL_WORLD_SIZE": "1"}
        line = ["ip", "netns", "exec", space] + command["line"]
        started.append(subprocess.Popen(line, env=environment, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True))
    outputs = [process.communicate() for process in started]
    for process, (_, error) in zip(started, outputs):
        if process.returncode:
            raise SystemExit(f"{process.args}: {error}")
    printed = outputs[0][0]
    run = json.loads(printed[printed.index("{"):])
    waited = run.get("exposed_communication_s", math.nan) + run.get("pipeline_bubble_s", math.nan)
    return run["step_time_s"], waited


class Phalanx:
    name = "Phalanx"
    ways = {"data parallel": "optimizer", "fully sharded": "parameters"}

    def __init__(self, a, folder):
        self.a, self.folder = a, folder

    def command(self, way, ranks, rank):
        settings = {f"model.{key.replace('-', '_')}": value for key, value in MODEL.items()}
        settings |= {
            "cluster.accelerators": ranks,
            "training.sequence": self.a.sequence,
            "training.global_batch": self.a.batch * ranks,
            "training.steps": self.a.steps,
            "training.evaluate_every": 0,
            "training.evaluation_sequences": 2,
            "layout.micro_batch": self.a.batch,
            "layout.pipeline": 1,
            "layout.shard": '"none"' if ranks == 1 else f'"{self.ways[way]}"',
            "checkpoint.every_steps": 0,
            "recovery.replicate_every_steps": 0,
            "recovery.compare_every_steps": 0,
            "run.measure": "false",
            "run.folder": f'"{self.folder}/{"shared" if ranks > 1 else rank}"',
        }
        line = [str(self.a.binary), "train", str(ROOT / "examples/tiny.toml"), "--json"]
        for key, value in settings.items():
            line += ["--set", f"{key}={value}"]
        return {"line": line, "ranks": ranks}


class PyTorch:
    name = "PyTorch"
    ways = {"data parallel": [], "fully sharded": ["--shard"]}

    def __init__(self, a, _):
        self.a = a

    def command(self, way, ranks, _):
        sizes = MODEL | {"sequence": self.a.sequence, "batch": self.a.batch, "steps": self.a.steps,
                         "ranks": ranks}
        line = [self.a.python, str(ROOT / "bench/pytorch.py")]
        line += [f"--{key}={value}" for key, value in sizes.items()]
        return {"line": line + (self.ways[way] if ranks > 1 else []), "ranks": ranks}


def parameters():
    m = MODEL
    head = m["hidden"] // m["heads"]
    layer = m["hidden"] * head * (2 * m["heads"] + 2 * m["kv-heads"]) \
        + 3 * m["hidden"] * m["feed-forward"] + 2 * m["hidden"]
    return m["layers"] * layer + 2 * m["vocabulary"] * m["hidden"] + m["hidden"]


def measure(system, way):
    """The step alone, the step of two, and the shares of communication that are exposed and waited for."""
    shape(None)
    alone, _ = at_once([system.command(way, 1, rank) for rank in (0, 1)])
    shape(SENT[way] * parameters() / alone)
    together, waited = at_once([system.command(way, 2, rank) for rank in (0, 1)])
    return alone, together, (together - alone) / alone, waited / alone


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="python3")
    parser.add_argument("--only", default="", help="a system or a way of sharding")
    parser.add_argument("--binary", default=ROOT / "target/release/phalanx", type=pathlib.Path)
    for name, default in (("steps", 8), ("rounds", 1), ("sequence", 512), ("batch", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        systems = [Phalanx(a, folder), PyTorch(a, folder)]
        join()
        try:
            for way in SENT:
                chosen = [system for system in systems if a.only in f"{system.name}, {way}"]
                found = {system.name: [] for system in chosen}
                for _ in range(a.rounds):
                    for system in chosen:
                        found[system.name].append(measure(system, way))
                for name, rounds in found.items():
                    alone, together, exposed, waited = map(statistics.median, zip(*rounds))
                    print(f"{way:14} {name:8} alone {1e3 * alone:6.0f} ms, two ranks "
                          f"{1e3 * together:6.0f} ms, exposed {100 * exposed:5.1f} %, "
                          f"waited for {100 * waited:5.1f} %", flush=True)
        finally:
            for space in SPACES:
                sh(f"ip netns del {space}")


if __name__ == "__main__":
    main()
