"""Plans and simulates the training of Llama-class models.

Each function answers with the object that the command of the same name prints with ``--json``. A job
is the path of a job file, its text, or a dict of its sections::

    phalanx.simulate({"model": {"name": "llama-3.1-8b"}, "cluster": {...}, "training": {...}})

``import phalanx.torch`` registers the backend ``phalanx`` of ``torch.distributed``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict, Union

from ._phalanx import Error, __version__, answer as _answer

__all__ = ["Error", "Job", "Plan", "Prediction", "Scaling", "__version__", "plan", "scale", "simulate"]

Job = Union[str, "os.PathLike[str]", Mapping[str, Any]]
"""A path, the text of a job file (whatever has a line break or a bracket in it), or its sections."""


class Plan(TypedDict, total=False):
    """What :func:`plan` answers. A job on this machine has the keys up to ``program`` only."""

    parameters: int
    layout: dict[str, Any]
    ranks: int
    microbatches: int
    flops_per_step: int
    program: str | None
    machine: str
    judged: int
    fitting: int
    stopped: bool
    plans: list[dict[str, Any]]
    front: list[dict[str, Any]]
    reasons: list[str]
    transfers: list[dict[str, Any]]
    why_not: list[str]
    placements: list[str]
    nodes: list[int] | None
    launch: list[dict[str, Any]]


class Prediction(TypedDict):
    """What :func:`simulate` answers: times of a step as means over ranks, in seconds."""

    step_time_s: float
    step_time_s_quantiles: list[float] | None
    tokens_per_s: float
    tokens_per_s_per_accelerator: float
    model_flops_utilization: float | None
    model_flops_utilization_full_attention: float | None
    compute_s: float
    exposed_communication_s: float
    hidden_communication_s: float
    pipeline_bubble_s: float
    optimizer_s: float
    exposed_communication_by_axis_s: dict[str, float]
    hidden_communication_by_axis_s: dict[str, float]
    compute_by_segment_s: dict[str, float]
    memory_bytes_peak: int | None
    memory_bytes_by_stage: list[int]
    stages: list[dict[str, Any]]
    energy_j: float | None
    energy_j_per_token: float | None
    usd: float | None
    machine: str


class Scaling(TypedDict):
    """What :func:`scale` answers: a curve for each alternative, with a point for each size."""

    job: str
    tokens_to_train: float | None
    batch: str
    baseline_accelerators: int | None
    curves: list[dict[str, Any]]
    improvements: list[dict[str, Any]]
    islands: dict[str, Any] | None
    interrupted: bool


def plan(
    job: Job,
    *,
    set: Mapping[str, Any] | None = None,
    best: int = 10,
    show_program: bool = False,
    efficiency: float | None = None,
    software: str | None = None,
) -> Plan:
    """Finds the best layouts of a job on its cluster, and says why; on this machine, its layout.

    ``set`` replaces keys of the job, as in ``{"training.steps": 20}``; ``best`` is how many plans are
    told, ``show_program`` adds every rank's instructions. Accelerators are taken to be used as was
    fitted for ``software``, or at a share ``efficiency`` of their peak.

    Raises :class:`Error` when the job is wrong or nothing fits.
    """
    options = {"best": best, "show-program": show_program, "efficiency": efficiency, "software": software}
    return _ask("plan", job, set, options)


def simulate(
    job: Job,
    *,
    set: Mapping[str, Any] | None = None,
    machine: str | os.PathLike[str] | None = None,
    efficiency: float | None = None,
    software: str | None = None,
    trace: str | os.PathLike[str] | None = None,
    chakra: str | os.PathLike[str] | None = None,
    chakra_every_rank: bool = False,
) -> Prediction:
    """Runs one step of a job in virtual time: where the time goes.

    A job on this machine needs ``machine``, the ``machine.json`` of a run. ``trace`` is a file to write
    for Perfetto, ``chakra`` a new folder for Chakra execution traces. For the rest see :func:`plan`.

    Raises :class:`Error` when the job is wrong or does not fit into memory.
    """
    options = {
        "machine": machine,
        "efficiency": efficiency,
        "software": software,
        "trace": trace,
        "chakra": chakra,
        "chakra-every-rank": chakra_every_rank,
    }
    return _ask("simulate", job, set, options)


def scale(
    job: Job,
    *,
    set: Mapping[str, Any] | None = None,
    accelerators: Iterable[int] = (),
    batch: str | Iterable[int] = (),
    fabric: Iterable[str] = (),
    accelerator: Iterable[str] = (),
    sharp: Iterable[str] = (),
    per_domain: Iterable[int] = (),
) -> Scaling:
    """Simulates a job at many sizes: efficiency, what bounds it, cost, energy and goodput.

    Each argument replaces a key of ``[scale]`` in the job: sizes, what becomes of the batch (``"fixed"``,
    ``"grows"`` or sequences for each size), and alternatives to compare.

    Raises :class:`Error` when the job is wrong or none of the sizes can be.
    """
    lists = {
        "accelerators": accelerators,
        "batch": [batch] if isinstance(batch, str) else batch,
        "fabric": fabric,
        "accelerator": accelerator,
        "sharp": sharp,
        "per-domain": per_domain,
    }
    joined = {name: ",".join(map(str, words)) for name, words in lists.items()}
    return _ask("scale", job, set, {name: words or None for name, words in joined.items()})


def _ask(command: str, job: Job, set: Mapping[str, Any] | None, options: Mapping[str, Any]) -> Any:
    """The answer of a command; options that are None or False are left out."""
    arguments = [command]
    for key, value in (set or {}).items():
        arguments += ["--set", f"{key}={json.dumps(value)}"]
    for name, value in options.items():
        if value is not None and value is not False:
            arguments.append(f"--{name}" if value is True else f"--{name}={value}")
    path, toml, table = "job", None, None
    if isinstance(job, Mapping):
        table = json.dumps(job)
    elif isinstance(job, str) and any(sign in job for sign in "\n["):
        toml = job
    else:
        path = os.fspath(job)
    return json.loads(_answer([*arguments, "--", path], toml, table))
