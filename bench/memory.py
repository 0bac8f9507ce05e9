#!/usr/bin/env python3
"""Planned beside counted memory, and the processes that hold it, layout by layout.

    bench/memory.py [--only NAME] [--binary FILE]

Trains a few steps of a model of which parameters are the greater part. Planned and counted are tensors and the
buffers of transfers, of the fullest rank; its process has the program, text and what its buffers are recycled
in besides. The last column is what the process holds less than that of the layout in which nothing is
sharded, over what was planned.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
MIB = 1 << 20
MODEL = {"model.layers": 8, "model.hidden": 384, "model.heads": 6, "model.kv_heads": 2,
         "model.feed_forward": 1024, "model.vocabulary": 2048, "training.sequence": 64}
LAYOUTS = {
    "data 4": (4, {"layout.shard": "none"}),
    "data 4, optimizer sharded": (4, {"layout.shard": "optimizer"}),
    "data 4, gradients sharded": (4, {"layout.shard": "gradients"}),
    "data 4, parameters sharded": (4, {"layout.shard": "parameters"}),
    "data 2, parameters sharded": (2, {"layout.shard": "parameters"}),
    "hybrid 2 x 2": (4, {"layout.shard": "parameters", "layout.shard_ranks": 2}),
    "tensor 2": (2, {"layout.shard": "none", "layout.tensor": 2}),
    "context 2": (2, {"layout.shard": "none", "layout.context": 2}),
    "pipeline 2, 1f1b": (2, {"layout.shard": "none", "layout.pipeline": 2}),
    "pipeline 2, interleaved": (2, {"layout.shard": "none", "layout.pipeline": 2,
                                    "layout.virtual_stages": 2}),
    "pipeline 2, zero-bubble": (2, {"layout.shard": "none", "layout.pipeline": 2,
                                    "layout.schedule": "zero-bubble"}),
    "data 2, all recomputed": (2, {"layout.shard": "optimizer", "layout.recompute": "full"}),
    "tensor 2 x pipeline 2 x data 2": (8, {"layout.shard": "optimizer", "layout.tensor": 2,
                                           "layout.pipeline": 2}),
}


def train(binary, folder, ranks, layout):
    settings = {"cluster.accelerators": ranks, "training.global_batch": 8, "layout.micro_batch": 1,
                "layout.pipeline": 1, "training.steps": 3, "training.evaluate_every": 0,
                "training.evaluation_sequences": 4, "checkpoint.every_steps": 0,
                "recovery.replicate_every_steps": 0, "run.measure": "false",
                "run.folder": f"{folder}/runs"} | MODEL | layout
    command = [binary, "train", ROOT / "examples/tiny.toml", "--json"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    run = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    columns = ("memory_bytes_peak_by_rank_planned", "memory_bytes_peak_by_rank",
               "resident_bytes_peak_by_rank")
    return max(zip(*(run[column] for column in columns)), key=lambda rank: rank[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--binary", default=ROOT / "target/release/phalanx", type=pathlib.Path)
    a = parser.parse_args()
    first = None
    with tempfile.TemporaryDirectory() as folder:
        for name, layout in LAYOUTS.items():
            if a.only not in name:
                continue
            planned, counted, resident = train(a.binary, folder, *layout)
            first = first or (planned, resident)
            less = [before - now for before, now in zip(first, (planned, resident))]
            fallen = f", {less[1] / MIB:.0f} less over {less[0] / MIB:.0f} planned" if less[0] > 0 else ""
            print(f"{name:30} planned {planned / MIB:7.1f} MiB, counted {counted / MIB:7.1f} "
                  f"({100 * (planned / counted - 1):+.2f} %), process {resident / MIB:6.0f}{fallen}", flush=True)


if __name__ == "__main__":
    main()
