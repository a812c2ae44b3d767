"""One trial: run directories, each with its config and its subprocess, and the value that Optuna is told.

A training trial is `lightning_modules.train`, then `lightning_modules.evaluate` of what it trained; for a
given checkpoint only the latter. Any other is one `lightning_modules.evaluate`. Every run can be repeated by
hand from its own config.yaml.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from conf.load import parse
from conf.measure_schema import EvaluateConfig
from conf.schema import TrainConfig
from conf.sweep_schema import equal_tokens, evaluation
from conf.sweep_stages import bounds_of, objectives_of
from sweeps.planning.samplers import point_of
from sweeps.trials import sharing
from sweeps.trials.claims import Claim, LostTrial
from sweeps.trials.identity import identity_of, mlflow_run_id, tags_of, write_identity
from sweeps.trials.pruning import GROUP, Follower, group_of, tokens_per_step
from sweeps.trials.side_by_side import train_together
from sweeps.trials.steps import Steps, TrialFailed, ended

BEAT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a trial that has ended is remembered by. values: by objective; empty of a pruned trial."""

    values: dict[str, float]
    excesses: dict[str, float] = field(default_factory=dict)
    seconds: float
    known: dict[str, Any]

    @property
    def is_pruned(self) -> bool:
        return not self.values


def run_trial(taken: Claim, stop: Callable[[], bool]) -> Outcome:
    """Run what of the trial is not done yet.

    Raises TrialFailed; Interrupted once `stop()` is true; LostTrial when another worker has it.
    """
    return _Run(taken, stop).run()


def train_side_by_side(claims: Sequence[Claim], stop: Callable[[], bool]) -> None:
    """The training of several trials in one process; `run_trial` then finds it done. Raises Interrupted."""
    runs = [_Run(taken, stop) for taken in claims]
    configs = {}
    for run in runs:
        try:
            configs[run.taken.run_dir] = run.config_to_train()
        except TrialFailed:  # said by run_trial, which comes to it next
            continue

    def watch() -> None:
        for run in runs:
            run.taken.beat(BEAT_SECONDS)

    steps = Steps(threads=claims[0].store.config.threads_per_trial, stop=stop, watch=watch)
    train_together(configs, lambda line, log: steps._spawn(line, log, {}))


class _Run:
    def __init__(self, taken: Claim, stop: Callable[[], bool]) -> None:
        self.taken, self.config, self.store = taken, taken.store.config, taken.store
        threads, warm = self.config.threads_per_trial, self.config.warm
        self.steps = Steps(threads=threads, stop=stop, watch=self._watch, warm=warm)
        self.follower: Follower | None = None
        self.known: dict[str, Any] = {"run_dir": self._relative(taken.run_dir)}

    def run(self) -> Outcome:
        if self.taken.stage == "train":
            return self._train_and_evaluate()
        checkpoint = self.store.study_dir / self.taken.study.user_attrs["model"]
        self._note(checkpoint=self.taken.study.user_attrs["model"])
        settings = self._evaluate_config(self.taken.run_dir, checkpoint, point_of(self.taken.trial))
        parent = self.taken.study.user_attrs["mlflow_run_id"]
        result = self._step("evaluate", self.taken.run_dir, settings, parent)
        return self._outcome([result])

    def _train_and_evaluate(self) -> Outcome:
        run_dir, point = self.taken.run_dir, point_of(self.taken.trial)
        results, parent = [], self.taken.study.user_attrs["mlflow_run_id"]
        given = point.get("checkpoint")
        if given is None:
            trained = self._train(parent)
            results.append(trained)
            parent = trained["mlflow_run_id"]
            if trained["status"] == "pruned":
                return Outcome(values={}, seconds=trained["seconds"], known=self.known)
        else:
            self._note(checkpoint=given)
        settings = self._evaluate_config(run_dir / "evaluation", Path(given or run_dir), {})
        results.append(self._step("evaluate", run_dir / "evaluation", settings, parent))
        return self._outcome(results)

    def config_to_train(self) -> TrainConfig:
        """With the names under which its run is recorded, as `_step` gives them to a command."""
        config = self._train_config()
        self._note(checkpoint=self._relative(self.taken.run_dir / "checkpoints"))
        config.tracking.tags |= self.tags
        config.tracking.parent_run_id = self.taken.study.user_attrs["mlflow_run_id"]
        return config

    def _train(self, parent: str | None) -> dict[str, Any]:
        stage, trial, run_dir = self.config.train, self.taken.trial, self.taken.run_dir
        config = self._train_config()
        scale = tokens_per_step(config)
        shared = self._shared()
        skipped = shared.steps if shared else 0
        trial.set_user_attr("tokens", float((config.trainer.max_steps - skipped) * scale))
        self._note(
            checkpoint=self._relative(run_dir / "checkpoints"),
            continues=self._relative(shared.path) if shared and shared.path else None,
        )
        self._keep_result_with_its_model()
        environment = {}
        # Said either way: the config of an earlier start may name a checkpoint that is damaged since.
        begins = f"continue_from={shared.path if shared else 'null'}"
        overrides = [begins] if sharing.has_lengths(self.config) else []
        if stage.pruner.name != "none":
            trial.set_user_attr(GROUP, group_of(config))
            self.follower = Follower(self.taken, stage, config)
            environment = self.follower.environment
        try:
            result = self._step("train", run_dir, config, parent, overrides, environment)
        finally:
            self.follower = None
        self.known["tokens"] = float((result.get("steps", config.trainer.max_steps) - skipped) * scale)
        return result

    def _keep_result_with_its_model(self) -> None:
        """A result whose model cannot be read any more, and is not evaluated yet, is trained for again."""
        run_dir = self.taken.run_dir
        result = ended(run_dir)
        if result is None or result.get("checkpoint") is None or ended(run_dir / "evaluation"):
            return
        if not is_zipfile(run_dir / result["checkpoint"]):
            (run_dir / "result.json").rename(run_dir / "result.json.damaged")
            print(f"{self.taken.name}: {result['checkpoint']} is damaged; trained again", flush=True)

    def _shared(self) -> sharing.Shared | None:
        """What a shorter trial has trained already; settled at the trial's first start, and again if that is
        damaged before the trial has a checkpoint of its own."""
        trial, run_dir = self.taken.trial, self.taken.run_dir
        settled = trial.user_attrs.get("shared")
        is_open = "shared" not in trial.user_attrs or (
            settled is not None
            and ended(run_dir) is None
            and not sharing.is_whole(self.store.study_dir / settled[0])
        )
        if is_open and not any(map(is_zipfile, (run_dir / "checkpoints").glob("*.ckpt"))):
            found = sharing.find_shared(self.store, self.taken.study, trial)
            if found is not None:
                print(f"{self.taken.name}: {found.why}", flush=True)
            settled = [self._relative(found.path), found.steps] if found and found.path else None
            trial.set_user_attr("shared", settled)
        if settled is None:
            return None
        return sharing.Shared(path=self.store.study_dir / settled[0], steps=settled[1], why="")

    def _step(
        self,
        command: str,
        run_dir: Path,
        config: Any,
        parent: str | None,
        overrides: list[str] | None = None,
        environment: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """Run one command; the trial's MLflow run is known as soon as there is one."""
        identity = [f"tracking.tags.{name}={value}" for name, value in self.tags.items()]
        tracked = [f"tracking.parent_run_id={parent}"] if parent else []
        arguments = [*(overrides or []), *(identity + tracked if self.config.tracking.enabled else [])]
        try:
            result = self.steps.run(command, run_dir, config, arguments, environment or {})
        except LostTrial:
            raise  # its names are another worker's to write
        except BaseException:
            self._note()
            raise
        self._note()
        return result

    def _note(self, **further: Any) -> None:
        """Write down, on both sides, who is who."""
        trial, run_dir = self.taken.trial, self.taken.run_dir
        self.known |= further | {"mlflow_run_id": mlflow_run_id(run_dir)}
        for name, value in self.known.items():
            if trial.user_attrs.get(name) != value:
                trial.set_user_attr(name, value)
        run_dir.mkdir(parents=True, exist_ok=True)
        identity = identity_of(self.taken.study, trial, self.config.name, self.known)
        write_identity(run_dir, identity)
        self.tags = tags_of(identity) | {
            name: str(self.known[name]) for name in ("checkpoint", "continues") if self.known.get(name)
        }

    def _relative(self, path: Path) -> str:
        """As seen from the study directory, which may be moved."""
        return str(path.relative_to(self.store.study_dir))

    def _watch(self) -> None:
        """Called while a command runs."""
        if self.follower is not None:
            self.follower.poll()
        self.taken.beat(BEAT_SECONDS)

    def _train_config(self) -> TrainConfig:
        owned = {
            "run_dir": str(self.taken.run_dir),
            "seed": self.taken.trial.user_attrs["seed"],
            "trainer.threads": self.config.threads_per_trial,
            "trainer.progress_bar": False,
            "trainer.keep_stable": sharing.has_lengths(self.config),
        }
        point = point_of(self.taken.trial)
        rows = equal_tokens(self.config, point)
        sources: list[Any] = [str(self.store.study_dir / "base.yaml"), point | rows, owned]
        try:
            return parse(TrainConfig, [*sources, self._tracking()])
        except ValueError as error:  # settings that do not go together, which a sampler may propose
            raise TrialFailed(f"config: {error}") from None

    def _evaluate_config(self, run_dir: Path, checkpoint: Path, point: dict[str, Any]) -> EvaluateConfig:
        owned = {
            "checkpoint": str(checkpoint),
            "run_dir": str(run_dir),
            "threads": self.config.threads_per_trial,
        }
        settings = evaluation(self.config, stage=self.taken.stage)
        return parse(EvaluateConfig, [settings, point, owned, self._tracking()])

    def _tracking(self) -> dict[str, Any]:
        """Record where the sweep records. What the run is called comes with every start, as tags."""
        tracking = self.config.tracking
        return {
            "tracking.enabled": tracking.enabled,
            "tracking.uri": tracking.uri,
            "tracking.experiment": tracking.experiment,
            "tracking.tags": dict(tracking.tags),
        }

    def _outcome(self, results: list[dict[str, Any]]) -> Outcome:
        is_training = self.taken.stage == "train"
        stage = self.config.train if is_training else self.config.mitigation
        metrics = {key: value for result in results for key, value in result["metrics"].items()}
        bounds = bounds_of(stage, self.taken.stage) if self.taken.stage != "confirm" else []
        return Outcome(
            values={name: _pick(name, metrics, finite=True) for name in objectives_of(stage)},
            excesses={str(b): b.excess(_pick(b.metric, metrics, finite=False)) for b in bounds},
            seconds=sum(result["seconds"] for result in results),
            known=self.known,
        )


def _pick(metric: str, metrics: dict[str, Any], *, finite: bool) -> float:
    if metric not in metrics:
        raise TrialFailed(f"metric={metric}: not measured; there are {', '.join(sorted(metrics))}")
    value = float(metrics[metric])
    if finite and not math.isfinite(value):
        raise TrialFailed(f"metric={metric}: {value}")
    return value
