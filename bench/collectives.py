#!/usr/bin/env python3
"""Times all-reduce, reduce-scatter and all-gather of fp32 sums between processes of this machine: Phalanx beside Open MPI,
MPICH, oneCCL and Gloo (through PyTorch), taking turns. Prints a table and what the machine itself allows.

    bench/collectives.py [--ranks 2,4,8] [--sizes 1024,65536,...] [--rounds 3] [--seconds 0.2] [--peers open-mpi,mpich,...]
    bench/collectives.py --tcp      all over TCP on loopback, beside Gloo, which knows nothing else

Installs what it lacks: MPIs by apt-get, oneCCL and PyTorch into virtual environments under target/peers (the Python of
$PHALANX_PYTHON is used if it has PyTorch). Peers are bound to cores as they recommend, and get the faster of in-place and
separate buffers; of every repetition the slowest rank counts, of repetitions the median, of rounds the median again.
"""
import argparse
import json
import math
import os
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "target" / "peers"
KINDS = ("all-reduce", "reduce-scatter", "all-gather")


def run(command, **options):
    return subprocess.run(command, check=True, **options)


def compile_mpi(which):
    """The MPI benchmark for one of the two MPIs, which Debian keeps apart by suffix."""
    compiler, packages = f"mpicc.{which}", {"openmpi": "openmpi-bin libopenmpi-dev", "mpich": "mpich libmpich-dev"}[which]
    if not shutil.which(compiler):
        run(["apt-get", "install", "-y", "--no-install-recommends", *packages.split()], stdout=subprocess.DEVNULL)
    program = WORK / f"mpi.{which}"
    run([compiler, "-O2", "-o", program, ROOT / "bench/peers/mpi.c"])
    return program


def environment(folder, *packages):
    """A virtual environment with these packages."""
    if not (folder / "bin/python").exists():
        run([sys.executable, "-m", "venv", folder])
        run([folder / "bin/pip", "-q", "install", *packages])
    return folder


def compile_ccl():
    ccl = environment(WORK / "ccl", "oneccl", "oneccl-devel")
    if not shutil.which("mpicc.mpich"):
        compile_mpi("mpich")
    # Intel's MPI, which comes with it, has MPICH's interface.
    shown = run(["mpicc.mpich", "-show"], capture_output=True, text=True).stdout.split()
    headers = [word for word in shown if word.startswith("-I")]
    program = WORK / "ccl-bench"
    run(["g++", "-O2", "-std=c++17", f"-I{ccl}/include", *headers, "-o", program, ROOT / "bench/peers/ccl.cpp", f"-L{ccl}/lib", "-lccl", "-lmpi", f"-Wl,-rpath,{ccl}/lib"])
    return ccl, program


def python_with_torch():
    python = os.environ.get("PHALANX_PYTHON")
    if python and subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0:
        return python
    return environment(WORK / "torch", "torch", "numpy") / "bin/python"


class Peer:
    """Something that carries out collectives: a command for a number of ranks, and what it needs in its environment."""

    def __init__(self, name, command, variables=None):
        self.name, self.command, self.variables = name, command, variables or {}

    def time(self, ranks, arguments):
        """The cells of one run: seconds by (kind, bytes), and what the machine allows if it says."""
        command = PREFIX + [str(word) for word in self.command(ranks, arguments)]
        done = subprocess.run(command, env=os.environ | self.variables, capture_output=True, text=True, timeout=900)
        if done.returncode:
            sys.exit(f"{self.name}: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        whole = next((line for line in lines if "cells" in line), {"cells": lines})
        return {(cell["kind"], cell["bytes"]): cell for cell in whole["cells"]}, whole.get("probe")


def torchrun(python):
    def command(ranks, arguments):
        script = ROOT / "bench/peers/gloo.py"
        return [python, "-m", "torch.distributed.run", "--nproc-per-node", ranks, "--master-port", free_port(), script, *arguments]

    return command


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ours(program, *more):
    def command(ranks, arguments):
        seconds, *sizes = arguments
        return [program, "bench", "collectives", "--json", "--ranks", ranks, "--seconds", seconds, "--sizes", ",".join(sizes), *more]

    return command


def open_mpi(program):
    bound = lambda ranks: ["--bind-to", "core"] if ranks <= os.cpu_count() else ["--oversubscribe"]
    return lambda ranks, arguments: ["mpirun.openmpi", "-np", ranks, *bound(ranks), program, *arguments]


def mpich(program):
    bound = lambda ranks: ["-bind-to", "core"] if ranks <= os.cpu_count() else []
    return lambda ranks, arguments: ["mpirun.mpich", "-np", ranks, *bound(ranks), program, *arguments]


def competitors(names, phalanx, tcp):
    if tcp:
        yield Peer("phalanx", ours(phalanx, "--tcp"))
        yield gloo()
        return
    yield Peer("phalanx", ours(phalanx))
    yield Peer("phalanx, own memory", ours(phalanx, "--buffers", "own"))
    if "open-mpi" in names:
        as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        yield Peer("Open MPI", open_mpi(compile_mpi("openmpi")), as_root)
    if "mpich" in names:
        yield Peer("MPICH", mpich(compile_mpi("mpich")))
    if "oneccl" in names:
        ccl, program = compile_ccl()
        variables = {"LD_LIBRARY_PATH": f"{ccl}/lib", "I_MPI_FABRICS": "shm", "CCL_ATL_TRANSPORT": "mpi", "CCL_WORKER_COUNT": "1", "CCL_LOG_LEVEL": "error"}
        yield Peer("oneCCL", lambda ranks, arguments: [ccl / "bin/mpiexec.hydra", "-np", ranks, program, *arguments], variables)
    if "gloo" in names:
        yield gloo()


def gloo():
    return Peer("Gloo", torchrun(python_with_torch()), {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"})


def size_of(size):
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def duration(seconds):
    microseconds = 1e6 * seconds
    return f"{microseconds:.2f}" if microseconds < 10 else f"{microseconds:,.0f}"


def main():
    global PREFIX
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2,4,8")
    parser.add_argument("--sizes", default="1024,65536,1048576,16777216,67108864,268435456")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", default="0.2", help="how long to measure each cell")
    parser.add_argument("--peers", default="open-mpi,mpich,oneccl,gloo")
    parser.add_argument("--tcp", action="store_true", help="TCP on loopback, beside Gloo")
    parser.add_argument("--phalanx", default=ROOT / "target/release/phalanx", type=Path)
    parser.add_argument("--prefix", default="", help="a command that runs each of the benchmarks, such as chrt")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    options = parser.parse_args()
    PREFIX = shlex.split(options.prefix)
    WORK.mkdir(parents=True, exist_ok=True)
    sizes = options.sizes.split(",")
    all_ranks = [int(ranks) for ranks in options.ranks.split(",")]
    peers = list(competitors(options.peers.split(","), options.phalanx, options.tcp))
    figures, probes = {}, []
    for turn in range(options.rounds):
        for ranks in all_ranks:
            # Everyone is first once.
            first = turn % len(peers)
            for peer in peers[first:] + peers[:first]:
                cells, probe = peer.time(ranks, [options.seconds, *sizes])
                probes += [(ranks, probe)] if probe else []
                for (kind, size), cell in cells.items():
                    figures.setdefault((kind, ranks, size), {}).setdefault(peer.name, []).append(cell)
                print(f"round {turn + 1}, {ranks} ranks: {peer.name}", file=sys.stderr, flush=True)
    if options.json:
        rows = [{"kind": kind, "ranks": ranks, "bytes": size, "cells": by_peer} for (kind, ranks, size), by_peer in figures.items()]
        options.json.write_text(json.dumps({"rows": rows, "probes": probes}, indent=1))
    report(figures, probes, [peer.name for peer in peers])


def report(figures, probes, names):
    """The table, in microseconds; ratios are of the best peer's time to ours."""
    for ranks in sorted({ranks for ranks, _ in probes}):
        of_ranks = [probe for other, probe in probes if other == ranks]
        trips = sorted(1e6 * probe["round_trip_s"] for probe in of_ranks)
        added = [probe["reduce_bytes_per_s"][-1] for probe in of_ranks]
        one, both = (statistics.median(rate[cores] for rate in added) / 1e9 for cores in ("one_core", "all_cores"))
        print(f"{ranks} ranks, {of_ranks[0]['cores']} cores: cache line there and back {trips[0]:.2f} to {trips[-1]:.2f} us; a += b from memory {one:.1f} GB/s on one core, {both:.1f} on all")
    print("\n| operation | ranks | bytes | " + " | ".join(names) + " | best peer / ours | of limit |")
    print("| --- " * (len(names) + 5) + "|")
    ratios = {}
    for (kind, ranks, size), by_peer in sorted(figures.items(), key=lambda row: (KINDS.index(row[0][0]), *row[0][1:])):
        median = {name: statistics.median(cell["median_s"] for cell in cells) for name, cells in by_peer.items()}
        limits = [cell["limit_s"] for cell in by_peer["phalanx"] if cell["limit_s"]]
        of_limit = f"{100 * statistics.median(limits) / median['phalanx']:.0f} %" if limits else "-"
        rivals = [median[name] for name in names if not name.startswith("phalanx") and name in median]
        ratio = min(rivals) / median["phalanx"] if rivals else math.nan
        ratios[kind, ranks, size] = ratio
        times = " | ".join(duration(median[name]) for name in names)
        print(f"| {kind} | {ranks} | {size_of(size)} | {times} | {ratio:.2f} | {of_limit} |")
    if ratios and not math.isnan(min(ratios.values())):
        summary("all cells", ratios.values())
        summary("from 16 MiB", [ratio for (_, _, size), ratio in ratios.items() if size >= 16 << 20])
        print(f"\nlowest: {min(ratios, key=ratios.get)}")


def summary(of, ratios):
    ratios = list(ratios)
    if ratios:
        mean = statistics.geometric_mean(ratios)
        print(f"\n{of}: geometric mean {mean:.2f}, lowest {min(ratios):.2f}, ahead in {sum(ratio >= 1 for ratio in ratios)} of {len(ratios)}, 3 times ahead in {sum(ratio >= 3 for ratio in ratios)}")


if __name__ == "__main__":
    main()
