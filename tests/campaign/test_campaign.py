"""A slice of the campaign: a dozen faults of as many kinds on two small sweeps; the longer one is slow."""

import os
import random
from collections import deque
from pathlib import Path

import pytest

from tests.campaign.arena import Arena, Spec
from tests.campaign.episode import Outcome, run_episode
from tests.campaign.faults import catalogue
from tests.campaign.schedule import EACH, make_schedule

SLICE = (
    *("SIGKILL worker", "kill at mkdir", "SIGTERM trial", "kill at checkpoint", "truncated journal"),
    *("SIGKILL trial", "kill at result", "clock jump", "SIGTERM worker", "truncated checkpoint"),
    *("kill at ask", "SIGSTOP worker", "kill at tell", "SIGKILL sweeps.run"),
)


def under_fire(folder: Path, faults: deque[str], seed: int, **spec) -> Outcome:
    small_disk = os.geteuid() == 0
    arena = Arena(folder=folder, spec=Spec(**spec), name="slice", small_disk=small_disk)
    if small_disk:
        faults.insert(3, "full disk")
    try:
        return run_episode(arena, faults, catalogue(), random.Random(seed), None, at_most=len(faults))
    finally:
        arena.clean()


@pytest.mark.timeout(300)
def test_a_sweep_under_a_dozen_faults_keeps_every_promise(tmp_path):
    outcome = under_fire(tmp_path / "sweep", deque(SLICE), seed=1, trials=6)
    assert outcome.broken == []
    assert outcome.struck.total() >= 8, outcome.struck


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sampler", ["qmc", "tpe"])
def test_samplers_under_fire(tmp_path, sampler):
    faults = deque(SLICE)
    outcome = under_fire(tmp_path / "sweep", faults, seed=2, sampler=sampler, tracked=sampler == "tpe")
    assert outcome.broken == []
    assert outcome.struck.total() >= 10, outcome.struck


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_24_workers_at_once_on_fresh_stores_succeed(tmp_path):
    arena = Arena(folder=tmp_path / "sweep", spec=Spec(tracked=True, workers=24, trials=24), name="at-once")
    try:
        outcome = run_episode(arena, deque(), {}, random.Random(0), None)
    finally:
        arena.clean()
    assert (outcome.broken, outcome.starts) == ([], 1)


def test_schedule_has_enough_of_every_kind_and_is_a_function_of_its_seed():
    schedule = make_schedule(seed=0)
    kinds = [kind for lane in schedule.lanes for kind in lane.faults]
    assert len(kinds) >= 200
    assert {kinds.count(kind) >= EACH for kind in kinds} == {True}
    assert [lane.faults for lane in make_schedule(seed=0).lanes] == [lane.faults for lane in schedule.lanes]
    assert [lane.faults for lane in make_schedule(seed=1).lanes] != [lane.faults for lane in schedule.lanes]
    assert set(kinds) | set(schedule.skipped) >= set(catalogue())
