"""slurm/submit_sweep.sh on a real SLURM: a sweep by an array of workers, and what kills leave behind.

Its trials are those of tests/sweeps, a training that counts steps: what is tested is who runs them, and when.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
from optuna.trial import TrialState

from lightning_modules.mlflow_store import connect
from sweeps.stores.studies import load_studies
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT, Checkout
from tests.sweeps.conftest import BASE, SWEEP

MITIGATION = """\
mitigation:
  space:
    forget_more: {alpha_scale: [0.999], insert_scale: [1.0]}
"""
CPU = "--cpus-per-task=1"
PYTHON_PATH = os.pathsep.join([str(ROOT / "tests" / "sweeps" / "stand_ins"), str(ROOT)])


class SweepJobs:
    """A sweep of tiny trials, and the jobs that submit_sweep.sh has made of it."""

    def __init__(self, checkout: Checkout, cluster: Cluster) -> None:
        self.checkout, self.cluster = checkout, cluster
        self.study_dir = checkout.folder / "runs" / "tiny"
        (checkout.folder / "lightning_modules").unlink()  # PYTHONPATH leads to its stand-in
        (checkout.folder / "base.yaml").write_text(BASE)
        (checkout.folder / "sweep.yaml").write_text(SWEEP)
        (checkout.folder / "mitigation.yaml").write_text(MITIGATION)
        self.plan = self.workers = self.report = ""

    def submit(self, *settings: str, step_seconds: float = 0.01, workers: int = 2) -> None:
        said = self.checkout.submit(
            *("sweep.yaml", *settings),
            program="slurm/submit_sweep.sh",
            PYTHONPATH=PYTHON_PATH,
            STEP_SECONDS=str(step_seconds),
            WORKERS=str(workers),
            WAIT_MINUTES="1",
            WORKER_OPTIONS=CPU,
            CONDUCT_OPTIONS=CPU,
        )
        words = said.splitlines()[0].replace(",", "").split()
        self.plan, self.workers, self.report = words[4], words[8], words[11]

    def element(self, index: int) -> str:
        return f"{self.workers}_{index}"

    def wait_for_training(self, trials: int) -> None:
        def counting() -> bool:
            files = self.study_dir.glob("train/trial-*/metrics.jsonl")
            return sum(not (file.parent / "result.json").exists() for file in files) >= trials

        self.cluster.wait_for(counting, 60, "no trial trains")

    def wait_for_report(self) -> str:
        """The state in which the last job ends."""
        return self.cluster.wait_for_state(self.report, "COMPLETED", "FAILED", "CANCELLED")

    def states(self) -> dict[str, list[TrialState]]:
        studies = load_studies(self.study_dir)
        return {s.study_name: [trial.state for trial in s.get_trials(deepcopy=False)] for s in studies}

    def starts(self) -> list[int]:
        """How often each training trial was started, least first."""
        files = self.study_dir.glob("train/trial-*/starts")
        return sorted(len(file.read_text().splitlines()) for file in files)

    def assert_trained(self) -> None:
        assert self.states()["train"] == [TrialState.COMPLETE] * 3
        assert "at training length" in (self.study_dir / "report.txt").read_text()


@pytest.fixture
def sweep(checkout: Checkout, cluster: Cluster) -> SweepJobs:
    return SweepJobs(checkout, cluster)


def test_a_sweep_is_cancelled_reported_and_goes_on_through_all_its_stages(
    sweep: SweepJobs, cluster: Cluster, checkout: Checkout
) -> None:
    sweep.submit("mitigation.yaml", step_seconds=0.3)
    sweep.wait_for_training(trials=2)
    cluster.run("scancel", sweep.workers)
    assert sweep.wait_for_report() == "FAILED"
    assert "3 trials wait for workers" in checkout.log(f"sweep-plan-{sweep.plan}.out")
    for index in range(2):
        assert cluster.state(sweep.element(index)) == "CANCELLED"
        log = checkout.log(f"sweep-{sweep.workers}_{index}.out")
        assert "interrupted, to be continued" in log
        assert "requeued" not in log.replace("not requeued", "")
    report = checkout.log(f"sweep-report-{sweep.report}.out")
    assert "trials are left; to go on: slurm/submit_sweep.sh sweep.yaml mitigation.yaml" in report
    assert set(sweep.states()["train"]) <= {TrialState.RUNNING, TrialState.WAITING}

    sweep.submit("mitigation.yaml")
    assert sweep.wait_for_report() == "COMPLETED", cluster.logs()
    sweep.assert_trained()
    done = [TrialState.COMPLETE] * 2
    assert sweep.states() | {"train": []} == {"train": [], "mitigation-0001": done, "confirm-0001": done}
    assert sweep.starts() == [1, 2, 2]
    assert "Best setting: forget_more" in checkout.log(f"sweep-report-{sweep.report}.out")
    for index in range(2):
        assert cluster.state(sweep.element(index)) == "COMPLETED"


@pytest.mark.slow
def test_a_preempted_worker_is_requeued_and_a_lost_node_costs_no_trial(
    sweep: SweepJobs, cluster: Cluster, checkout: Checkout
) -> None:
    sweep.submit(step_seconds=0.5)
    sweep.wait_for_training(trials=2)
    urgent = checkout.submit("--partition=urgent", "--nodelist=n0", "--exclusive", "--wrap=true")
    preempted = [sweep.element(i) for i in range(2) if cluster.job(sweep.element(i))["NodeList"] == "n0"]
    cluster.wait_for_state(urgent, "COMPLETED")
    assert preempted
    for element in preempted:
        cluster.start_requeued(element)
        assert cluster.job(element)["Restarts"] == "1"
        assert "requeued" in checkout.log(f"sweep-{element}.out")

    cluster.wait_for_state(preempted[0], "RUNNING")
    sweep.wait_for_training(trials=1)
    lost = cluster.job(preempted[0])["NodeList"]
    cluster.kill_node(lost)
    # What the controller finds out by itself after SlurmdTimeout.
    cluster.run("scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=lost")
    for element in [sweep.element(index) for index in range(2)]:
        if cluster.state(element) == "PENDING":  # by SLURM itself
            cluster.start_requeued(element)
    assert int(cluster.job(preempted[0])["Restarts"]) == 2
    assert sweep.wait_for_report() == "COMPLETED", cluster.logs()
    sweep.assert_trained()
    assert sum(sweep.starts()) >= 5


@pytest.mark.skipif(importlib.util.find_spec("sweeps.reconcile") is None, reason="no sweeps.reconcile yet")
def test_after_kills_the_report_has_reconciled_and_nothing_is_left_to_repair(
    sweep: SweepJobs, cluster: Cluster, checkout: Checkout
) -> None:
    sweep.submit(step_seconds=0.3)
    sweep.wait_for_training(trials=2)
    cluster.run("scancel", "--signal=KILL", "--full", sweep.workers)
    assert sweep.wait_for_report() == "FAILED"
    assert "not reconciled" not in checkout.log(f"sweep-report-{sweep.report}.out")
    before = sweep.states()
    assert TrialState.FAIL not in before["train"]
    line = [sys.executable, "-m", "sweeps.reconcile", f"study={sweep.study_dir}"]
    environment = os.environ | {"PYTHONPATH": PYTHON_PATH}
    done = subprocess.run(line, cwd=checkout.folder, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "Nothing to repair.\n"), done
    assert sweep.states() == before


@pytest.mark.slow
def test_trials_that_really_train_carry_the_job_that_ran_them(cluster: Cluster, checkout: Checkout) -> None:
    said = checkout.submit(
        *("conf/sweep/smoke.yaml", "train.overrides.trainer.accelerator=cpu", "evaluate.device=cpu"),
        program="slurm/submit_sweep.sh",
        WORKERS="2",
        WAIT_MINUTES="2",
        WORKER_OPTIONS=CPU,
        CONDUCT_OPTIONS=CPU,
    )
    words = said.splitlines()[0].replace(",", "").split()
    workers, report = words[8], words[11]
    assert cluster.wait_for_state(report, "COMPLETED", "FAILED", seconds=400) == "COMPLETED", cluster.logs()
    jobs = {f"{workers}_{index}" for index in range(2)}
    client = connect(f"sqlite:///{checkout.folder}/runs/mlflow.db")
    trials = sorted((checkout.folder / "runs" / "smoke").glob("train/trial-*/result.json"))
    assert len(trials) == 2
    for trial in trials:
        tags = client.get_run(checkout.json(str(trial))["mlflow_run_id"]).data.tags
        assert tags["slurm_job_id"] in jobs
        assert tags["slurm_job_id"] in tags["slurm_chain"]
        assert [start["job_id"] for start in checkout.json(str(trial.with_name("slurm.json")))] == [
            tags["slurm_job_id"]
        ]
