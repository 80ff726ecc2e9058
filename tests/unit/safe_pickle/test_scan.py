"""Pickles are looked through before they are loaded; in C, and in Python as its reference."""

from __future__ import annotations

import collections
import datetime
import enum
import pickle
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import archives
from tests.reference import RUNS
from tests.unit.safe_pickle.test_objects import common_bytes, pickle_of
from wsm_megatron.safe_pickle import scan as pickle_scan
from wsm_megatron.safe_pickle.scan import scan_in_python

Scan = Callable[[bytes, int, int, int], str | None]
SCANS: list[Any] = [pytest.param(scan_in_python, id="python")]
if pickle_scan._pickle_scan is not None:
    SCANS.append(pytest.param(pickle_scan._pickle_scan.scan, id="c"))
LIMITS = (100, 10**6, 1000)
in_both = pytest.mark.parametrize("scan", SCANS)


class Colour(enum.Enum):
    RED = (1, "x")


PLAIN = [
    {"a": [1, 2.5, None, True, "x" * 300, b"y", 2**70], "b": {"c": (1, (2, (3,)))}},
    {1: 2, None: 3, Colour.RED: 4, (1, 2): 5, 2.5: 6, 2**40: 7},
    [{1, 2}, frozenset({"a"}), collections.OrderedDict(a=1), collections.deque([1])],
    datetime.datetime(2026, 1, 1),
    [[["shared"]] * 3] * 3,
    list(range(5000)),
    {str(n): n for n in range(5000)},
    (),
    len,
]


@in_both
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", PLAIN, ids=lambda value: repr(value)[:20])
def test_what_pickle_writes_passes(scan: Scan, value: Any, protocol: int) -> None:
    assert scan(pickle.dumps(value, protocol), *LIMITS) is None


@in_both
@pytest.mark.parametrize("run", sorted(p.name for p in RUNS.iterdir()))
def test_fixtures_pass_by_far(scan: Scan, run: str) -> None:
    checkpoint = RUNS / run / "iter_0000008"
    for data in ((checkpoint / ".metadata").read_bytes(), pickle_of(common_bytes(checkpoint))):
        assert scan(data, 20, len(data), 0) is None


def put(place: int) -> bytes:
    return pickle.LONG_BINPUT + place.to_bytes(4, "little")


def get(place: int) -> bytes:
    return pickle.LONG_BINGET + place.to_bytes(4, "little")


def doubled(start: bytes, once: bytes, times: int) -> bytes:
    """Each value is made of the one before, twice."""
    return start + b"".join(put(n) + get(n) + once for n in range(times))


DEEP_TUPLE = b")" + pickle.TUPLE1 * 10**5
DOUBLED_TUPLE = doubled(b")", pickle.TUPLE2, 60)


@in_both
@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"N" + put(2**27), "memo in order"),
        (b"N" + put(1), "memo in order"),
        (b"(" + put(0), "memo in order"),
        (DEEP_TUPLE, "too deep"),
        (b"]" * 102 + b"a" * 101, "too deep"),
        (b"}" + DEEP_TUPLE + b"Ns", "too deep"),
        (DOUBLED_TUPLE, "too often"),
        (b"}" + b")" + pickle.TUPLE1 * 5 + b"Ns", "container for a key"),
        (b"}(" + b")" + pickle.TUPLE1 * 5 + b"Nu", "container for a key"),
        (b"}]Ns", "container for a key"),
        (b"\x8f()\x85\x85\x90", "container for a key"),
        (b"()\x85\x85\x91", "container for a key"),
        (b"}(" + b"G" + bytes(8) + b"N" + (b"G" + bytes(8) + b"N") * 1000 + b"u", "no text"),
        (b"}(" + b"(K\x01tN" * 1001 + b"u", "no text"),
        (b"]" + put(0) + get(0) + b"a", "fetched"),
        (b"]" + put(0) + b"]" + get(0) + b"Na" + b"a", "fetched"),
        (b"N0N", "no checkpoint needs"),
        (b"N2\x86", "no checkpoint needs"),
        (b"\x82\x01", "no checkpoint needs"),
        (b"\x97", "no checkpoint needs"),
        (b"\x96" + bytes(8), "no checkpoint needs"),
        (b"I1\n", "no checkpoint needs"),
        (b"\xff", "no checkpoint needs|damaged"),
        (b"\x8b\xff\xff\xff\x7f", "damaged"),
        (b"X\xff\xff\xff\xffabc", "damaged"),
        (b"\x8e" + b"\xff" * 7 + b"\x7f", "damaged"),
        (b"\x8d" + b"\xff" * 8, "damaged"),
        (b"cposix", "damaged"),
        (b"e", "damaged"),
        (b"Ne", "damaged"),
        (b"(Na", "damaged"),
        (b"N(e", "damaged"),
        (b"NNb", "damaged"),
        (b"N(\x86", "damaged"),
        (get(0), "damaged"),
        (b"", "does not end|damaged"),
        (b"NN", "does not end"),
        (b"(", "does not end"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_no_checkpoint_holds_is_refused(scan: Scan, body: bytes, problem: str) -> None:
    found = scan(b"\x80\x04" + body + b".", *LIMITS)
    assert found is not None
    assert any(one in found for one in problem.split("|")), found


@in_both
def test_it_ends_with_the_last_byte(scan: Scan) -> None:
    assert scan(b"\x80\x02N.", *LIMITS) is None
    assert scan(b"\x80\x02N.N.", *LIMITS) is not None
    assert scan(b"\x80\x02N", *LIMITS) is not None


@pytest.mark.skipif(len(SCANS) < 2, reason="the C extension is not built")
def test_both_say_the_same_of_mutated_pickles() -> None:
    """But for text that is no UTF-8, which Python's own reader of opcodes refuses at once."""
    chance = random.Random(0)
    metadata = (RUNS / "mcore0.16-dense-dp2-noopt" / "iter_0000002" / ".metadata").read_bytes()
    wholes = [pickle.dumps(value, protocol) for value in PLAIN for protocol in (2, 4)]
    wholes += [metadata[:4000] + b"."]
    alike = 0
    for _ in range(3000):
        data = bytearray(chance.choice(wholes))
        for _ in range(chance.randint(1, 4)):
            opcodes = b"()]}NKXhjqr\x94\x85\x86tuaesbR." + data
            data[chance.randrange(len(data))] = chance.choice(opcodes)
        in_c, in_python = (param.values[0](bytes(data), *LIMITS) for param in SCANS[::-1])
        agreed = (in_c is None) == (in_python is None)
        assert agreed or in_python == "it is damaged or cut short", bytes(data)
        alike += agreed
    assert alike > 2850, "19 of 20: the rest is such text"


def small_time() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))


BOMBS = {
    "huge memo": b"N" + put(2**27),
    "deep tuple as key": b"}" + DEEP_TUPLE + b"Ns",
    "doubled tuple as key": b"}" + DOUBLED_TUPLE + b"Ns",
    "deep tuple in a set": b"c__builtin__\nset\n](" + DEEP_TUPLE + b"e\x85R",
    "deep list": b"]" * 10**6 + b"a" * (10**6 - 1),
    "doubled list": doubled(b"]", b"\x86", 60),
    "doubled calls": doubled(b"cmegatron\nX\n)R", b"\x86", 40),
}

LOAD = """
import resource, sys
from pathlib import Path
from wsm_megatron.safe_pickle.objects import load_object
from wsm_megatron.safe_pickle.metadata import load_metadata
from wsm_megatron.errors import MergeError
for path in map(Path, sys.argv[1:]):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        load_object(path.read_bytes(), "common.pt") if path.suffix else load_metadata(path)
    except MergeError as error:
        print("refused", str(error).count("\\n"))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 200 * 1024, path
"""


def test_bombs_are_refused(tmp_path: Path) -> None:
    """In a process of its own, as some would end it."""
    paths = []
    for n, bomb in enumerate(BOMBS.values()):
        pickled = b"\x80\x02" + bomb + b"."
        paths += [tmp_path / f"{n}", tmp_path / f"{n}.pt"]
        paths[-2].write_bytes(pickled)
        paths[-1].write_bytes(archives.archive(archives.saved(pickled)))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, paths)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        preexec_fn=small_time,
    )
    assert (done.returncode, done.stdout) == (0, "refused 0\n" * len(paths)), done.stderr
