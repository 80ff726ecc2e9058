from __future__ import annotations

import logging
import math
import sys
from importlib import metadata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import kernel_cases as cases
from tests.kernel_cases import BF16, DTYPES, FP16, FP32, FP64
from wsm_megatron import kernels
from wsm_megatron.kernels import backend, reference, weighted_sum
from wsm_megatron.kernels.reference import round_once


def native(sources, coefficients, outputs):
    module = pytest.importorskip("wsm_megatron.kernels.native", exc_type=ImportError)
    return module.bind(sources, coefficients, outputs)()


def eager(sources, coefficients, outputs):
    return reference.weighted_sum(sources, coefficients, outputs)


PATHS = pytest.mark.parametrize("path", [native, eager])
#: Around the blocks of both paths.
SIZES = [1, 2, 7, 63, 64, 65, 319, 320, 321, 447, 448, 449, 1000, 16383, 16384, 16385]


@PATHS
@pytest.mark.parametrize("case", cases.CASES)
def test_case(path, case):
    case(path)


@PATHS
def test_sizes_and_mixed_dtypes(path):
    cases.random_mixes(path, SIZES)


VALUES = st.one_of(
    st.floats(width=64),
    st.floats(width=32),
    st.floats(width=16),
    st.sampled_from([0.0, -0.0, 2.0**-126, 2.0**-133, 2.0**-134, 65504.0, 65519.999, 3.39e38]),
)


@st.composite
def problems(draw):
    n, m, size = draw(st.integers(1, 7)), draw(st.integers(1, 6)), draw(st.integers(1, 20))
    some = st.sampled_from(DTYPES)
    columns = st.lists(VALUES, min_size=size, max_size=size)
    sources = [torch.tensor(draw(columns), dtype=FP64).to(draw(some)) for _ in range(n)]
    finite = st.floats(-1e3, 1e3) | st.floats(allow_nan=False, allow_infinity=False)
    rows = draw(st.lists(st.lists(finite, min_size=n, max_size=n), min_size=m, max_size=m))
    return sources, rows, [draw(some) for _ in range(m)]


@PATHS
@given(problem=problems())
def test_any_values(path, problem):
    cases.check(path, *problem)


@given(st.lists(VALUES, min_size=1, max_size=8), st.sampled_from(DTYPES))
def test_round_once_is_exact_rounding(values, dtype):
    got = round_once(torch.tensor(values, dtype=FP64), dtype)
    want = torch.tensor([cases.nearest(value, dtype) for value in values], dtype=FP64).to(dtype)
    assert cases.same(got, want)


def test_round_once_does_not_round_twice():
    # Just above a tie of bfloat16; float32 rounds it onto the tie, and the tie rounds down.
    value = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=FP64)
    assert round_once(value, BF16).item() == 1 + 2.0**-7
    assert value.to(FP32).to(BF16).item() == 1.0


@PATHS
def test_sum_starts_from_the_first_product(path):
    output = torch.full((3,), 7.0)
    assert path([torch.zeros(3, dtype=BF16)], [[-1.0]], [output])
    assert output.signbit().all()  # -0.0; a sum that starts from 0.0 gives +0.0


@PATHS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("position", [0, 448, 20000])
def test_one_value_that_is_not_finite_is_reported(path, dtype, value, position):
    source = torch.ones(20001, dtype=dtype)
    outputs = [torch.empty(20001), torch.empty(20001, dtype=dtype)]
    assert path([source, source], [[1.0, 2.0], [0.5, 0.5]], outputs) is True
    source[position] = value
    assert path([source], [[1.0], [0.5]], outputs) is False


@PATHS
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_overflow_of_the_output_is_reported(path, dtype):
    largest = torch.finfo(dtype).max
    source = torch.tensor([largest, -largest], dtype=FP64)
    output = torch.empty(2, dtype=dtype)
    assert path([source], [[1.0]], [output]) is True
    assert path([source], [[1.01]], [output]) is False
    assert output.tolist() == [math.inf, -math.inf]


@PATHS
def test_cutting_a_tensor_into_calls_changes_no_bit(path):
    generator = torch.Generator().manual_seed(1)
    sources = [cases.spread(3001, dtype, generator) for dtype in (BF16, FP32, BF16, FP16, FP64)]
    row = [[0.1, 0.2, -0.3, 0.4, 0.6]]
    whole, parts = torch.empty(3001, dtype=BF16), torch.empty(3001, dtype=BF16)
    path(sources, row, [whole])
    for start in range(0, 3001, 577):
        part = slice(start, min(start + 577, 3001))
        path([source[part] for source in sources], row, [parts[part]])
    assert cases.same(parts, whole)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64])
def test_native_reads_and_writes_unaligned_addresses(dtype):
    size = 1001 * dtype.itemsize
    aligned = torch.randn(1001, dtype=FP64).to(dtype)
    memory = bytearray(1) + aligned.view(torch.uint8).numpy().tobytes()
    source = torch.frombuffer(memory, dtype=dtype, offset=1)
    output = torch.frombuffer(bytearray(size + 1), dtype=dtype, offset=1)
    assert source.data_ptr() % dtype.itemsize == 1
    assert native([source, source], [[0.75, 0.25]], [output])
    assert cases.same(output, aligned)


def test_native_keeps_subnormals_when_the_process_flushes_them():
    source, output = torch.tensor([2.0**-140, 2.0**-133]), torch.empty(2, dtype=BF16)
    assert torch.set_flush_denormal(True)
    try:
        native([source], [[128.0]], [output])
        flushed = source * 1.0
    finally:
        torch.set_flush_denormal(False)
    assert output.tolist() == [2.0**-133, 2.0**-126]
    assert flushed.tolist() == [0.0, 0.0]  # and the caller's mode is as it was


def test_empty_tensors():
    assert weighted_sum([torch.empty(0)], [[1.0]], [torch.empty(0)]) is True


def test_integer_coefficients():
    output = torch.empty(2)
    assert weighted_sum([torch.ones(2), torch.ones(2)], [[1, 2]], [output])
    assert output.tolist() == [3.0, 3.0]


ONE = torch.ones(4)
MEMORY = torch.ones(8)


@pytest.mark.parametrize(
    ("sources", "coefficients", "outputs", "message"),
    [
        ([], [[]], [ONE], "at least one source"),
        ([ONE], [], [], "at least one source and one output"),
        ([ONE], [[1.0], [1.0]], [torch.empty(4)], "2 rows of coefficients for 1 outputs"),
        ([ONE], [[1.0, 2.0]], [torch.empty(4)], "row 0 has 2 coefficients for 1 sources"),
        ([ONE], [[math.nan]], [torch.empty(4)], "row 0 has a coefficient that is not finite"),
        ([ONE.long()], [[1.0]], [torch.empty(4)], "source 0 is torch.int64; supported: "),
        ([ONE], [[1.0]], [torch.empty(4, dtype=torch.int8)], "output 0 is torch.int8"),
        ([ONE, torch.ones(2, 2)], [[1.0, 1.0]], [torch.empty(4)], r"source 1 .* shape is \(2, 2\)"),
        ([MEMORY[::2]], [[1.0]], [torch.empty(4)], "source 0 must be one-dimensional and cont"),
        ([torch.ones(5)], [[1.0]], [torch.empty(4)], "source 0 has 5 elements, output 0 has 4"),
        ([ONE.to("meta")], [[1.0]], [torch.empty(4)], "source 0 is on meta, output 0 on cpu"),
        ([MEMORY[:4]], [[1.0]], [MEMORY[3:7]], "output 0 and source 0 share memory"),
        ([ONE], [[1.0], [1.0]], [MEMORY[:4], MEMORY[2:6]], "output 0 and output 1 share memory"),
    ],
)
def test_bad_arguments(sources, coefficients, outputs, message):
    with pytest.raises(ValueError, match=message):
        weighted_sum(sources, coefficients, outputs)


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="works on cpu and cuda tensors, not on meta"):
        backend("meta")


def test_extension_refuses_arguments_that_do_not_fit_together():
    run = pytest.importorskip("wsm_megatron.kernels._weighted_sum").run
    with pytest.raises(ValueError, match="do not fit together"):
        run(1, (0,), b"\x00", (1.0, 2.0), (0,), b"\x00")
    with pytest.raises(ValueError, match="do not fit together"):
        run(1, (0,), b"\x04", (1.0,), (0,), b"\x00")


@pytest.fixture
def fresh_choice():
    kernels._path.cache_clear()
    yield
    kernels._path.cache_clear()


def test_backend_says_which_and_why_once(fresh_choice, caplog):
    pytest.importorskip("wsm_megatron.kernels.native", exc_type=ImportError)
    with caplog.at_level(logging.INFO, logger="wsm_megatron.kernels"):
        assert backend("cpu") == backend(torch.device("cpu")) == "native: the compiled C extension"
    assert caplog.messages == ["weighted_sum on cpu: native: the compiled C extension"]


def test_without_the_extension_the_eager_path_works(fresh_choice, monkeypatch):
    monkeypatch.setitem(sys.modules, "wsm_megatron.kernels._weighted_sum", None)
    monkeypatch.delitem(sys.modules, "wsm_megatron.kernels.native", raising=False)
    monkeypatch.delattr(kernels, "native", raising=False)
    assert backend("cpu").startswith("eager: the C extension was not built")
    output = torch.empty(2, dtype=BF16)
    assert weighted_sum([torch.ones(2)], [[0.5]], [output])
    assert output.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("version", "says"),
    [("3.2.0", "eager: Triton 3.2.0 knows no tuples"), ("3.10.1+git", "triton: "), (None, "eager")],
)
def test_a_triton_that_is_too_old_is_left_alone(fresh_choice, monkeypatch, version, says):
    """It would fail at the first sum: torch 2.4 to 2.6 bring one."""
    pytest.importorskip("triton")

    def installed(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", installed)
    assert backend("cuda").startswith(says)
