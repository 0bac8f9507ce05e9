#!/usr/bin/env python3
"""Fits measured/calibration.toml on the rows of measured/steps.csv that are declared `fit`.

    cargo build --release
    python bench/fit.py [NAME...]      # the groups of bench/fit.toml to fit; all when none is named

Needs scipy (`pip install scipy`). A group is one generation of software on one or more accelerators;
its parameters are found by least squares on the logarithm of predicted over measured step time, with
every parameter held near the group's starting value (a ridge), so that what the rows do not tell stays
where physics and the neighbouring generation put it. Nothing is taken from the last fit: the rows and
bench/fit.toml alone say what comes out.
"""
import csv, json, math, pathlib, subprocess, sys, tempfile, tomllib

import numpy as np
from scipy.optimize import least_squares

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINARY = pathlib.Path(__import__("os").environ.get("PHALANX", ROOT / "target/release/phalanx"))
TARGET = ROOT / "measured/calibration.toml"
# A parameter that moves by so many times itself costs as much as a row that is off by `ERROR`.
MOVES, ERROR = 2.0, 0.02
# The best that products and attention have been measured at, as shares of peak: 271 of 312 TFLOP/s on A100,
# 795 of 989 on H100, 1,403 of 1,979 in fp8 (ml-engineering book, matmul ceilings); 740 of 989 for attention
# (FlashAttention-3, 2024). Bandwidths stay below what the library's own model promises, and delays between steps
# below what MLPerf's logs show.
LIMITS = {"product_wide": 0.87, "product_eight": 0.87, "product_four": 0.87, "grouped": 1.0, "attention_forward": 0.75,
          "attention_backward": 0.65, "memory": 0.95, "power": 1.0, "elementwise": 2.5, "expert_exposed": 1.0, "domain": 1.0, "fabric": 1.0, "tensor_exposed": 1.0,
          "step": 0.02}
# Who casts an operand writes it in eight bits, twice where it is kept transposed as well, though it may have been at
# hand: no less than half of what reading and writing it once takes.
LEAST = {"cast": 0.5}


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


RESULTS = ("id", "table", "software", "step_time_s", "mfu_percent", "memory_gib", "note")


def distinct(rows):
    """One row for each configuration, and how often and with what mean logarithm it was measured."""
    same = {}
    for row in rows:
        same.setdefault(tuple(value for key, value in row.items() if key not in RESULTS), []).append(row)
    return [(repeats[0], math.sqrt(len(repeats)), np.mean([measured(row) for row in repeats])) for repeats in same.values()]


def measured(row):
    """The logarithm of the step time, or of what is inverse to it."""
    return math.log(float(row["step_time_s"])) if row["step_time_s"] else -math.log(float(row["mfu_percent"]))


def shortened(row):
    """Two rows with few microbatches, and the weights that make their step times the row's: once a
    pipeline is full, each further microbatch takes as long as the one before."""
    ranks = math.prod(int(row[key] or 1) for key in ("tensor", "context", "pipeline"))
    data = int(row["accelerators"]) // ranks
    each = data * int(row["micro_batch"] or 1)
    count, stages = int(row["global_batch"] or 0) // each, int(row["pipeline"] or 1)
    few, more = 2 * stages, 4 * stages
    if not row["step_time_s"] or count <= few + more:
        return [(row, 1.0)]
    share = (count - few) / (more - few)
    short = lambda microbatches: {**row, "id": f"{row['id']}-{microbatches}", "global_batch": microbatches * each}
    return [(short(few), 1 - share), (short(more), share)]


def evaluate(groups, which="fit", rows=None):
    """For each of the groups, which differ in parameters alone, the answers by row."""
    files = [tempfile.NamedTemporaryFile("w", suffix=".toml") for _ in groups]
    command = [BINARY, "validate", "--json", "--set", which]
    for file, group in zip(files, groups):
        file.write(entry(group))
        file.flush()
        command += ["--calibration", file.name]
    command += ["--rows", rows] if rows else []
    for name in groups[0]["software"]:
        command += ["--software", name]
    for name in groups[0]["accelerators"]:
        command += ["--accelerator", name]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode not in (0, 1) or not out.stdout:
        sys.exit(out.stderr)
    decoder, text, reports = json.JSONDecoder(), out.stdout, []
    while text.strip():
        report, end = decoder.raw_decode(text)
        reports.append({row["id"]: row for row in report["rows"] if row.get("predicted")})
        text = text[end:].lstrip()
    return reports


def ratio(row):
    r = row["predicted"] / row["measured"]
    return 1 / r if row["quantity"] == "mfu" else r


def time_of(row):
    """As `measured`, of an answer."""
    return row["predicted"] if row["quantity"] == "step_time" else 1 / row["predicted"]


def place(group, key):
    return group["kernels"] if key in group["kernels"] else group["traffic"]


def fit(group):
    free = group["free"]
    table = tempfile.NamedTemporaryFile("w", suffix=".csv")
    targets = [(shortened(row), weight, target) for row, weight, target in distinct(fit_rows(group))]
    if not targets:
        return group
    writer = csv.DictWriter(table, targets[0][0][0][0].keys())
    writer.writeheader()
    writer.writerows(row for short, _, _ in targets for row, _ in short)
    table.flush()
    start = np.log([max(place(group, key)[key], 1e-7) for key in free])

    def at(x):
        trial = json.loads(json.dumps(group))
        for key, value in zip(free, np.exp(x)):
            place(trial, key)[key] = float(value)
        return trial

    def residuals(xs):
        reports = evaluate([at(x) for x in xs], rows=table.name)
        return [np.concatenate([errors(report), ERROR / MOVES * (x - start)]) for x, report in zip(xs, reports)]

    def errors(report):
        known = [target for target in targets if all(row["id"] in report for row, _ in target[0])]
        return [weight * (math.log(sum(share * time_of(report[row["id"]]) for row, share in short)) - target)
                for short, weight, target in known]

    def jacobian(x):
        base, *moved = residuals([x] + [x + 0.02 * np.eye(len(x))[i] for i in range(len(x))])
        return np.stack([(m - base) / 0.02 for m in moved], axis=1)

    # Shares of what the hardware can do stay below it, and above what the group says.
    above = np.array([math.log(LIMITS[key]) if key in LIMITS else 10.0 for key in free])
    least = LEAST | group.get("least", {})
    below = np.array([math.log(least[key]) if key in least else -30.0 for key in free])
    start = np.clip(start, below + 0.01, above - 0.01)
    found = least_squares(lambda x: residuals([x])[0], start, jacobian, bounds=(below, above), loss="soft_l1",
                          f_scale=0.05, max_nfev=int(group.get("rounds", 30)), xtol=1e-3, ftol=3e-4)
    group = at(found.x)
    for which in ("fit", "held-out"):
        errors_of = sorted(abs(ratio(row) - 1) * 100 for row in evaluate([group], which)[0].values())
        if errors_of:
            print(f"{'/'.join(group['software'])} on {'/'.join(group['accelerators'])}, {which}: {len(errors_of)} rows,"
                  f" median {errors_of[len(errors_of) // 2]:.2f} %, mean {sum(errors_of) / len(errors_of):.2f} %,"
                  f" worst {errors_of[-1]:.1f} %", flush=True)
    return group


def identity(group):
    return (tuple(group["software"]), tuple(group["accelerators"]))


def parameters(plan, name, fitted):
    """The group of that name as it starts: with the common parameters, or those fitted of the group it is like,
    but for its own."""
    group = plan["group"][name]
    base, own = fitted[group["like"]] if "like" in group else plan["start"], group.get("start", {})
    tables = {table: {key: own.get(key, value) for key, value in base[table].items()} for table in ("kernels", "traffic")}
    return {"free": plan["free"], **group, **tables}


def kept(group, old):
    """The group with what was fitted of it before."""
    for key in group["free"] if old else []:
        place(group, key)[key] = place(old, key)[key]
    return group


def main():
    plan = tomllib.loads((ROOT / "bench/fit.toml").read_text())
    names = sys.argv[1:] or plan["group"]
    if unknown := set(names) - set(plan["group"]):
        sys.exit(f"bench/fit.toml has no group {', '.join(sorted(unknown))}; it has {', '.join(plan['group'])}")
    last = tomllib.loads(TARGET.read_text())["calibration"] if TARGET.exists() else []
    last = {identity(old): old for old in last}
    last = {name: last[identity(group)] for name, group in plan["group"].items() if identity(group) in last}
    fitted = {}
    for name in plan["group"]:
        group = parameters(plan, name, fitted)
        fitted[name] = fit(group) if name in names else kept(group, last.get(name))
        so_far = last | fitted
        write(so_far[name] for name in plan["group"] if name in so_far)


def write(groups):
    """After every group, so that what is stopped is not lost."""
    head = "# Written by bench/fit.py from bench/fit.toml; what each parameter means: crates/sim/src/device.\n\n"
    TARGET.write_text(head + "\n".join(entry(group) for group in groups))


if __name__ == "__main__":
    main()
