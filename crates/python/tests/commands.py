"""plan, simulate and scale answer what the commands print; their errors are what the commands say.

Takes the path of the command.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib

import phalanx

COMMAND = sys.argv[1]
CLOSED, OPEN = "examples/llama-3.1-405b-8192.toml", "examples/llama-3.1-405b-8192-open.toml"


def printed(*arguments):
    done = subprocess.run([COMMAND, *arguments, "--json"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def said(*arguments):
    done = subprocess.run([COMMAND, *arguments], capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr.removeprefix("phalanx: ").rstrip()


def answers_are_those_of_the_command():
    path = simulated = printed("simulate", CLOSED)
    text = open(CLOSED).read()
    for job in (CLOSED, text, tomllib.loads(text)):
        assert phalanx.simulate(job) == simulated
    assert set(path) == set(phalanx.Prediction.__annotations__)
    smaller = phalanx.simulate(CLOSED, set={"training.global_batch": 1024, "training.precision": "bf16"})
    assert smaller == printed(
        "simulate", CLOSED, "--set", "training.global_batch=1024", "--set", "training.precision=bf16"
    )
    scaled = phalanx.scale(CLOSED, accelerators=[4096, 8192], batch="fixed")
    assert scaled == printed("scale", CLOSED, "--accelerators", "4096,8192", "--batch", "fixed")
    assert set(scaled) == set(phalanx.Scaling.__annotations__)
    local = phalanx.plan("examples/tiny.toml", show_program=True)
    assert local == printed("plan", "examples/tiny.toml", "--show-program")


def plans_are_those_of_the_command_and_python_goes_on():
    beats, planned = 0, []
    ask = lambda: planned.append(phalanx.plan(OPEN, best=2, software="mlperf-v5.0"))
    thread = threading.Thread(target=ask)
    thread.start()
    while thread.is_alive():
        beats += 1
        time.sleep(0.01)
    assert beats > 10, beats
    assert planned[0] == printed("plan", OPEN, "--best", "2", "--software", "mlperf-v5.0")
    assert set(planned[0]) == set(phalanx.Plan.__annotations__)


def errors_are_what_the_command_says():
    def error(call, *arguments, **keywords):
        try:
            call(*arguments, **keywords)
        except phalanx.Error as error:
            return str(error)
        raise AssertionError("there is no error")

    assert error(phalanx.plan, "no-such.toml") == said("plan", "no-such.toml")
    assert error(phalanx.simulate, CLOSED, software="none") == said("simulate", CLOSED, "--software", "none")
    too_large = {"layout.tensor": 1, "layout.pipeline": 1}
    options = [word for key, value in too_large.items() for word in ("--set", f"{key}={value}")]
    assert error(phalanx.simulate, CLOSED, set=too_large) == said("simulate", CLOSED, "--json", *options)
    assert "did you mean `global_batch`" in error(phalanx.plan, "[training]\nglobel_batch = 1")
    assert "machine.json" in error(phalanx.simulate, "examples/tiny.toml")


def an_interrupt_ends_planning():
    # Where a shell starts this in the background, interrupts are ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    begun = time.monotonic()
    try:
        phalanx.plan(OPEN, best=2, software="mlperf-v5.0")
    except KeyboardInterrupt:
        return print(f"interrupted after {time.monotonic() - begun:.2f} s of planning, asked to after 0.30")
    raise AssertionError("planning went on")


for check in (
    answers_are_those_of_the_command,
    plans_are_those_of_the_command_and_python_goes_on,
    errors_are_what_the_command_says,
    an_interrupt_ends_planning,
):
    check()
    print("ok:", check.__name__.replace("_", " "))
