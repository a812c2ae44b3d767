"""What a sweep has promised, checked once it has ended: each broken promise is a line."""

import json
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from conf.load import parse
from conf.schema import TrainConfig
from sweeps.planning.samplers import point_of
from sweeps.stores.store import Store
from sweeps.stores.studies import latest, lost
from sweeps.stores.study_dir import load
from tests.campaign import law
from tests.campaign.arena import Arena

NOTHING = "Nothing to repair.\n"

Fingerprint = dict[str, Any]  # plan -> point, value, what the result holds, without times


def broken_promises(arena: Arena, undisturbed: Fingerprint | None) -> list[str]:
    """undisturbed: what the same sweep came to without faults; None where its sampler learns."""
    found = [
        f"sweeps.run shows a traceback: {tail(Path(p))}" for p in arena.outputs if has_traceback(Path(p))
    ]
    logs = sorted((arena.study_dir / "workers").glob("*.txt"))
    found += [f"{log.name}: died with a traceback: {tail(log)}" for log in logs if has_traceback(log)]
    lines = [arena.command("sweeps.reconcile") for _ in range(2)]
    for done in lines:
        if done.returncode != 0:
            return [*found, f"reconcile: status {done.returncode}: {(done.stdout + done.stderr)[-800:]}"]
    if lines[1].stdout != NOTHING:
        found.append(f"a second reconcile repairs: {lines[1].stdout}; the first: {lines[0].stdout}")
    config = load(arena.study_dir)
    config.storage.uri = arena.spec.uri
    study = next(s for s in Store(arena.study_dir, config).load_studies() if s.study_name.endswith("train"))
    found += _lost(arena, study) + _twice(arena, study) + _damaged(arena)
    if not arena.spec.real:
        found += _not_replayed(arena, study)
    if undisturbed is not None and fingerprint(arena, study) != undisturbed:
        found.append(f"other results than undisturbed: {difference(fingerprint(arena, study), undisturbed)}")
    return found


def fingerprint(arena: Arena, study: Study) -> Fingerprint:
    """Bit for bit what the sweep came to."""
    prints = {}
    for plan, trial in latest(study).items():
        run_dir = arena.study_dir / "train" / f"trial-{trial.number:04d}"
        result = json.loads((run_dir / "result.json").read_text()) if run_dir.exists() else {}
        kept = {"val/loss"} if arena.spec.real else set(result.get("metrics", {}))
        numbers = {name: value for name, value in result.get("metrics", {}).items() if name in kept}
        prints[plan] = [point_of(trial), trial.user_attrs["seed"], trial.values, numbers, result.get("state")]
        if arena.spec.real and run_dir.exists():
            prints[plan].append(weights(run_dir))
    return prints


def weights(run_dir: Path) -> str:
    """A hash of every parameter of the trained model."""
    import hashlib

    from lightning_modules.checkpoints import read_weights

    digest = hashlib.sha256()
    for name, value in sorted(read_weights(run_dir).items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def study_of(arena: Arena) -> Study:
    config = load(arena.study_dir)
    return next(s for s in Store(arena.study_dir, config).load_studies() if s.study_name.endswith("train"))


def has_traceback(output: Path) -> bool:
    return "Traceback" in output.read_text()


def tail(output: Path) -> str:
    return output.read_text()[-1500:]


def difference(ours: Fingerprint, theirs: Fingerprint) -> str:
    plans = [plan for plan in ours.keys() | theirs.keys() if ours.get(plan) != theirs.get(plan)]
    return "; ".join(f"{plan}: {ours.get(plan)} != {theirs.get(plan)}" for plan in sorted(plans)[:3])


def _lost(arena: Arena, study: Study) -> list[str]:
    """Every planned trial has ended well, and there are as many as the budget says."""
    found, final = [], latest(study)
    if len(final) != arena.spec.budget:
        found.append(f"budget {arena.spec.budget}, planned trials {len(final)}")
    found += [f"{plan}: {t.state.name}" for plan, t in final.items() if t.state != TrialState.COMPLETE]
    found += [f"{plan}: marked as lost" for plan, trial in final.items() if trial.number in lost(study)]
    good = [t for t in study.get_trials() if t.state == TrialState.COMPLETE and t.number not in lost(study)]
    if len(good) != arena.spec.budget:
        found.append(f"budget {arena.spec.budget}, completed trials on record {len(good)}")
    for trial in good:
        run_dir = arena.study_dir / "train" / f"trial-{trial.number:04d}"
        names = ("result.json", "evaluation/result.json", "evaluation/evaluation.json")
        found += [f"{run_dir.name}: no {name}" for name in names if not (run_dir / name).exists()]
    return found


def _twice(arena: Arena, study: Study) -> list[str]:
    """Completed once: by the ledger, which every stand-in writes when it has put its result in place; and by
    the directories, of which one holds each planned trial."""
    ledger = arena.home / "completed"
    found = []
    if ledger.exists():
        runs = Counter(ledger.read_text().splitlines())
        # After a journal cut short a directory may have moved to another number: then the paths mix.
        total, wanted = sum(runs.values()), 2 * arena.spec.budget
        if total > wanted:
            found.append(f"{total} commands ran to completion, {wanted} were wanted: {runs.most_common(3)}")
    owners: Counter[str] = Counter()
    for path in (*arena.study_dir.glob("train/*/trial.json"), *arena.study_dir.glob("orphans/*/trial.json")):
        if (path.parent / "result.json").exists():
            owners[json.loads(path.read_text())["plan"]] += 1
    return found + [f"{plan}: trained in {n} directories" for plan, n in owners.items() if n > 1]


def _damaged(arena: Arena) -> list[str]:
    found = []
    journal = arena.study_dir / "journal.log"
    if arena.spec.uri is None:
        for number, line in enumerate(journal.read_bytes().split(b"\n")[:-1], start=1):
            try:
                json.loads(line)
            except ValueError:
                found.append(f"journal.log: line {number} is damaged")
        if not journal.read_bytes().endswith(b"\n"):
            found.append("journal.log ends in half a line")
    for database in arena.folder.glob("**/mlflow.db"):
        answer = sqlite3.connect(database).execute("PRAGMA integrity_check").fetchall()
        if answer != [("ok",)]:
            found.append(f"{database.name}: {answer}")
        left = (
            sqlite3.connect(database).execute("SELECT count(*) FROM runs WHERE status = 'RUNNING'").fetchone()
        )
        if left[0]:
            found.append(f"{left[0]} MLflow runs left RUNNING")
    return found


def _not_replayed(arena: Arena, study: Study) -> list[str]:
    """Every recorded value is what its own config.yaml computes anew."""
    found = []
    for trial in study.get_trials():
        if trial.state == TrialState.COMPLETE and trial.number not in lost(study):
            replayed = law.recent_exact(_replay(arena, trial))
            if trial.value != replayed:
                found.append(f"trial {trial.number}: recorded {trial.value!r}, replayed {replayed!r}")
    return found


def _replay(arena: Arena, trial: FrozenTrial) -> law.State:
    run_dir = arena.study_dir / "train" / f"trial-{trial.number:04d}"
    config = parse(TrainConfig, [str(run_dir / "config.yaml")])
    point = point_of(trial)
    assert (config.model.d_state, config.optim.lr) == (point["model.d_state"], point["optim.lr"]), point
    return law.trained(config)
