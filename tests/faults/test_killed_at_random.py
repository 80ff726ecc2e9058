"""Merges killed at random times, each with a second one that races for the target and survives.

``WSM_KILL_ROUNDS`` says how many, ``WSM_KILL_SEED`` the seed of the first.
"""

from __future__ import annotations

import os
import random
from multiprocessing.context import ForkServerContext
from pathlib import Path

from tests.faults.killed import DECAYS, kill_one_of_two, merge_alone

ROUNDS = int(os.environ.get("WSM_KILL_ROUNDS", "6"))
SEED = int(os.environ.get("WSM_KILL_SEED", random.SystemRandom().randrange(10**9)))


def test_killed_at_random(server: ForkServerContext, tmp_path: Path) -> None:
    """Whatever the one that was killed has left, the other's result is that of an undisturbed
    merge, bit for bit, and nothing else is left.
    """
    folder = tmp_path / "round"
    folder.mkdir()
    merge_alone(server, folder)  # which reads the sources from disk
    clean = merge_alone(server, folder)
    assert clean.status == 0 and clean.written > 0, clean.said
    assert sum(name.endswith(".distcp") for name in clean.files) == len(DECAYS)
    print(f"\nundisturbed: {clean.seconds:.2f} s, {clean.written} bytes; first seed {SEED}")
    gone_on = 0
    for seed in range(SEED, SEED + ROUNDS):
        # One in every part of the time that a merge takes, at a random place in it.
        chance = random.Random(seed)
        when = clean.seconds * (seed - SEED + chance.random()) / ROUNDS
        holds, done = kill_one_of_two(server, folder, chance, when)
        gone_on += 0 < done.written < clean.written
        victim = "the one with the lock" if holds else "one without a lock"
        share = done.written / clean.written
        print(f"seed {seed}: {victim} killed after {when:.2f} s, the other wrote {share:.0%}")
        assert done.status == 0, (seed, done.said)
        assert done.files.keys() == clean.files.keys(), seed
        for name, data in clean.files.items():
            assert done.files[name] == data, (seed, name)
    print(f"{gone_on} of {ROUNDS} went on from what the killed one had finished")
    assert gone_on or ROUNDS < 20
