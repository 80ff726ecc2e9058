"""Common states read with nothing imported or called for them, and written back."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch

from tests import archives
from wsm_megatron.errors import MergeError
from wsm_megatron.safe_pickle.metadata import load_metadata
from wsm_megatron.safe_pickle.objects import dump_object, load_object
from wsm_megatron.safe_pickle.opaque import GlobalName, OpaqueObject, is_known, references

RUNS = Path(__file__).parents[2] / "data" / "runs"
COMMON_ENTRY = "common_state/shard_0_1"


def common_bytes(checkpoint: Path) -> bytes:
    """The common state's archive, from ``common.pt`` or, from Megatron 0.19, a ``.distcp``."""
    if (checkpoint / "common.pt").exists():
        return (checkpoint / "common.pt").read_bytes()
    stored = load_metadata(checkpoint / ".metadata").storage_data
    info = next(info for index, info in stored.items() if index.fqn == COMMON_ENTRY)
    data = (checkpoint / info.relative_path).read_bytes()
    return data[info.offset : info.offset + info.length]


def pickle_of(archive: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return file.read(next(n for n in file.namelist() if n.endswith("/data.pkl")))


def archive_of(pickled: bytes) -> bytes:
    return archives.archive(archives.saved(pickled))


def saved(obj: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(obj, stream, **options)
    return stream.getvalue()


CHECKPOINTS = sorted(RUNS.glob("*/iter_*"))


@pytest.mark.parametrize("run", sorted(p.name for p in RUNS.iterdir()))
def test_every_fixture_is_written_back_to_the_byte(run: str) -> None:
    checkpoints = sorted(RUNS.glob(f"{run}/iter_*"))
    assert len(checkpoints) == 4
    for checkpoint in checkpoints:
        data = common_bytes(checkpoint)
        state = load_object(data, str(checkpoint))
        written = dump_object(state)
        assert pickle_of(written) == pickle_of(data)
        assert load_object(written, "written") == state


def test_megatron_enums_stay_inert_and_plain_values_are_plain() -> None:
    data = common_bytes(RUNS / "mcore0.16-dense-dp2-dp_reshardable" / "iter_0000008")
    state = load_object(data, "common.pt")
    assert state["iteration"] == 8
    args = state["args"]
    assert type(args) is argparse.Namespace
    assert args.params_dtype is torch.bfloat16
    assert args.model_type == OpaqueObject(GlobalName("megatron.core.enums", "ModelType"), (1,))


BLOCKED = """
import sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("megatron", "transformer_engine", "apex", "numpy.testing"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
from wsm_megatron.safe_pickle.objects import dump_object, load_object
for path in sys.argv[2:]:
    state = load_object(Path(path).read_bytes(), path)
    (Path(sys.argv[1]) / f"{Path(path).parts[-3]}.pt").write_bytes(dump_object(state))
assert not [m for m in sys.modules if m.partition(".")[0] == "megatron"]
"""


def test_what_was_written_without_megatron_loads_equal_with_it(tmp_path: Path) -> None:
    paths = sorted(RUNS.glob("mcore*/iter_0000004/common.pt"))
    command = [sys.executable, "-c", BLOCKED, str(tmp_path), *map(str, paths)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[3])
    pytest.importorskip("megatron.core")
    for path in paths:
        written = torch.load(tmp_path / f"{path.parts[-3]}.pt", weights_only=False)
        expected = torch.load(path, weights_only=False)
        assert type(written["args"].model_type).__module__ == "megatron.core.enums"
        assert written == expected
        # As Megatron itself loads it, with the classes that it declares safe.
        assert torch.load(tmp_path / f"{path.parts[-3]}.pt", weights_only=True) == expected


def test_plain_objects_come_back_real() -> None:
    plain = {
        "containers": [(1, 2.5), {3}, frozenset({"x"}), collections.OrderedDict(a=1), {"k": None}],
        "bytes": [b"", b"\x00\xff"],
        "namespaces": [argparse.Namespace(a=1), types.SimpleNamespace(b=[2])],
        "torch": [torch.Size([2, 3]), torch.float32, torch.float8_e4m3fn],
        "big": 2**80,
    }
    for data in (saved(plain), saved(plain, pickle_protocol=4), dump_object(plain)):
        assert load_object(data, "plain") == plain
    assert torch.load(io.BytesIO(dump_object(plain)), weights_only=False) == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_come_back_with_their_storage(dtype: torch.dtype) -> None:
    base = torch.arange(12).reshape(3, 4).to(dtype)
    state = {"view": base[1:, ::2], "whole": base, "empty": torch.empty(0, dtype=dtype)}
    loaded = load_object(saved(state), "tensors")
    for tensors in (loaded, torch.load(io.BytesIO(dump_object(loaded)), weights_only=True)):
        assert all(torch.equal(tensors[k], v) for k, v in state.items())
        assert tensors["view"].stride() == (4, 2)
        pointers = {tensors[k].untyped_storage().data_ptr() for k in ("view", "whole")}
        assert len(pointers) == 1, "views of one storage no longer share it"


def test_other_objects_of_torch_stay_inert_and_load_again() -> None:
    state: dict[str, Any] = {
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "device": torch.device("cpu"),
        "path": PosixPath("/run"),
        "counter": collections.Counter("aab"),
        "default": collections.defaultdict(list, a=[1]),
        "deque": collections.deque([1, 2], 5),
    }
    inert = load_object(saved(state), "state")
    assert all(type(v) is OpaqueObject for v in inert.values())
    again = torch.load(io.BytesIO(dump_object(inert)), weights_only=False)
    assert torch.equal(again.pop("parameter"), state.pop("parameter"))
    assert again == state
    assert again["deque"].maxlen == 5
    assert again["default"].default_factory is list


def test_numpy_values_stay_inert_and_load_again() -> None:
    numpy = pytest.importorskip("numpy")
    state = {"scalar": numpy.float64(0.25), "array": numpy.arange(4, dtype=numpy.uint32)}
    again = torch.load(
        io.BytesIO(dump_object(load_object(saved(state), "numpy"))), weights_only=False
    )
    assert again["scalar"] == 0.25
    assert (again["array"] == state["array"]).all()


class Call:
    """Pickles as a call of ``function(*args)``."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "args", "named"),
    [
        (os.system, ("touch {0}",), "posix.system"),
        (subprocess.Popen, (["touch", "{0}"],), "subprocess.Popen"),
        (eval, ("open('{0}', 'w')",), "builtins.eval"),
        (exec, ("open('{0}', 'w')",), "builtins.exec"),
        (open, ("{0}", "w"), "_?io.open"),
        (getattr, (torch.Size, "numel"), "builtins.getattr"),
        (pickle.loads, (b"\x80\x02N.",), "pickle.loads"),
        (zipfile.ZipFile, ("{0}", "w"), "zipfile.ZipFile"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_nothing_is_run(
    tmp_path: Path, function: Any, args: tuple, named: str, nested: bool
) -> None:
    made = tmp_path / "made"
    filled = [a.format(made) if isinstance(a, str) else a for a in args]
    filled = [[x.format(made) for x in a] if isinstance(a, list) else a for a in filled]
    attack: Any = Call(function, *filled)
    if nested:
        attack = {"args": argparse.Namespace(seed=1, model_type=[attack]), "iteration": 1}
    loaded = load_object(saved(attack), "common.pt")
    (foreign,) = [one for one in references(loaded) if not is_known(one)]
    assert re.fullmatch(named, str(foreign))
    with pytest.raises(MergeError, match=f"cannot write a reference to {named}"):
        dump_object(loaded)
    assert not made.exists()


def test_calls_into_known_packages_are_not_made(tmp_path: Path) -> None:
    target = tmp_path / "inner.pt"
    torch.save({}, target)
    for function in (torch.load, torch.hub.load, torch.jit.load, torch.save):
        loaded = load_object(saved({"x": Call(function, str(target))}), "common.pt")
        assert type(loaded["x"]) is OpaqueObject
        assert loaded["x"].args == (str(target),)
        assert pickle_of(dump_object(loaded)) == pickle_of(
            saved({"x": Call(function, str(target))})
        )


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (b"\x80\x02\x82\x01.", "opcode"),
        (b"\x80\x02\x83\x01\x00.", "opcode"),
        (b"\x80\x02\x84\x01\x00\x00\x00.", "opcode"),
        (b"(S'true'\niposix\nsystem\n.", "opcode"),
        (b"Pid\n.", "opcode"),
        # A state for a class would set attributes of the class itself.
        (b"\x80\x02cargparse\nNamespace\nN}X\x01\x00\x00\x00aK\x01s\x86b.", "a state for type"),
        (b"\x80\x02cargparse\nNamespace\n}X\x01\x00\x00\x00aK\x01sb.", "a state for type"),
        (b"\x80\x02c__builtin__\nset\n)\x81.", "a new object of"),
        (b"\x80\x02cargparse\nNamespace\n)R.", "a call of"),
        (b"\x80\x02cmegatron.core.enums\nModelType\nK\x01\x85R)R.", "a call of"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.", "rot13"),
        (b"\x80\x02c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R.", "not a sound"),
        (b"\x80\x02X\x07\x00\x00\x00storageQ.", "not a sound"),
        (b"\x80\x02cmegatron.core.enums\nModelType\nK\x01R.", "a int for arguments"),
        (b"\x80\x02c__builtin__\nset\n]K\x01\x85\x85\x85a\x85R.", "a container in a set"),
        (b"\x80\x02K\x01", "not a sound"),
        (b"", "not a sound"),
    ],
)
def test_pickles_that_no_save_makes_are_refused(opcodes: bytes, message: str) -> None:
    with pytest.raises(MergeError, match=f"common.pt: .*{message}"):
        load_object(archive_of(opcodes), "common.pt")


@pytest.mark.parametrize(
    "opcodes",
    [
        b"\x80\x02ctorch\nos.system\n.",
        b"\x80\x02cposix\nmyStorage\n.",
        b"\x80\x02csubprocess\nPopenStorage\n.",
        # In protocol 4 a name may hold newlines, which end a name in the protocol that is written.
        b"\x80\x04\x8c\x08megatron\x8c\x17ModelType\ncposix\nsystem\x93.",
    ],
)
def test_names_that_only_look_known_are_not_written(opcodes: bytes) -> None:
    loaded = load_object(archive_of(opcodes), "common.pt")
    assert type(loaded) is GlobalName and "\n" not in str(loaded)
    with pytest.raises(MergeError, match="cannot write a reference"):
        dump_object(loaded)


def test_storages_that_do_not_fit_their_record_are_refused() -> None:
    data = saved({"t": torch.arange(4, dtype=torch.int64)})
    pickled = pickle_of(data)
    for forged in (
        pickled.replace(b"cpuq", b"cpuq", 1).replace(b"K\x04tq", b"K\x05tq", 1),
        pickled.replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001", 1),
    ):
        assert forged != pickled
        members = archives.saved(forged, {"0": torch.arange(4).numpy().tobytes()})
        with pytest.raises(MergeError, match="common.pt"):
            load_object(archives.archive(members), "common.pt")


def test_damage_is_noticed() -> None:
    data = (RUNS / "mcore0.16-dense-dp2-noopt" / "iter_0000008" / "common.pt").read_bytes()
    for length in range(0, len(data), 997):
        with pytest.raises(MergeError, match="common.pt: not a sound torch.save archive"):
            load_object(data[:length], "common.pt")
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    with pytest.raises(MergeError, match="CRC-32"):
        load_object(bytes(flipped), "common.pt")


def test_a_pickle_without_the_archive_is_refused() -> None:
    with pytest.raises(MergeError, match="not a sound torch.save archive"):
        load_object(pickle.dumps({"iteration": 1}), "common.pt")
    with pytest.raises(MergeError, match="not a sound torch.save archive"):
        load_object(saved({}, _use_new_zipfile_serialization=False), "common.pt")


def test_only_what_could_be_read_is_written() -> None:
    for foreign in (os.system, subprocess.Popen, Call(print, 1), Path("/x"), lambda: None):
        with pytest.raises(MergeError, match="cannot write"):
            dump_object({"x": foreign})


WRITTEN = """
import sys
from pathlib import Path
for name in sys.argv[2].split(","):
    sys.intern(name)
from tests.runs import dump_common
from wsm_megatron.checkpoint.common_state import load_common, prepare
state = load_common(Path(sys.argv[1]).read_bytes(), "common.pt")
provenance = {"a": [1, {"b": 2.5}], "lr_decay_style": "constant"}
state = prepare(state, iteration=9, drop_optimizer=False, provenance=provenance)
sys.stdout.buffer.write(dump_common(state))
"""


def test_the_same_bytes_are_written_in_every_process(tmp_path: Path) -> None:
    """Whatever its hash seed, and whatever names it has come across before."""
    state = common_bytes(RUNS / "mcore0.16-dense-dp2-dp_reshardable" / "iter_0000008")
    loaded = load_object(state, "common.pt")
    loaded["args"].names = {f"name{n}" for n in range(20)} | {1, 2.5, None}
    loaded["args"].frozen = frozenset(loaded["args"].names)
    (tmp_path / "common.pt").write_bytes(dump_object(loaded))
    written = set()
    for seed, interned in ((1, "x"), (2, "lr_decay_style,name3"), (3, "iteration,wsm_merge,name7")):
        command = [sys.executable, "-c", WRITTEN, str(tmp_path / "common.pt"), interned]
        done = subprocess.run(
            command,
            check=True,
            capture_output=True,
            cwd=Path(__file__).parents[3],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
        )
        written.add(done.stdout)
    assert len(written) == 1
    again = load_object(written.pop(), "written")
    assert again["args"].names == loaded["args"].names
    assert again["args"].frozen == loaded["args"].frozen


def test_a_storage_is_not_enlarged() -> None:
    """By ``set_``, as torch does for a shape that does not fit: 4 GB for a kilobyte."""
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.arange(4.0).untyped_storage(), dtype=torch.float32, _internal=True
    )
    for size, stride, offset in (((2**30,), (1,), 0), ((4,), (1,), 1), ((2, 2), (2**40, 1), 0)):
        forged = Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})
        with pytest.raises(MergeError, match="larger than its storage"):
            load_object(saved({"t": forged}), "common.pt")
