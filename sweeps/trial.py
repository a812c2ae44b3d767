"""One trial: run directories, each with its config and its subprocess, and the value that Optuna is told.

A training trial is `lightning_modules.train`, then `lightning_modules.evaluate` of what it trained; for a
given checkpoint only the latter. Any other is one `lightning_modules.evaluate`. Every run can be repeated by
hand from its own config.yaml.
"""

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.load import parse, to_yaml
from conf.schema import EvaluateConfig, TrainConfig
from conf.sweep_schema import SweepConfig, evaluation
from lightning_modules.run_dir import read_result, write_text
from lightning_modules.slurm import environment_for_child
from sweeps.studies import Claim, point_of
from sweeps.tether import tethered

STOP_GRACE_SECONDS = 30.0


class TrialFailed(Exception):
    """The trial ended without a result; the message says why, from its log."""


class Interrupted(Exception):
    """The worker was asked to stop; the trial can be continued later."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished trial is remembered by."""

    value: float
    seconds: float
    mlflow_run_id: str | None


def run_trial(claim: Claim, config: SweepConfig, study_dir: Path, stop: Callable[[], bool]) -> Outcome:
    """Run what of the trial is not done yet. Raises TrialFailed, or Interrupted once `stop()` is true."""
    step = _Steps(threads=config.threads_per_trial, stop=stop)
    if claim.stage == "train":
        results, parent = [], claim.study.user_attrs["mlflow_run_id"]
        given = point_of(claim.trial).get("checkpoint")
        if given is None:
            results.append(step.run("train", claim.run_dir, _train_config(claim, config, study_dir)))
            parent = results[0]["mlflow_run_id"]
        settings = _evaluate_config(
            claim,
            config,
            run_dir=claim.run_dir / "evaluation",
            checkpoint=Path(given or claim.run_dir),
            parent=parent,
            point={},
        )
        results.append(step.run("evaluate", claim.run_dir / "evaluation", settings))
        metric = config.train.metric
    else:
        settings = _evaluate_config(
            claim,
            config,
            run_dir=claim.run_dir,
            checkpoint=study_dir / claim.study.user_attrs["model"],
            parent=claim.study.user_attrs["mlflow_run_id"],
            point=point_of(claim.trial),
        )
        results, metric = [step.run("evaluate", claim.run_dir, settings)], config.mitigation.metric
    return Outcome(
        value=_pick(metric, results),
        seconds=sum(result["seconds"] for result in results),
        mlflow_run_id=results[0]["mlflow_run_id"],
    )


def last_words(log: Path, lines: int = 3) -> str:
    """Why a command failed: its `error:` line, else the last lines of its log."""
    text = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in text if line.startswith("error:")]
    return errors[-1] if errors else " | ".join(text[-lines:])[-500:]


@dataclass(frozen=True, kw_only=True)
class _Steps:
    """Runs the commands of a trial, each in a process group of its own that dies with this process."""

    threads: int
    stop: Callable[[], bool]

    def run(self, command: str, run_dir: Path, config: Any) -> dict[str, Any]:
        """Run `lightning_modules.<command>` on the run directory unless it is done; returns its result.

        A process killed from outside (out of memory, by hand) is continued once, from its checkpoint.
        """
        done = _completed(run_dir)
        if done:
            return done
        run_dir.mkdir(parents=True, exist_ok=True)
        if not (run_dir / "config.yaml").exists():
            write_text(run_dir / "config.yaml", to_yaml(config))
        config_file = str(run_dir / "config.yaml")  # a started run leaves run_dir out of it: it may be moved
        line = [sys.executable, "-m", f"lightning_modules.{command}", config_file, f"run_dir={run_dir}"]
        log = run_dir / "log.txt"
        status = self._spawn(line, log)
        if status < 0:
            status = self._spawn(line, log)
        result = _completed(run_dir)
        if result is None:
            if self.stop():  # a batch system tells worker and trial alike: the trial may be gone first
                raise Interrupted
            how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            raise TrialFailed(f"{command}: {how}: {last_words(log)}")
        return result

    def _spawn(self, line: list[str], log: Path) -> int:
        if self.stop():
            raise Interrupted
        environment = environment_for_child()
        environment.pop("MLFLOW_RUN_ID", None)
        environment |= {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        with log.open("a") as output:
            output.write(f"$ {shlex.join(['python', *line[1:]])}\n")
            output.flush()
            process = subprocess.Popen(
                tethered(line, "SIGKILL"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a Ctrl-C reaches the sweep, which then stops its trials
            )
        while process.poll() is None:
            if self.stop():
                _end_group(process)
                raise Interrupted
            time.sleep(0.05)
        return process.returncode


def _completed(run_dir: Path) -> dict[str, Any] | None:
    result = read_result(run_dir)
    return result if result and result["status"] == "completed" else None


def _end_group(process: subprocess.Popen) -> None:
    """Ask the trial to save and end; kill it and its children when it takes too long."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _train_config(claim: Claim, config: SweepConfig, study_dir: Path) -> TrainConfig:
    owned = {
        "run_dir": str(claim.run_dir),
        "seed": claim.trial.user_attrs["seed"],
        "trainer.threads": config.threads_per_trial,
        "trainer.progress_bar": False,
    }
    tracking = _tracking(claim, config, claim.study.user_attrs["mlflow_run_id"])
    try:
        return parse(TrainConfig, [str(study_dir / "base.yaml"), point_of(claim.trial), owned, tracking])
    except ValueError as error:  # settings that do not go together, which a sampler may propose
        raise TrialFailed(f"config: {error}") from None


def _evaluate_config(
    claim: Claim,
    config: SweepConfig,
    *,
    run_dir: Path,
    checkpoint: Path,
    parent: str | None,
    point: dict[str, Any],
) -> EvaluateConfig:
    owned = {"checkpoint": str(checkpoint), "run_dir": str(run_dir), "threads": config.threads_per_trial}
    settings = evaluation(config, stage=claim.stage)
    return parse(EvaluateConfig, [settings, point, owned, _tracking(claim, config, parent)])


def _tracking(claim: Claim, config: SweepConfig, parent: str | None) -> dict[str, Any]:
    """Record where the sweep records, as a child of `parent`, under the trial's own name."""
    tags = {"sweep": config.name, "stage": claim.stage, "trial": claim.name}
    return {
        "tracking.enabled": config.tracking.enabled,
        "tracking.uri": config.tracking.uri,
        "tracking.experiment": config.tracking.experiment,
        "tracking.parent_run_id": parent,
        "tracking.tags": {**config.tracking.tags, **tags},
    }


def _pick(metric: str, results: list[dict[str, Any]]) -> float:
    metrics = {key: value for result in results for key, value in result["metrics"].items()}
    if metric not in metrics:
        raise TrialFailed(f"metric={metric}: not measured; there are {', '.join(sorted(metrics))}")
    value = float(metrics[metric])
    if not math.isfinite(value):
        raise TrialFailed(f"metric={metric}: {value}")
    return value
