"""The container around a chunk, against torch.save and torch.load."""

import io
import zlib

import pytest
import torch

from wsm_megatron.checkpoint.container import Frame, locate

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool, torch.uint8]
SHAPES = [(3, 5), (7,), (1, 2, 3, 4), (), (0, 4)]


def raw(tensor):
    flat = tensor.contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_load_reads_a_frame(dtype, shape):
    tensor = (torch.randn(shape) * 10).to(dtype)
    data = raw(tensor)
    frame = Frame(dtype, shape)
    prefix, suffix = frame.around(zlib.crc32(data))
    assert len(prefix) == frame.prefix_bytes and len(prefix) % 64 == 0
    assert frame.total_bytes == len(prefix) + len(data) + len(suffix)
    loaded = torch.load(io.BytesIO(prefix + data + suffix), weights_only=True)
    assert loaded.dtype == dtype and loaded.shape == tensor.shape
    assert torch.equal(loaded, tensor)


@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (0, 4)], ids=str)
def test_locate_finds_what_torch_saved(shape):
    tensor = torch.randn(shape).bfloat16()
    stream = io.BytesIO()
    torch.save(tensor, stream)
    record = locate(stream)
    stored = stream.getvalue()[record.start : record.start + record.nbytes]
    assert stored == raw(tensor)
    assert (record.dtype, record.shape) == (torch.bfloat16, tuple(shape))
    assert record.crc == zlib.crc32(stored)


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "not a readable"),
        (b"PK\x03\x04 and then nothing", "not a readable"),
        ({"a": torch.ones(2)}, "does not hold a plain tensor"),
        ([None], "does not hold a plain tensor"),
        (torch.ones(4, 6).t(), "not one contiguous"),
        (torch.ones(6)[2:4], "not one contiguous"),
    ],
    ids=["empty", "cut", "dict", "list", "transposed", "slice"],
)
def test_anything_else_is_refused(content, complaint):
    stream = io.BytesIO(content if isinstance(content, bytes) else b"")
    if not isinstance(content, bytes):
        torch.save(content, stream)
    with pytest.raises(ValueError, match=complaint):
        locate(stream)


def test_code_in_a_tensors_pickle_is_not_run():
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    stream = io.BytesIO()
    torch.save(Evil(), stream)
    with pytest.raises(ValueError, match="no place in a tensor's pickle"):
        locate(stream)
