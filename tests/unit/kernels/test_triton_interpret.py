"""The Triton kernel without a GPU: run by Triton's interpreter, and compiled for sm_90."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")


@pytest.mark.filterwarnings("ignore")
def test_interpreted_kernel_gives_the_same_bits():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.unit.kernels.test_triton_interpret"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "interpreted: all cases pass\n"


def interpreted() -> None:
    """Runs in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    from tests import kernel_cases as cases
    from wsm_megatron.kernels.triton_kernel import bind

    def weighted_sum(*arguments):
        return bool(bind(*arguments)())

    for case in cases.CASES:
        case(weighted_sum)
    cases.random_mixes(weighted_sum, [1, 511, 512, 1024, 1025, 2500, 64, 3, 7, 1024])
    print("interpreted: all cases pass")


@pytest.mark.parametrize(("pointer", "loads"), [("*i16", 2), ("*fp32", 4)])
def test_compiled_kernel_is_not_fused_and_loads_16_bytes(pointer, loads):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wsm_megatron.kernels.triton_kernel import weighted_sum_kernel

    signature = {
        "sources": (pointer, pointer),
        "outputs": (pointer,),
        "coefficients": "*fp64",
        "flag": "*i32",
        "numel": "i64",
        "BLOCK": "constexpr",
        "MASKED": "constexpr",
    }
    aligned = {path: [["tt.divisibility", 16]] for path in ((0, 0), (0, 1), (1, 0))}
    constants = {"BLOCK": 1024, "MASKED": False}
    source = ASTSource(weighted_sum_kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = kernel.asm["ptx"]
    # 8 elements a thread: a output for each of 2 sources, one sum.
    assert len(re.findall(r"\bmul\.rn\.f64\b", ptx)) == 16
    assert len(re.findall(r"\badd\.rn\.f64\b", ptx)) == 8
    assert "fma" not in ptx
    assert len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", ptx)) == loads


if __name__ == "__main__":
    interpreted()
