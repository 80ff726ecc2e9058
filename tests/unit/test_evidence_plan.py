"""The arms of the evidence and their queue, without training anything."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from examples.wsm_vs_wsd.plan import Arm, plan
from examples.wsm_vs_wsd.profile import PROFILES
from examples.wsm_vs_wsd.queue import Queue


def _arm(name: str, *needs: str) -> Arm:
    return Arm(name=name, kind="", seed=1, steps=1, needs=needs)


@pytest.mark.parametrize("name", list(PROFILES))
def test_arms_are_called_once_and_come_after_what_they_need(name: str) -> None:
    seen: set[str] = set()
    for arm in plan(PROFILES[name]):
        assert arm.name not in seen and set(arm.needs) <= seen
        seen.add(arm.name)


def test_seeds_have_the_same_arms() -> None:
    profile = PROFILES["hour"]
    assert len(profile.seeds) >= 5
    arms = {
        seed: [arm.name.removeprefix(f"s{seed}-") for arm in plan(replace(profile, seeds=(seed,)))]
        for seed in profile.seeds
    }
    assert len({tuple(names) for names in arms.values()}) == 1


def test_an_arm_waits_for_what_it_needs_and_is_done_once(tmp_path: Path) -> None:
    arms = [_arm("a"), _arm("b", "a"), _arm("c")]
    done = []
    for arm in Queue(tmp_path, arms).take():
        done.append(arm.name)
        Queue(tmp_path, arms).finish(arm, {})
    assert done == ["a", "b", "c"]
    assert list(Queue(tmp_path, arms).take()) == []


def test_what_another_worker_is_at_is_left_to_it(tmp_path: Path) -> None:
    arms = [_arm("a"), _arm("b", "a"), _arm("c")]
    one, other = (Queue(tmp_path, arms).take() for _ in range(2))
    assert (next(one).name, next(other).name) == ("a", "c")


def test_a_worker_that_died_holds_no_arm(tmp_path: Path) -> None:
    one = Queue(tmp_path, [_arm("a")]).take()
    assert next(one).name == "a"
    one.close()  # type: ignore[attr-defined]
    assert next(Queue(tmp_path, [_arm("a")]).take()).name == "a"


def test_nothing_is_begun_after_the_deadline(tmp_path: Path) -> None:
    assert list(Queue(tmp_path, [_arm("a")]).take(time.time() - 1)) == []


def test_results_are_json_under_the_name_of_their_arm(tmp_path: Path) -> None:
    queue = Queue(tmp_path, [_arm("a")])
    queue.finish(queue.arms[0], {"rows": []})
    assert json.loads((tmp_path / "arms" / "a.json").read_text()) == {"rows": []}
    assert [arm.name for arm in queue.done()] == ["a"]
