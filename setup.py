"""Builds the optional C extensions; everything else about the package is in pyproject.toml.

``optional=True``: without a compiler the package still installs and uses its paths without them.
"""

from setuptools import Extension, setup

weighted_sum = Extension(
    "wsm_megatron.kernels._weighted_sum",
    sources=["wsm_megatron/kernels/_weighted_sum.c"],
    define_macros=[("Py_LIMITED_API", "0x030A0000")],
    # No -ffast-math and no contraction: every product and every sum must be rounded.
    extra_compile_args=["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-trapping-math"],
    py_limited_api=True,
    optional=True,
)
reads = Extension(
    "wsm_megatron.storage._reads",
    sources=["wsm_megatron/storage/_reads.c"],
    define_macros=[("Py_LIMITED_API", "0x030A0000"), ("_FILE_OFFSET_BITS", "64")],
    extra_compile_args=["-O2", "-std=gnu11"],
    py_limited_api=True,
    optional=True,
)
pickle_scan = Extension(
    "wsm_megatron.safe_pickle._pickle_scan",
    sources=["wsm_megatron/safe_pickle/_pickle_scan.c"],
    define_macros=[("Py_LIMITED_API", "0x030A0000")],
    extra_compile_args=["-O2", "-std=gnu11"],
    py_limited_api=True,
    optional=True,
)

setup(
    ext_modules=[weighted_sum, reads, pickle_scan],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
