#!/usr/bin/env bash
# Start a throw-away Slurm, run the tests that need one, stop it. Without Slurm: skip, and say so.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
root="$(mktemp -d)"
export SLURM_TEST_ROOT="${root}"
trap 'tests/slurm/stop-slurm.sh; rm -rf "${root}"' EXIT
environment="$(tests/slurm/start-slurm.sh)"
status=$?
if ((status == 77)); then
    echo "SKIPPED tests/slurm: Slurm cannot run here, for the reason above" >&2
    exit 0
fi
((status == 0)) || exit "${status}"
eval "${environment}"
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m slurm tests/slurm "$@"
