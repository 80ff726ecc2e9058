#!/bin/bash
# Create .venv with everything that the demo, the tests and the linters need. Run again, it does
# nothing until constraints.txt, pyproject.toml, setup.py or a C source has changed.
#
# PYTHON            interpreter for a new .venv (default: python3; 3.11 or newer for the pins)
# TORCH_INDEX       package index to take torch from, for instance PyTorch's CPU wheels
# ALLOW_CUDA_TORCH  1: take torch's CUDA build (gigabytes) although no GPU is seen here
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
stamp=.venv/wsm-setup.stamp
export PIP_CONSTRAINT=$PWD/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1

wanted() {
    cat constraints.txt pyproject.toml setup.py wsm_megatron/*/*.c | sha256sum
}

# torch first and alone: one plain name can mean a CPU or a CUDA build, depending on the index.
install_torch() {
    local pip_install=("$python" -m pip install --quiet)
    [[ -z ${TORCH_INDEX:-} ]] || pip_install+=(--index-url "$TORCH_INDEX")
    if ! command -v nvidia-smi >/dev/null && [[ ${ALLOW_CUDA_TORCH:-0} != 1 ]] &&
        "${pip_install[@]}" --dry-run --report - torch | grep -Eq '"name": *"nvidia-'; then
        echo "setup.sh: the index offers the CUDA build of torch and no GPU is seen here." >&2
        echo "Set TORCH_INDEX to an index of CPU wheels, or ALLOW_CUDA_TORCH=1." >&2
        exit 1
    fi
    "${pip_install[@]}" torch
}

if [[ -f $stamp && $(<"$stamp") == "$(wanted)" ]]; then
    exit 0
fi
[[ -x $python ]] || "${PYTHON:-python3}" -m venv .venv
echo "setup.sh: installing into .venv" >&2
"$python" -m pip install --quiet setuptools
"$python" -c 'import torch' 2>/dev/null || install_torch
"$python" -m pip install --quiet --no-build-isolation -e '.[dev,megatron,plot,search]'
wanted >"$stamp"
