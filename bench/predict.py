#!/usr/bin/env python3
"""Predicted beside measured step time, layout by layout.

    bench/predict.py [--rounds N] [--steps N] [--job FILE] [--only NAME]

Trains a job in layouts that a machine of two cores has cores for, and in two that share them. Every run
measures the machine, predicts, trains and compares by itself; this prints the errors, with what waited
for transfers and in the pipeline, and how many layouts are within 15 % (median over the rounds).
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
PIPELINE = {"layout.pipeline": 2, "layout.shard": "none"}
LAYOUTS = {
    "1 rank": (1, {"layout.shard": "none"}),
    "1 rank, recomputed": (1, {"layout.shard": "none", "layout.recompute": "full"}),
    "data 2": (2, {"layout.shard": "none"}),
    "data 2, optimizer sharded": (2, {"layout.shard": "optimizer"}),
    "data 2, gradients sharded": (2, {"layout.shard": "gradients"}),
    "data 2, parameters sharded": (2, {"layout.shard": "parameters"}),
    "pipeline 2, gpipe": (2, PIPELINE | {"layout.schedule": "gpipe"}),
    "pipeline 2, 1f1b": (2, PIPELINE),
    "pipeline 2, interleaved": (2, PIPELINE | {"layout.virtual_stages": 2}),
    "pipeline 2, zero-bubble": (2, PIPELINE | {"layout.schedule": "zero-bubble"}),
    "tensor 2": (2, {"layout.tensor": 2, "layout.shard": "none"}),
    "context 2": (2, {"layout.context": 2, "layout.shard": "none"}),
    "data 2 x pipeline 2": (4, {"layout.pipeline": 2, "layout.shard": "optimizer"}),
    "tensor 2 x data 2": (4, {"layout.tensor": 2, "layout.shard": "optimizer"}),
}


def train(job, steps, folder, ranks, layout):
    settings = {
        "cluster.accelerators": ranks,
        "layout.pipeline": 1,
        "training.steps": steps,
        "training.evaluate_every": 0,
        "run.folder": f"{folder}/runs",
    } | layout
    command = [ROOT / "target/release/phalanx", "train", job, "--json"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--job", default=ROOT / "examples/tiny.toml")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    subprocess.run(["cargo", "build", "--release", "-q"], cwd=ROOT, check=True)
    within = []
    with tempfile.TemporaryDirectory() as folder:
        for name, layout in LAYOUTS.items():
            if arguments.only not in name:
                continue
            runs = [train(arguments.job, arguments.steps, folder, *layout)
                    for _ in range(arguments.rounds)]
            errors = [100 * run["prediction_error"] for run in runs]
            size = statistics.median(abs(error) for error in errors)
            within.append(size <= 15)
            last = runs[-1]
            def beside(key):
                return f"{1e3 * last['predicted_' + key]:.1f}/{1e3 * last[key]:.1f} ms"
            print(f"{name:28} predicted/measured step {beside('step_time_s')}, exposed "
                  f"{beside('exposed_communication_s')}, bubble {beside('pipeline_bubble_s')} in the last "
                  f"run; errors " + ", ".join(f"{error:+.1f} %" for error in errors)
                  + f"; median size {size:.1f} %", flush=True)
    print(f"{sum(within)} of {len(within)} layouts within 15 %")


if __name__ == "__main__":
    main()
