"""The chain of cluster jobs that a run passes through, as its tag tells it."""

import pytest

from lightning_modules.job import chain, job_name, jobs_of


@pytest.fixture
def slurm(monkeypatch):
    for name in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)

    def set_job(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(f"SLURM_{name}", value)

    return set_job


def test_a_job_its_requeue_and_an_array_element_have_names_of_their_own(slurm):
    assert job_name() is None
    slurm(JOB_ID="4711", RESTART_COUNT="0")
    assert job_name() == "4711"
    slurm(RESTART_COUNT="2")
    assert job_name() == "4711:2"
    slurm(JOB_ID="4712", ARRAY_JOB_ID="4700", ARRAY_TASK_ID="3")
    assert job_name() == "4700_3:2"


def test_chain_grows_by_each_job_once_and_stays_where_there_is_none():
    assert chain("", None) == ""
    assert chain("4711", None) == "4711"
    assert chain(chain(chain("", "4711"), "4711"), "4711:1") == "4711 4711:1"
    assert jobs_of([{"job": "1"}, {"job": None}, {"job": "1"}, {"job": "2"}]) == "1 2"
