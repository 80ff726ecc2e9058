#!/bin/bash
# All tests; arguments go to pytest: scripts/test.sh tests/unit -k decay
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
exec .venv/bin/python -m pytest "$@"
