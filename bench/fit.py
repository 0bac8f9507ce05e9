#!/usr/bin/env python3
"""Fits measured/calibration.toml on the rows of measured/steps.csv that are declared `fit`.

    cargo build --release
    python bench/fit.py [NAME...]      # the groups of bench/fit.toml to fit; all when none is named

Needs scipy (`pip install scipy`). A group is one generation of software on one or more accelerators;
its parameters are found by least squares on the logarithm of predicted over measured step time, with
every parameter held near the group's starting value (a ridge), so that what the rows do not tell stays
where physics and the neighbouring generation put it.
"""
import csv, json, math, pathlib, subprocess, sys, tempfile, tomllib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.optimize import least_squares

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINARY = pathlib.Path(__import__("os").environ.get("PHALANX", ROOT / "target/release/phalanx"))
TARGET = ROOT / "measured/calibration.toml"
# A parameter that moves by this share of itself costs as much as a row that is off by `ERROR`.
MOVES, ERROR = 1.0, 0.02
# The best that products and attention have been measured at, as shares of peak: 271 of 312 TFLOP/s on A100,
# 795 of 989 on H100, 1,403 of 1,979 in fp8 (ml-engineering book, matmul ceilings); 740 of 989 for attention
# (FlashAttention-3, 2024). Bandwidths stay below what the library's own model promises.
LIMITS = {"product_wide": 0.87, "product_eight": 0.87, "product_four": 0.87, "grouped": 1.0, "attention_forward": 0.75,
          "attention_backward": 0.65, "memory": 0.95, "domain": 1.0, "fabric": 1.0, "tensor_exposed": 1.0}


def number(value):
    return f"{value:.4g}" if value >= 1e-3 or value == 0 else f"{value:.3e}"


def entry(group):
    lines = ["[[calibration]]"]
    for key in ("software", "accelerators", "usual_for", "fitted_on"):
        lines += [f"{key} = {json.dumps(group[key])}"] if key in group else []
    for table in ("kernels", "traffic"):
        lines.append(f"[calibration.{table}]")
        lines += [f"{key} = {number(value)}" for key, value in group[table].items()]
    return "\n".join(lines) + "\n"


def fit_rows(group):
    return [row for row in csv.DictReader((ROOT / "measured/steps.csv").open())
            if row["set"] == "fit" and row["software"] in group["software"] and row["accelerator"] in group["accelerators"]]


def thinned(group):
    """Of rows that differ in size alone, the smallest and the largest: a curve's ends say what its middle
    would, in a fraction of the time."""
    rows = fit_rows(group)
    curves = {}
    for row in rows:
        same = ("software", "accelerator", "model", "layers", "hidden", "heads", "precision", "micro_batch", "tensor",
                "context", "pipeline", "virtual_stages", "expert", "shard", "recompute", "sequence", "options")
        curves.setdefault(tuple(row[key] for key in same), []).append(row)
    chosen = []
    for curve in curves.values():
        curve.sort(key=lambda row: (int(row["accelerators"]), int(row["global_batch"] or 0)))
        chosen += [curve[0]] if len(curve) == 1 else [curve[0], curve[-1]]
    return chosen


def evaluate(group, which="fit", rows=None):
    """Predicted over measured of the group's rows."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(entry(group))
        file.flush()
        command = [BINARY, "validate", "--calibration", file.name, "--json", "--set", which]
        command += ["--rows", rows] if rows else []
        for name in group["software"]:
            command += ["--software", name]
        for name in group["accelerators"]:
            command += ["--accelerator", name]
        out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode not in (0, 1) or not out.stdout:
        sys.exit(out.stderr)
    rows = json.loads(out.stdout)["rows"]
    return [row for row in rows if row.get("quantity") in ("step_time", "mfu") and row.get("predicted")]


def ratio(row):
    r = row["predicted"] / row["measured"]
    return 1 / r if row["quantity"] == "mfu" else r


def place(group, key):
    return group["kernels"] if key in group["kernels"] else group["traffic"]


def fit(group):
    free = group["free"]
    table = tempfile.NamedTemporaryFile("w", suffix=".csv")
    chosen = thinned(group) if group.get("slow") else fit_rows(group)
    if not chosen:
        return group
    writer = csv.DictWriter(table, chosen[0].keys())
    writer.writeheader()
    writer.writerows(chosen)
    table.flush()
    start = np.log([place(group, key)[key] for key in free])

    def at(x):
        trial = json.loads(json.dumps(group))
        for key, value in zip(free, np.exp(x)):
            place(trial, key)[key] = float(value)
        return trial

    def residuals(x):
        rows = evaluate(at(x), rows=table.name)
        errors = [math.log(ratio(row)) for row in rows]
        return np.concatenate([errors, ERROR / MOVES * (x - start)])

    def jacobian(x):
        base = residuals(x)
        with ThreadPoolExecutor(2) as pool:
            moved = list(pool.map(lambda i: residuals(x + 0.02 * np.eye(len(x))[i]), range(len(x))))
        return np.stack([(m - base) / 0.02 for m in moved], axis=1)

    # Shares of what the hardware can do stay below it.
    above = np.array([math.log(LIMITS[key]) if key in LIMITS else 10.0 for key in free])
    start = np.minimum(start, above - 0.01)
    found = least_squares(residuals, start, jacobian, bounds=(-30.0, above), loss="soft_l1",
                          f_scale=0.05, max_nfev=int(group.get("rounds", 30)), xtol=1e-3, ftol=3e-4)
    group = at(found.x)
    for which in ("fit", "held-out"):
        errors = sorted(abs(ratio(row) - 1) * 100 for row in evaluate(group, which))
        if errors:
            print(f"{'/'.join(group['software'])} on {'/'.join(group['accelerators'])}, {which}: {len(errors)} rows,"
                  f" median {errors[len(errors) // 2]:.2f} %, mean {sum(errors) / len(errors):.2f} %, worst {errors[-1]:.1f} %")
    return group


def identity(group):
    return (tuple(group["software"]), tuple(group["accelerators"]))


def parameters(plan, group, known):
    """The group with the parameters it starts from: those fitted last, or the common ones."""
    tables = {table: dict(plan["start"][table]) for table in ("kernels", "traffic")}
    for old in known:
        if identity(old) == identity(group):
            for table in tables:
                tables[table].update(old[table])
    return {**group, **tables, "free": group.get("free", plan["free"])}


def main():
    plan = tomllib.loads((ROOT / "bench/fit.toml").read_text())
    known = tomllib.loads(TARGET.read_text())["calibration"] if TARGET.exists() else []
    groups = {name: parameters(plan, group, known) for name, group in plan["group"].items()}
    for name in sys.argv[1:] or groups:
        groups[name] = fit(groups[name])
        write(groups.values())


def write(groups):
    head = "# Written by bench/fit.py from bench/fit.toml; what each parameter means: crates/sim/src/device.\n\n"
    TARGET.write_text(head + "\n".join(entry(group) for group in groups))


if __name__ == "__main__":
    main()
