"""Mutations of containers and of the common state: with right CRC-32s they say wrong things."""

from __future__ import annotations

import argparse
import datetime
import decimal
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from tests.archives import Member, archive, saved
from tests.fuzz import stored
from tests.fuzz.case import Case, kind
from tests.fuzz.pickles import bomb, hostile
from wsm_megatron.checkpoint.common_state import load_common
from wsm_megatron.safe_pickle.opaque import references

COMMON_KEY = "common_state/shard_0_1"


def _of_torch(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _members(data: bytes) -> list[Member]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return [Member(name, file.read(name)) for name in file.namelist()]


def _forge(case: Case, members: list[Member]) -> bytes:
    """One thing about an archive is no longer as ``torch.save`` lays it out."""
    chance = case.chance
    one = chance.choice(members)
    what = chance.randrange(12)
    if what == 0:
        members.insert(
            chance.choice((0, len(members))), Member(one.name, chance.randbytes(len(one.data)))
        )
    elif what == 1:
        members.insert(0, Member(one.name.upper(), one.data))
    elif what == 2:
        root = one.name.partition("/")[0]
        members = [m for m in members if not m.name.endswith("byteorder")]
        members.insert(1, Member(f"{root}/byteorder", chance.choice((b"big", b"", b"middle"))))
    elif what == 3:
        members.remove(one)
    elif what == 4:
        one.entry["flags"] = chance.randrange(2**16)
        one.local["flags"] = chance.choice((0x808, one.entry["flags"]))
    elif what == 5:
        one.entry["method"] = one.local["method"] = chance.choice((1, 8, 9, 12, 14, 95, 99))
    elif what == 6:
        one.entry["crc"] = chance.randrange(2**32)
    elif what == 7:
        one.entry[chance.choice(("size", "packed"))] = chance.choice((0, 1, 2**31, 2**32 - 1))
    elif what == 8:
        one.entry["offset"] = chance.choice((0, 1, 64, 2**31, 2**32 - 1))
    elif what == 9:
        one.local_name = chance.choice(members).name
    elif what == 10:
        one.after = chance.randbytes(chance.randint(1, 40))
    else:
        names = ("disk", "start_disk", "here", "count", "size", "start", "comment")
        value = chance.choice((0, 1, 2, 3, 2**16 - 1))
        return archive(members, **{chance.choice(names): value})
    return archive(members)


def _tensor_index(case: Case) -> tuple[MetadataIndex, Any]:
    metadata = stored.load(case.victim)
    keys = set(stored.tensors(metadata))
    indices = [index for index in metadata.storage_data if index.fqn in keys]
    index = case.chance.choice(indices)
    return index, metadata.storage_data[index]


@kind("container: forged archive")
def container(case: Case) -> None:
    index, info = _tensor_index(case)
    members = _members(stored.read(case.victim, info))
    stored.replace(case.victim, index, _forge(case, members))


@kind("container: another tensor")
def tensor(case: Case) -> None:
    """As ``torch.save`` writes it: another view, shape or dtype, a larger storage, no tensor."""
    index, info = _tensor_index(case)
    whole = torch.load(io.BytesIO(stored.read(case.victim, info)), weights_only=True)
    flat = whole.reshape(-1)
    others: list[Any] = [
        whole.t() if whole.dim() == 2 else whole.unsqueeze(0),
        torch.cat([flat, flat])[: flat.numel()].view(whole.shape),
        torch.cat([flat, flat])[flat.numel() :].view(whole.shape),
        torch.nn.Parameter(whole) if whole.is_floating_point() else whole,
        whole.flip(0) if whole.dim() else whole,
        whole.double(),
        whole.float(),
        torch.zeros(1, dtype=whole.dtype).expand(whole.shape),
        flat,
        flat[:-1],
        whole.to_sparse() if whole.dim() else whole,
        {"a": whole},
        [whole],
        None,
        whole.tolist(),
        torch.complex(flat.float(), flat.float()).conj(),
        torch._neg_view(whole) if whole.is_floating_point() else whole,
    ]
    stored.replace(case.victim, index, _of_torch(case.chance.choice(others)))


@kind("container: forged pickle")
def container_pickle(case: Case) -> None:
    index, info = _tensor_index(case)
    members = _members(stored.read(case.victim, info))
    pickled = next(member for member in members if member.name.endswith("data.pkl"))
    choice = case.chance.randrange(3)
    if choice == 0:
        pickled.data = bomb(case.chance)
    elif choice == 1:
        pickled.data = pickle.dumps(hostile(case.chance), 2)
    else:
        data = bytearray(pickled.data)
        data[case.chance.randrange(len(data))] = case.chance.randrange(256)
        pickled.data = bytes(data)
    stored.replace(case.victim, index, archive(members))


@kind("entry: forged archive")
def entry(case: Case) -> None:
    metadata = stored.load(case.victim)
    keys = set(stored.objects(metadata))
    index = case.chance.choice([i for i in metadata.storage_data if i.fqn in keys])
    data = stored.read(case.victim, metadata.storage_data[index])
    stored.replace(case.victim, index, _forge(case, _members(data)))


def _common(checkpoint: Path) -> bytes:
    if (checkpoint / "common.pt").is_file():
        return (checkpoint / "common.pt").read_bytes()
    return stored.read(checkpoint, stored.load(checkpoint).storage_data[MetadataIndex(COMMON_KEY)])


def _write_common(checkpoint: Path, data: bytes) -> None:
    if (checkpoint / "common.pt").is_file():
        (checkpoint / "common.pt").write_bytes(data)
        return
    stored.replace(checkpoint, MetadataIndex(COMMON_KEY), data)


@kind("common: forged archive")
def common(case: Case) -> None:
    _write_common(case.victim, _forge(case, _members(_common(case.victim))))


@kind("common: flip or cut")
def common_flip(case: Case) -> None:
    data = bytearray(_common(case.victim))
    data[case.chance.randrange(len(data))] ^= 1 << case.chance.randrange(8)
    if case.chance.random() < 0.3:
        del data[case.chance.randrange(len(data)) :]
    _write_common(case.victim, bytes(data))


@kind("common: bomb")
def common_bomb(case: Case) -> None:
    _write_common(case.victim, archive(saved(bomb(case.chance))))


@kind("common: other values")
def common_values(case: Case) -> None:
    """Values of wrong types and foreign classes, in ``args`` and beside it."""
    state = load_common(_common(case.victim), "common")
    plain = {k: v for k, v in vars(state["args"]).items() if not list(references(v))}
    args = argparse.Namespace(**plain)
    state = {k: v for k, v in state.items() if not list(references(v))} | {"args": args}
    odd: list[Any] = [
        None, "x", -1, 2**70, 2.5, float("nan"), True, [], {}, (), b"x", [[1]], {1: 2}, {(1, 2): 3},
        decimal.Decimal("1.5"), datetime.date(2026, 1, 1), torch.ones(2), torch.float32, 1 + 2j,
        hostile(case.chance), {"a": hostile(case.chance)}, "\ud800", "a\nb", "x" * 10**5,
    ]  # fmt: skip
    for _ in range(case.chance.randint(1, 3)):
        value = case.chance.choice(odd)
        where = case.chance.randrange(4)
        if where == 0:
            names = ("iteration", "consumed_train_samples", "seq_length", "bf16", "theirs", "save")
            setattr(args, case.chance.choice(names), value)
        elif where == 1:
            names = ("iteration", "args", "optimizer", "opt_param_scheduler", "content_metadata")
            state[case.chance.choice((*names, "theirs", "checkpoint_version"))] = value
        elif where == 2:
            state.pop(case.chance.choice(list(state)), None)
        else:
            setattr(args, case.chance.choice(list(plain)), value)
    whole: Any = [state] if case.base.startswith("main") else state
    _write_common(case.victim, _of_torch(whole))
