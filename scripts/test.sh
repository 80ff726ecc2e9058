#!/bin/bash
# All tests; arguments go to pytest: scripts/test.sh tests/unit -k decay
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
PATH=$PATH:/usr/sbin command -v slurmctld >/dev/null ||
    echo "test.sh: Slurm is not installed (Debian: slurm-wlm munge): its tests are skipped" >&2
exec .venv/bin/python -m pytest "$@"
