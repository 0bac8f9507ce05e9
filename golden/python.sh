#!/bin/sh
# Runs a Python script with the pinned versions of requirements.txt:
#
#     golden/python.sh golden/record.py
#
# PYTHON names an interpreter that has them already; without it a virtual environment is made
# once, under target/.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    venv="$root/target/golden-venv"
    # The copy of the list says which versions a finished installation has.
    if ! cmp -s "$root/golden/requirements.txt" "$venv/requirements.txt"; then
        python3 -m venv --clear "$venv"
        "$venv/bin/pip" install --quiet --requirement "$root/golden/requirements.txt"
        cp "$root/golden/requirements.txt" "$venv/requirements.txt"
    fi
    PYTHON="$venv/bin/python"
fi
exec "$PYTHON" "$@"
