#!/bin/bash
# scripts/wheel.sh [DIST]: build the sdist, and a wheel for every Python from 3.10 on (abi3) that carries
# a manylinux tag, into dist/.
set -euo pipefail
dist=$(realpath -m "${1:-$(dirname "$0")/../dist}")
cd "$(dirname "$0")/.."
scripts/setup.sh
python=$PWD/.venv/bin/python
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
"$python" -m build --no-isolation --outdir "$built" . >/dev/null
mkdir -p "$dist"
cp "$built"/*.tar.gz "$dist"
PATH=$PWD/.venv/bin:$PATH "$python" -m auditwheel repair --wheel-dir "$dist" "$built"/*.whl
ls -l "$dist"
