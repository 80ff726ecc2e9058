"""Mutations beside the shards: JSON files, side files, folder names, the tracker."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.fuzz.case import Case, kind
from tests.fuzz.instead import put


@kind("json: metadata.json")
def marker(case: Case) -> None:
    texts = (
        b"", b"{", b"[" * 10**5, b'{"a":' * 10**4, b"null", b"[]", b"3", b'"torch_dist"', b"\xff",
        b'{"sharded_backend": "zarr"}', b'{"sharded_backend": ["torch_dist"]}', b"{}", bytes(10),
        b'{"sharded_backend": "torch_dist", "sharded_backend_version": "x"}', b"1" * 5000,
        b'{"sharded_backend": "torch_dist", "more": [1, {"a": "\\ud800"}]}', b"NaN",
    )  # fmt: skip
    path = case.victim / "metadata.json"
    if case.chance.random() < 0.2:
        data = bytearray(path.read_bytes())
        data[case.chance.randrange(len(data))] ^= 1 << case.chance.randrange(8)
        path.write_bytes(data)
        return
    path.write_bytes(case.chance.choice(texts))


@kind("json: provenance of a source")
def provenance(case: Case) -> None:
    texts = (b"", b"{}", b"[" * 10**5, b'{"format": 1}', b'{"format": 1, "files": 3}', b"null")
    (case.victim / "wsm_merge.json").write_bytes(case.chance.choice(texts))


_NAMES = (
    b"tokenizer",
    b"a b",
    b"line\nbreak",
    b"\xff\xfe",
    b"\x1b[2J",
    b"x" * 255,
    b"-rf",
    b"run_config.yaml",
)


def _side(case: Case) -> bytes:
    return os.path.join(os.fsencode(case.victim), case.chance.choice(_NAMES))


@kind("side: file or folder")
def side(case: Case) -> None:
    path = _side(case)
    if case.chance.random() < 0.5:
        Path(os.fsdecode(path)).write_bytes(case.chance.randbytes(100))
        return
    os.mkdir(path)
    Path(os.fsdecode(path), "inner.json").write_text("{}")


@kind("side: fifo")
def fifo(case: Case) -> None:
    path = _side(case)
    if case.chance.random() < 0.3:
        os.mkdir(path)
        path = os.path.join(path, b"inner")
    os.mkfifo(path)


@kind("side: link")
def link(case: Case) -> None:
    inside = os.path.join(os.fsencode(case.victim), b"folder")
    os.mkdir(inside)
    os.symlink(
        case.chance.choice(
            (
                b".",
                b"..",
                b"../..",
                b"nowhere",
                b"/etc/hostname",
                b"/dev/zero",
                b"/dev/stdin",
                b"loop",
            )
        ),
        os.path.join(case.chance.choice((inside, os.fsencode(case.victim))), b"loop"),
    )


@kind("side: weights of others")
def weights(case: Case) -> None:
    name = case.chance.choice(("model.safetensors", "optim_states.pt", "__9_9.distcp", "x.distcp"))
    (case.victim / name).write_bytes(case.chance.randbytes(1000))


@kind("file: of another kind")
def other_kind(case: Case) -> None:
    """``.metadata``, ``metadata.json`` or ``common.pt`` is no file, or a link."""
    names = [
        name
        for name in (".metadata", "metadata.json", "common.pt")
        if (case.victim / name).exists()
    ]
    path = case.victim / case.chance.choice(names)
    away = case.folder / "away"
    path.rename(away)
    make = case.chance.choice(("nothing", "folder", "fifo", "loop", "link", "empty", "null"))
    put(path, make, away)


@kind("run: folder names")
def folders(case: Case) -> None:
    names = (
        "iter_0000007x",
        "iter_00000007",
        "iter_٠٠٠٠٠٠٧",
        "iter_" + "9" * 200,
        "iter_0000007",
        "release",
        "iter_-000007",
    )
    new = case.run / case.chance.choice(names)
    make = case.chance.choice(("copy", "empty", "file", "loop", "dangling"))
    if make == "copy":
        shutil.copytree(case.victim, new)
    elif make == "empty":
        new.mkdir()
    elif make == "file":
        new.touch()
    else:
        new.symlink_to(new.name if make == "loop" else "nowhere")


@kind("run: tracker")
def tracker(case: Case) -> None:
    path = case.run / "latest_checkpointed_iteration.txt"
    texts = (
        b"",
        b"release",
        b"-1",
        b"8\n8",
        b"\xff",
        b"9" * 5000,
        b"6",
        b"99",
        b"8.5",
        "٨".encode(),
        bytes(9),
    )
    if path.is_dir() and not path.is_symlink():  # of another mutation of this case
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    make = case.chance.choice(("text", "text", "text", "nothing", "folder", "fifo", "loop"))
    if make == "text":
        path.write_bytes(case.chance.choice(texts))
    elif make == "folder":
        path.mkdir()
    elif make == "fifo":
        os.mkfifo(path)
    elif make == "loop":
        path.symlink_to(path.name)


@kind("nothing")
def nothing(case: Case) -> None:
    """A control: this must merge."""
