#!/usr/bin/env python3
"""Time to N steps when ranks are killed: recovery from memory, plain restarts from disk, and torchrun.

Every run trains a Llama of the same size on 4 processes of one thread. When the run has come to
certain steps for the first time, a certain rank is killed with signal 9: the trace is a function of
the seed, and the same for all. `memory` is Phalanx as it is; `disk` is Phalanx without recovery,
started again with `--resume` whenever it ends; `torchrun` is PyTorch's DistributedDataParallel under
torchrun with as many restarts as there are kills, from checkpoints on disk.

    cargo build --release
    python3 bench/time_to_steps.py --python VENV/bin/python      # with torch, or none for Phalanx alone
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import survive

SHAPE = {
    "layers": 4, "hidden": 128, "heads": 4, "kv_heads": 2, "feed_forward": 384, "vocabulary": 320,
    "sequence": 128, "batch": 4,
}  # fmt: skip

JOB = """
[model]
layers = {layers}
hidden = {hidden}
heads = {heads}
kv_heads = {kv_heads}
feed_forward = {feed_forward}
vocabulary = {vocabulary}
[data]
text = ["text.txt"]
[training]
sequence = {sequence}
global_batch = {global_batch}
steps = {steps}
evaluate_every = 0
evaluation_sequences = 16
[cluster]
accelerators = 4
[layout]
micro_batch = {batch}
shard = "none"
[checkpoint]
every_steps = {save_every}
[recovery]
restarts = {restarts}
[run]
measure = false
"""


def trace(steps, kills, seed):
    """At which step which rank is killed, in order."""
    dice = random.Random(seed)
    return sorted((dice.randrange(steps // 20 + 1, steps), dice.randrange(4)) for _ in range(kills))


class Phalanx:
    """A job that is started, and started again if it ends too early."""

    def __init__(self, a, place, restarts):
        self.a, self.place, self.starts = a, place, 0
        job = JOB.format(
            **SHAPE, global_batch=4 * SHAPE["batch"], steps=a.steps, save_every=a.save_every, restarts=restarts
        )
        (place / "job.toml").write_text(job)
        (place / "text.txt").write_text(survive.text())

    def start(self):
        runs = sorted((self.place / "runs").glob("job-*"))
        saved = [run for run in runs if any((run / "checkpoints").glob("*/manifest.json"))]
        command = [self.a.program, "train", "job.toml"]
        command += ["--resume", saved[-1].relative_to(self.place)] if saved else []
        self.starts += 1
        return subprocess.Popen(
            command, cwd=self.place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def step(self):
        runs = sorted((self.place / "runs").glob("job-*"))
        seen = survive.records(runs[-1]) if runs else []
        return max((record["step"] for record in seen if record["event"] == "step"), default=0)

    def process(self, launcher, rank):
        return survive.process_of(launcher.pid, rank)


def free_port():
    """A port that nobody has at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Torchrun:
    """torchrun starts the ranks, and starts all of them again when one is lost."""

    def __init__(self, a, place, restarts):
        self.a, self.place, self.restarts, self.starts = a, place, restarts, 0

    def start(self):
        script = pathlib.Path(__file__).with_name("torch_restart.py")
        command = [self.a.python, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
        command += ["--max-restarts", str(self.restarts), "--monitor-interval", "0.1"]
        command += ["--master-port", str(free_port()), script, "--shape", json.dumps(SHAPE)]
        command += ["--steps", str(self.a.steps), "--save-every", str(self.a.save_every)]
        command += ["--folder", self.place]
        self.starts += 1
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def step(self):
        path = self.place / "steps"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return max((int(line.split()[0]) for line in lines), default=0)

    def process(self, _, rank):
        path = self.place / f"process-{rank}"
        process = int(path.read_text()) if path.exists() else None
        alive = process and pathlib.Path(f"/proc/{process}").exists()
        return process if alive else None


def run(a, kind, kills):
    """Seconds to the last step, and how many of them were processor time of all processes."""
    place = pathlib.Path(tempfile.mkdtemp())
    job = {
        "memory": lambda: Phalanx(a, place, 3),
        "disk": lambda: Phalanx(a, place, 0),
        "torchrun": lambda: Torchrun(a, place, len(kills)),
    }[kind]()
    used = os.times()
    begin = time.monotonic()
    launcher, left = job.start(), list(kills)
    while True:
        if launcher.poll() is not None:
            if launcher.returncode == 0:
                break
            if kind == "torchrun" or job.starts > len(kills) + 1:
                sys.exit(f"{kind} ended with code {launcher.returncode}")
            launcher = job.start()
        if left and job.step() >= left[0][0]:
            process = job.process(launcher, left[0][1])
            if process is not None:
                os.kill(process, signal.SIGKILL)
                left.pop(0)
        time.sleep(0.02)
    elapsed = time.monotonic() - begin
    now = os.times()
    shutil.rmtree(place)
    if left:
        sys.exit(f"{kind} was done before all ranks were killed")
    cpu = now.children_user + now.children_system - used.children_user - used.children_system
    return elapsed, cpu


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--steps", type=int, default=300)
    arguments.add_argument("--kills", type=int, default=6)
    arguments.add_argument("--save-every", type=int, default=50)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--kinds", nargs="*", choices=["memory", "disk", "torchrun"])
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--program", default="target/release/phalanx")
    arguments.add_argument("--python", help="an interpreter that has torch")
    a = arguments.parse_args()
    a.program = str(pathlib.Path(a.program).resolve())
    kills = trace(a.steps, a.kills, a.seed)
    print(f"{a.steps} steps, a checkpoint every {a.save_every}; (step, rank) killed: {kills}")
    kinds = a.kinds or ["memory", "disk"] + (["torchrun"] if a.python else [])
    found = {(kind, bool(faults)): [] for kind in kinds for faults in ([], kills)}
    for _ in range(a.rounds):
        for kind in kinds:
            for faults in ([], kills):
                found[kind, bool(faults)].append(run(a, kind, faults))
                elapsed, cpu = found[kind, bool(faults)][-1]
                print(f"{kind}, {len(faults)} killed: {elapsed:.1f} s, {cpu:.1f} s of processor", flush=True)
    for kind in kinds:
        clean, faulty = ([min_median_max(found[kind, f], at) for at in (0, 1)] for f in (False, True))
        lost = statistics.median(t for t, _ in found[kind, True]) - statistics.median(
            t for t, _ in found[kind, False]
        )
        each = lost / max(len(kills), 1)
        print(f"{kind:9} undisturbed {clean[0]} s ({clean[1]} s of processor)")
        print(f"{kind:9} killed      {faulty[0]} s ({faulty[1]} s of processor); {each:.2f} s a kill")


def min_median_max(runs, at):
    values = sorted(one[at] for one in runs)
    return f"{statistics.median(values):.1f} ({values[0]:.1f} to {values[-1]:.1f})"


if __name__ == "__main__":
    main()
