#!/usr/bin/env python3
"""Tokens per second beside PyTorch, in one run on one machine.

    bench/compare.py [--rounds N] [--steps N]

Builds Phalanx, then takes turns (PyTorch through golden/python.sh, which installs it pinned, or uses
the interpreter that PYTHON names): Phalanx on 1 rank, PyTorch eager on 1 rank, Phalanx on 2 ranks,
PyTorch DDP (gloo) on 2 ranks, N rounds, one thread a rank, the same model (`small` of the catalogue:
8 layers, hidden 512) and the same batch (4 x 256 tokens a rank). Prints the median and the range of
each, and the median of the ratios taken within a round.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
JOB = """
[model]
name = "small"
[cluster]
accelerators = {ranks}
[data]
text = [
    "${{CARGO_HOME:-~/.cargo}}/registry/src/*/tokenizers-*/src/**/*.rs",
    "${{CARGO_HOME:-~/.cargo}}/registry/src/*/clap_builder-*/src/**/*.rs",
    "${{CARGO_HOME:-~/.cargo}}/registry/src/*/regex-automata-*/src/**/*.rs",
]
[training]
sequence = 256
global_batch = {batch}
steps = {steps}
evaluate_every = 0
evaluation_sequences = 4
[layout]
micro_batch = 4
[run]
folder = "{folder}/runs"
measure = false
"""


def phalanx(ranks, steps, folder):
    job = pathlib.Path(folder) / f"small-{ranks}.toml"
    job.write_text(JOB.format(ranks=ranks, batch=4 * ranks, steps=steps, folder=folder))
    command = [ROOT / "target/release/phalanx", "train", job, "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["tokens_per_s"]


def pytorch(ranks, steps):
    script = [ROOT / "golden/python.sh", ROOT / "bench/pytorch.py"]
    command = [*script, "--ranks", str(ranks), "--threads", "1"]
    command += ["--steps", str(steps - 2), "--warmup", "2"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])["tokens_per_s"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    subprocess.run(["cargo", "build", "--release", "-q"], cwd=ROOT, check=True)
    rows = {"phalanx 1": [], "pytorch 1": [], "phalanx 2": [], "pytorch 2": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            for ranks in (1, 2):
                rows[f"phalanx {ranks}"].append(phalanx(ranks, arguments.steps, folder))
                rows[f"pytorch {ranks}"].append(pytorch(ranks, arguments.steps))
            print(*(f"{name} {values[-1]:.0f}" for name, values in rows.items()), sep=", ")
    for name, values in rows.items():
        print(f"{name} rank(s): {statistics.median(values):.0f} tokens/s "
              f"({min(values):.0f} to {max(values):.0f})")
    ratio = lambda a, b, scale=1: statistics.median(
        scale * x / y for x, y in zip(rows[a], rows[b]))
    print(f"ratio on 1 rank  {ratio('phalanx 1', 'pytorch 1'):.2f}")
    print(f"ratio on 2 ranks {ratio('phalanx 2', 'pytorch 2'):.2f}")
    print(f"scaling efficiency 1 to 2: phalanx {ratio('phalanx 2', 'phalanx 1', 0.5):.3f}, "
          f"pytorch {ratio('pytorch 2', 'pytorch 1', 0.5):.3f}")


if __name__ == "__main__":
    main()
