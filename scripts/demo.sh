#!/bin/bash
# A merge of a shipped run, in seconds. Then two CPU ranks of megatron-core train a small GPT on Python's
# own sources at a constant LR, `wsm merge` merges the last checkpoints, and the held-out losses are
# compared: under 4 minutes on 2 cores. Results: demo-out/losses.png, demo-out/losses.json.
# Options: scripts/demo.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
export PATH=$PWD/.venv/bin:$PATH
exec python -m examples.demo "$@"
