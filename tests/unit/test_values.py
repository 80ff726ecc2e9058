"""What is typed for an option: as people write it, or refused with what would be understood."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import runs
from tests.reference import RUNS
from wsm_megatron import ExecutionOptions, MergeConfig, UsageError
from wsm_megatron.cli.main import main
from wsm_megatron.errors import EXIT_USAGE
from wsm_megatron.options import count, local_path, number, several, size


@pytest.mark.parametrize(
    "text, value",
    [
        ("20000", 20_000),
        ("20_000", 20_000),
        ("20k", 20_000),
        ("2e4", 20_000),
        ("20e3", 20_000),
        (" 7 ", 7),
        ("500M", 500_000_000),
        ("1e9", 10**9),
        ("2B", 2 * 10**9),
        ("2.5b", 2_500_000_000),
        ("1.5T", 1_500_000_000_000),
        ("1.20e1", 12),
        ("-3", -3),
        ("9007199254740993", 2**53 + 1),
    ],
)
def test_counts(text: str, value: int) -> None:
    assert count(text) == value


@given(st.integers(-(2**62), 2**62))
def test_every_integer_is_read_exactly(value: int) -> None:
    assert count(str(value)) == count(f"{value:_}") == value


@pytest.mark.parametrize(
    "text",
    ["", "x", "1.5", "2.0005k", "1e-3", "0x10", "1__0", "20q", "nan", "inf", "1,0", "k", "٣"],
)
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(ValueError, match="is not a whole number such as"):
        count(text)


@pytest.mark.parametrize("text", ["1e19", "9223372036854775808", "1e999", "99999999T"])
def test_a_count_of_no_run(text: str) -> None:
    with pytest.raises(ValueError, match="is too large"):
        count(text)


@pytest.mark.parametrize(
    "text, value",
    [
        ("1000000", 1_000_000),
        ("256MiB", 256 * 2**20),
        ("1.5 GiB", 3 * 2**29),
        ("2gb", 2 * 10**9),
        ("64k", 64_000),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert size(text) == value


def test_what_is_no_size() -> None:
    for text in ("", "big", "1PB", "1e99"):
        with pytest.raises(ValueError):
            size(text)


@pytest.mark.parametrize(
    "text, value",
    [
        ("0.25", 0.25),
        ("1/3", 1 / 3),
        (" 1 / 4 ", 0.25),
        ("25%", 0.25),
        ("-0.5", -0.5),
        ("1e-3", 1e-3),
    ],
)
def test_numbers(text: str, value: float) -> None:
    assert number(text) == value


@pytest.mark.parametrize("text", ["", "a", "1/0", "1/", "/2", "1/2/3", "%", "1;2"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number such as 0.25, 1/3 or 25%"):
        number(text)


def test_several_values() -> None:
    assert several(count)("10, 20,30k") == (10, 20, 30_000)
    for text in (",1", "1,", "1,,2", ""):
        with pytest.raises(ValueError, match="lacks a value"):
            several(count)(text)


@pytest.mark.parametrize(
    "address", ["s3://bucket/run", "msc://profile/run", "gs://b", "hdfs://n:1/"]
)
def test_addresses_are_no_paths(address: str, tmp_path: Path) -> None:
    for path in (address, Path(address)):
        with pytest.raises(ValueError, match="is an address, not a path"):
            local_path(path)
        for name in ("load", "save"):
            paths = {"load": tmp_path / "a", "save": tmp_path / "b", name: path}
            with pytest.raises(UsageError, match=f"--{name} .* is an address"):
                MergeConfig(**paths)
        with pytest.raises(UsageError, match="--log-json .* is an address"):
            ExecutionOptions(log_json=path)
    with pytest.raises(ValueError, match="--decay .* is an address"):
        MergeConfig(load=tmp_path / "a", save=tmp_path / "b", decay=f"mean,{address}.csv")


@pytest.mark.parametrize("path", ["run:1/out", "./a", "/x/s3:/y", "C:/x", "a.b/c:d"])
def test_paths_with_colons_are_paths(path: str) -> None:
    assert local_path(path) == Path(path)


@pytest.mark.parametrize(
    "command",
    [
        ["merge", "--load", "s3://b/run", "--save", "out"],
        ["merge", "--load", "run", "--save", "s3://b/out"],
        ["merge", "--load", "run", "--save", "out", "--log-json", "s3://b/log"],
        ["coefficients", "--load", "s3://b/run"],
        ["inspect", "s3://b/run"],
        ["verify", "s3://b/run"],
        ["resume-check", "s3://b/run"],
        ["resume-check", "run", "--against", "s3://b/run"],
    ],
    ids=" ".join,
)
def test_every_path_of_the_command_line(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(command)
    assert done.value.code == EXIT_USAGE
    assert "is an address, not a path" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def planned(capsys: pytest.CaptureFixture[str], tmp_path: Path, *options: str) -> dict:
    run = str(RUNS / runs.DENSE)
    assert main(["plan", "--load", run, "--save", str(tmp_path / "out"), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_weights_as_people_write_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def weights(*words: str) -> list[float]:
        return planned(capsys, tmp_path, *words)["coefficients"]

    assert weights("--last", "3", "--weights", "1/3, 1/3, 1/3") == [1 / 3] * 3
    assert weights("--last", "2", "--weights", "-0.5,1.5") == [-0.5, 1.5]
    assert weights("--last", "2", "--weights=-0.5,1.5") == [-0.5, 1.5]
    assert weights("--weights", "-.5,1.5", "--last", "2") == [-0.5, 1.5]
    assert weights("--last", "2", "--weights", "40%,60%") == [0.4, 0.6]


def test_windows_as_people_write_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert planned(capsys, tmp_path, "--window-tokens", "0.5k")["iterations"] == [6, 8]
    assert planned(capsys, tmp_path, "--window-iterations", "4e0")["iterations"] == [4, 6, 8]
    done = planned(capsys, tmp_path, "--decay", "mean, ema", "--iterations", "2, 8")
    roots = [Path(path).parent.name for path in done["outputs"]]
    assert roots == ["mean", "ema"] and done["iterations"] == [2, 8]


@pytest.mark.parametrize(
    "decay, meant",
    [("average", "mean"), ("cos", "cosine"), ("Linear", "linear"), ("sqrt", "1-sqrt")],
)
def test_a_decay_of_another_name(
    decay: str, meant: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = str(RUNS / runs.DENSE)
    arguments = ["plan", "--load", run, "--save", str(tmp_path / "out"), "--decay", decay]
    assert main(arguments) == EXIT_USAGE
    assert f"unknown decay {decay!r}, did you mean {meant}:" in capsys.readouterr().err


def test_a_message_names_no_function(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--window-tokens", "--weights", "--memory", "--last", "--min-decay"):
        with pytest.raises(SystemExit):
            main(["merge", "--load", "run", "--save", "out", option, "much"])
        last = capsys.readouterr().err.splitlines()[-1]
        assert f"argument {option}: 'much' is not a" in last
