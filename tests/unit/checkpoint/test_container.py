"""The container around a chunk, against torch.save and torch.load."""

import io
import zipfile
import zlib

import pytest
import torch

from tests import archives
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
    "tensor",
    [
        torch.randn(64, 1).t(),  # torch calls it contiguous, with a stride of (1, 1)
        torch.randn(1, 5, 1).expand(1, 5, 1).as_strided((1, 5, 1), (7, 1, 9)),
        torch.empty(0, 4).t(),
        torch.nn.Parameter(torch.randn(3, 2)),
        torch.randn(4, requires_grad=True),
    ],
    ids=["row", "ones", "empty", "parameter", "grad"],
)
def test_what_torch_calls_contiguous_is_read(tensor):
    assert tensor.is_contiguous()
    stream = io.BytesIO()
    torch.save(tensor, stream)
    record = locate(stream)
    stored = stream.getvalue()[record.start : record.start + record.nbytes]
    assert record.shape == tuple(tensor.shape) and stored == raw(tensor.detach())


class Forged:
    """Pickles as a call of torch's function for tensors with other arguments."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


STORAGE = torch.storage.TypedStorage(
    wrap_storage=torch.arange(4.0).untyped_storage(), dtype=torch.float32, _internal=True
)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ((STORAGE, 0, (2**30,), (1,), False, {}), "not one contiguous"),
        ((STORAGE, 0, (2,), (1,), False, {}), "not one contiguous"),
        ((STORAGE, 1, (3,), (1,), False, {}), "not one contiguous"),
        ((STORAGE, 0, (-2, -2), (-2, 1), False, {}), "not one contiguous"),
        ((STORAGE, 0, (4, 1), (1,), False, {}), "not one contiguous"),
        ((STORAGE, 0, (4.0,), (1,), False, {}), "unknown kind"),
        ((STORAGE, 0, [4], [1], False, {}), "unknown kind"),
        ((STORAGE, 0, (4,), (1,), False, {}, {"neg": True}), "unknown kind"),  # values negated
        ((STORAGE, 0, (4,), (1,)), "not of a tensor"),
    ],
    ids=str,
)
def test_a_tensor_that_is_more_or_less_than_its_storage_is_refused(arguments, complaint):
    stream = io.BytesIO()
    torch.save(Forged(*arguments), stream)
    with pytest.raises(ValueError, match=complaint):
        locate(stream)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"archive/byteorder": b"big"}, "byte order"),
        ({"archive/data/0": b"12345678"}, "not one contiguous"),
        ({"archive/data/1": b""}, "does not hold a plain tensor"),
        ({"archive/data/0": None}, "does not hold a plain tensor"),
    ],
    ids=str,
)
def test_forged_containers_are_refused(change, complaint):
    stream = io.BytesIO()
    torch.save(torch.zeros(4), stream)
    with zipfile.ZipFile(stream) as file:
        pickled = file.read("archive/data.pkl")
    members = {m.name: m for m in archives.saved(pickled, {"0": bytes(16)})}
    locate(io.BytesIO(archives.archive(members.values())))
    for name, data in change.items():
        members[name] = archives.Member(name, data or b"")
        if data is None:
            del members[name]
    with pytest.raises(ValueError, match=complaint):
        locate(io.BytesIO(archives.archive(members.values())))


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
