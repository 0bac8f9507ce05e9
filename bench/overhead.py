#!/usr/bin/env python3
"""What it costs to be safe: pairs of runs, one with copies in memory, heartbeats and checkpoints
beside training, one with nothing, in turns; ratios of step time and of processor time.

    cargo build --release
    python3 bench/overhead.py --pairs 5
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import survive

JOB = """
[model]
name = "{model}"
vocabulary = 320
[data]
text = ["text.txt"]
[training]
sequence = 128
global_batch = {global_batch}
steps = {steps}
evaluate_every = 0
evaluation_sequences = 8
[cluster]
accelerators = {ranks}
[layout]
micro_batch = {micro_batch}
shard = "optimizer"
[run]
measure = false
"""

NOTHING = "[checkpoint]\nevery_steps = 0\n[recovery]\nreplicate_every_steps = 0\n"
SAFE = {
    "copies": "[checkpoint]\nevery_steps = 0\n",
    "checkpoints": "[checkpoint]\nevery_steps = {every}\n[recovery]\nreplicate_every_steps = 0\n",
    "both": "[checkpoint]\nevery_steps = {every}\n",
}


def train(a, place, name, extra):
    """Median step time, processor time of all processes, and the share of time stood still to save."""
    job = JOB.format(
        model=a.model, ranks=a.ranks, steps=a.steps,
        global_batch=a.ranks * a.micro_batch * a.microbatches, micro_batch=a.micro_batch,
    )  # fmt: skip
    (place / f"{name}.toml").write_text(job + extra.format(every=a.save_every))
    used = os.times()
    done = subprocess.run([a.program, "train", f"{name}.toml", "--json"], cwd=place, stdout=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit(f"{name} failed")
    now = os.times()
    run = pathlib.Path(json.loads(done.stdout)["run_folder"])
    seen = survive.records(run if run.is_absolute() else place / run)
    steps = [record["step_time_s"] for record in seen if record["event"] == "step"]
    stalls = [record["stall_s"] for record in seen if record["event"] == "saving"]
    cpu = now.children_user + now.children_system - used.children_user - used.children_system
    return statistics.median(steps), cpu, sum(stalls) / sum(steps)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--pairs", type=int, default=5)
    arguments.add_argument("--ranks", type=int, default=2)
    arguments.add_argument("--model", default="tiny")
    arguments.add_argument("--micro-batch", type=int, default=4)
    arguments.add_argument("--microbatches", type=int, default=4)
    arguments.add_argument("--steps", type=int, default=40)
    arguments.add_argument("--save-every", type=int, default=10)
    arguments.add_argument("--what", choices=list(SAFE), default="both")
    arguments.add_argument("--program", default="target/release/phalanx")
    a = arguments.parse_args()
    a.program = str(pathlib.Path(a.program).resolve())
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        (place / "text.txt").write_text(survive.text() * 4)
        train(a, place, "warm", NOTHING)
        for number in range(a.pairs):
            kinds = [("nothing", NOTHING), ("safe", SAFE[a.what])]
            # Who goes first takes turns too.
            found = {kind: train(a, place, kind, extra) for kind, extra in kinds[:: 1 - 2 * (number % 2)]}
            pairs.append((found["safe"], found["nothing"]))
    for at, what in enumerate(["step time", "processor time"]):
        ratios = sorted(100 * (safe[at] / nothing[at] - 1) for safe, nothing in pairs)
        median = statistics.median(ratios)
        print(f"{what:15} {median:+.2f} % ({ratios[0]:+.2f} to {ratios[-1]:+.2f}) with {a.what}")
    stalls = [100 * safe[2] for safe, _ in pairs]
    print(f"stood still     {statistics.median(stalls):.3f} % of the time to save every {a.save_every} steps")


if __name__ == "__main__":
    main()
