#!/bin/bash
# All tests, on three workers: two keep two cores busy while one waits for Slurm or for a lost rank.
# With arguments, which go to pytest, in one process: scripts/test.sh tests/unit -k decay
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
PATH=$PATH:/usr/sbin command -v slurmctld >/dev/null ||
    echo "test.sh: Slurm is not installed (Debian: slurm-wlm munge): its tests are skipped" >&2
(($#)) || set -- -n 3 --no-loadscope-reorder
exec .venv/bin/python -m pytest "$@"
