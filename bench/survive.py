#!/usr/bin/env python3
"""Trains on 4 processes, kills a random one with signal 9 again and again, and holds the outcome
against the undisturbed run: the same model to the bit, at most one step redone for each loss.

    cargo build --release
    python3 bench/survive.py --kills 200
"""

import argparse
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time

JOB = """
[model]
layers = 4
hidden = 64
heads = 4
kv_heads = 2
feed_forward = 128
vocabulary = 320

[data]
text = ["text.txt"]

[training]
sequence = 32
global_batch = 16
steps = {steps}
learning_rate = 3e-3
evaluate_every = 0

[cluster]
accelerators = 4

[layout]
pipeline = 2
micro_batch = 4
shard = "optimizer"

[checkpoint]
every_steps = 0

[run]
measure = false
"""


def text():
    """Sentences with some structure."""
    who = ["the first rank", "a later stage", "one shard of four", "the whole group"]
    does = ["sends", "keeps", "gathers", "reduces", "forgets"]
    what = ["its chunk", "the loss", "every gradient", "a block", "its parameters", "nothing"]
    return "".join(
        f"{who[i * i // 7 % 4]} {does[i // 3 % 5]} {what[(i * i // 20 + i) % 6]}.\n" for i in range(8000)
    )


def records(run):
    """What a run has recorded so far; a line that is being written is left for later."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def process_of(launcher, rank):
    """The process of a rank, if it is there at this moment."""
    children = pathlib.Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        try:
            environment = pathlib.Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in environment:
            return int(child)
    return None


def kill_again_and_again(launcher, run, kills, dice):
    """Kills a random rank once the ranks have got further than they were at the last loss."""
    furthest = 0
    for number in range(kills):
        while True:
            if launcher.poll() is not None:
                sys.exit(f"the run ended with code {launcher.returncode} after {number} kills")
            seen = records(run)
            recovered = sum(record["event"] == "recovered" for record in seen)
            step = max((record["step"] for record in seen if record["event"] == "step"), default=0)
            if recovered >= number and step > furthest:
                furthest = step
                break
            time.sleep(0.02)
        time.sleep(dice.uniform(0, 0.2))
        rank = dice.randrange(4)
        process = process_of(launcher.pid, rank)
        if process is None:
            sys.exit(f"rank {rank} has no process")
        os.kill(process, signal.SIGKILL)


def train(program, place, steps, name):
    (place / f"{name}.toml").write_text(JOB.format(steps=steps))
    command = [program, "train", f"{name}.toml"]
    return subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL)


def model(run):
    return {path.name: path.read_bytes() for path in sorted((run / "model").glob("*.safetensors"))}


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--kills", type=int, default=200)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--program", default="target/release/phalanx")
    # Steps that are surely done between two kills, with what is left after the last.
    arguments.add_argument("--steps-per-kill", type=int, default=60)
    arguments = arguments.parse_args()
    program = str(pathlib.Path(arguments.program).resolve())
    steps = arguments.kills * arguments.steps_per_kill
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        (place / "text.txt").write_text(text())
        begin = time.monotonic()
        if train(program, place, steps, "undisturbed").wait() != 0:
            sys.exit("the undisturbed run failed")
        undisturbed = time.monotonic() - begin
        begin = time.monotonic()
        launcher = train(program, place, steps, "killed")
        run = place / "runs/killed-001"
        kill_again_and_again(launcher, run, arguments.kills, random.Random(arguments.seed))
        if launcher.wait() != 0:
            sys.exit("the run that was killed failed")
        disturbed = time.monotonic() - begin
        report(place, arguments.kills, undisturbed, disturbed)


def report(place, kills, undisturbed, disturbed):
    seen = records(place / "runs/killed-001")
    done, redone, worst, times, sources = 0, 0, 0, [], {}
    for record in seen:
        if record["event"] == "recovered":
            lost = done - record["step"]
            redone, worst = redone + lost, max(worst, lost)
            times.append(record["time_s"])
            sources[record["source"]] = sources.get(record["source"], 0) + 1
        elif record["event"] == "step":
            done = max(done, record["step"])
    losses = {record["step"]: record["loss"] for record in seen if record["event"] == "step"}
    expected = records(place / "runs/undisturbed-001")
    expected = {record["step"]: record["loss"] for record in expected if record["event"] == "step"}
    same = losses == expected and model(place / "runs/killed-001") == model(place / "runs/undisturbed-001")
    times.sort()
    print(f"kills            {kills}, recovered {len(times)} times, from {sources}")
    print(f"same to the bit  {'yes' if same else 'NO'}: {len(expected)} losses and the model")
    print(f"steps redone     {redone} in all, at most {worst} for a loss")
    print(f"recovery         median {statistics.median(times):.2f} s, longest {times[-1]:.2f} s")
    print(f"whole run        {disturbed:.0f} s, undisturbed {undisturbed:.0f} s")
    if not same or worst > 1 or times[-1] > 2.0:
        sys.exit(1)


if __name__ == "__main__":
    main()
