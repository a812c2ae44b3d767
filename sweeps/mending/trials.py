"""Trials whose record and run directory disagree: ended, put back to wait, or queued again."""

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from lightning_modules.run_dir import read_result
from sweeps.mending.directories import FIXED, try_locked
from sweeps.stores.store import Store
from sweeps.stores.studies import latest, lost, mark_lost, retry, trial_name
from sweeps.trials.claims import Claim, begin, finish, prune, put_back
from sweeps.trials.claims import fail as record_failure
from sweeps.trials.identity import identity_of, mlflow_run_id, read_identity, write_identity
from sweeps.trials.steps import Interrupted, TrialFailed, ended
from sweeps.trials.trial import run_trial


def mend_trials(store: Store, study: Study) -> list[str]:
    """Make every trial's state agree with what its directory holds; returns a line for each repair."""
    lines = []
    for trial in study.get_trials(deepcopy=False):
        name = trial_name(study, trial.number)
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            lines += [f"{name}: {what}" for what in _mend_ended(store, study, trial)]
        elif trial.state != TrialState.FAIL:
            with store.holding("claim"), try_locked(store, study, trial.number) as held:
                if held:
                    lines += [f"{name}: {what}" for what in _mend_open(store, study, trial)]
    return lines


def _mend_open(store: Store, study: Study, trial: FrozenTrial) -> list[str]:
    """A trial that nobody works on: recorded if its work is done, else it waits."""
    trial = study.get_trials(deepcopy=False)[trial.number]  # as it is now that the lock is ours
    is_waiting = trial.state == TrialState.WAITING
    run_dir, lines = store.run_dir(study, trial.number), []
    lines += _take_parameters(store, study, trial)
    if trial.state.is_finished() or (is_waiting and not _is_done(store, study, trial)):
        return lines
    if is_waiting and not study._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
        return lines
    # The lock is held here, by try_locked; the claim must not release it.
    taken = Claim(store=store, study=study, trial=Trial(study, trial._trial_id), lock=_Held())
    begin(taken, by_worker=False)
    try:
        outcome = run_trial(taken, stop=lambda: True)  # nothing is started: what is done is read
    except Interrupted:
        put_back(taken)
        steps = sorted(run_dir.glob("checkpoints/step=*.ckpt"))
        where = f"from {steps[-1].stem.replace('step=', 'step ')}" if steps else "from its start"
        return [*lines, f"its worker is gone; it waits, to be continued {where}"]
    except TrialFailed as error:
        record_failure(taken, str(error))
        return [*lines, f"its worker is gone after it had failed; recorded: {error}"]
    if outcome.is_pruned:
        prune(taken, outcome.seconds, outcome.known)
        return [*lines, "its worker is gone after it was pruned; recorded"]
    finish(taken, outcome.values, outcome.seconds, outcome.known, outcome.excesses)
    return [*lines, f"had a result that nobody recorded; recorded {next(iter(outcome.values.values())):g}"]


def _take_parameters(store: Store, study: Study, trial: FrozenTrial) -> list[str]:
    """A point that the record has forgotten is the one that the directory has begun with."""
    identity = read_identity(store.run_dir(study, trial.number))
    if trial.params or identity is None or identity["plan"] != trial.user_attrs["plan"]:
        return []
    if not identity["parameters"] or trial.system_attrs.get(FIXED) == identity["parameters"]:
        return []
    study._storage.set_trial_system_attr(trial._trial_id, FIXED, identity["parameters"])
    return ["its point was forgotten; taken from its directory"]


def _is_done(store: Store, study: Study, trial: FrozenTrial) -> bool:
    run_dir = store.run_dir(study, trial.number)
    if study.user_attrs["stage"] != "train":
        return ended(run_dir) is not None
    result = ended(run_dir)
    return bool(result and result["status"] == "pruned") or ended(run_dir / "evaluation") is not None


def _mend_ended(store: Store, study: Study, trial: FrozenTrial) -> list[str]:
    """A trial on record as ended: its results are there, or it is done again."""
    if trial.number in lost(study):
        return []
    run_dir = store.run_dir(study, trial.number)
    evaluated = run_dir / "evaluation" if study.user_attrs["stage"] == "train" else run_dir
    wanted = [run_dir] if trial.state == TrialState.PRUNED else [evaluated]
    if study.user_attrs["stage"] == "train" and "checkpoint" not in trial.user_attrs.get("point", {}):
        wanted.append(run_dir)
    complete = all(read_result(folder) for folder in wanted)
    if trial.state == TrialState.COMPLETE:
        complete = complete and (evaluated / "evaluation.json").exists()
    if complete:
        return _mend_identity(store, study, trial)
    mark_lost(study, trial.number)
    if latest(study)[trial.user_attrs["plan"]].number != trial.number:
        return ["its results are gone; a later trial stands for it"]
    retry(study, trial)
    again = latest(study)[trial.user_attrs["plan"]].number
    if trial.state == TrialState.COMPLETE and not (evaluated / "evaluation.json").exists():
        (evaluated / "result.json").unlink(missing_ok=True)
    if run_dir.exists() and not store.run_dir(study, again).exists():
        run_dir.rename(store.run_dir(study, again))
    return [f"its results are gone; it is done again as {trial_name(study, again)}"]


def _mend_identity(store: Store, study: Study, trial: FrozenTrial) -> list[str]:
    """trial.json of an ended trial says what the record says."""
    run_dir = store.run_dir(study, trial.number)
    names = ("run_dir", "checkpoint", "continues", "tokens")
    known = {name: trial.user_attrs[name] for name in names if name in trial.user_attrs}
    wanted = identity_of(study, trial, store.config.name, known | {"mlflow_run_id": mlflow_run_id(run_dir)})
    identity = read_identity(run_dir)
    if identity == wanted:
        return []
    write_identity(run_dir, wanted)
    return ["trial.json was missing; written" if identity is None else "trial.json was out of date; written"]


class _Held:
    """A lock that is held elsewhere."""

    def try_acquire(self) -> bool:
        return True

    def acquire(self) -> bool:
        return True

    def release(self) -> None: ...

    def keep(self, wait: bool) -> bool:
        return True
