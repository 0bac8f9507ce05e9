#!/usr/bin/env python3
"""Predicted beside measured step time, layout by layout.

    bench/predict.py [--rounds N] [--steps N] [--job FILE]

Trains a job in four layouts: data 2, data 2 with parameters sharded, pipeline 2, and data 2 x
pipeline 2. Every run measures the machine, predicts, trains and compares by itself; this prints the
errors, and the median of their sizes over the rounds.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAYOUTS = {
    "data 2": (2, 1, "optimizer"),
    "data 2, parameters sharded": (2, 1, "parameters"),
    "pipeline 2": (2, 2, "none"),
    "data 2 x pipeline 2": (4, 2, "optimizer"),
}


def train(job, steps, folder, ranks, pipeline, shard):
    settings = {
        "cluster.accelerators": ranks,
        "layout.pipeline": pipeline,
        "layout.shard": shard,
        "training.steps": steps,
        "training.evaluate_every": 0,
        "run.folder": f"{folder}/runs",
    }
    command = [ROOT / "target/release/phalanx", "train", job, "--json"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--job", default=ROOT / "examples/tiny.toml")
    arguments = parser.parse_args()
    subprocess.run(["cargo", "build", "--release", "-q"], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, layout in LAYOUTS.items():
            runs = [train(arguments.job, arguments.steps, folder, *layout)
                    for _ in range(arguments.rounds)]
            errors = [100 * run["prediction_error"] for run in runs]
            size = statistics.median(abs(error) for error in errors)
            last = runs[-1]
            print(f"{name:28} predicted {1e3 * last['predicted_step_time_s']:7.1f} ms, "
                  f"measured {1e3 * last['step_time_s']:7.1f} ms in the last run; errors "
                  + ", ".join(f"{error:+.1f} %" for error in errors) + f"; median size {size:.1f} %",
                  flush=True)


if __name__ == "__main__":
    main()
