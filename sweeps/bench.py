"""What a trial costs beyond its own work: ask, start, imports, MLflow, tell.

    python -m sweeps.bench [sweep=conf/sweep/smoke.yaml] [trials=5] [points=10000] [output=FILE.json]

Runs the sweep's trials in a directory of its own, one after the other, and reads the phases of each off the
times at which its files were written: nothing in a trial knows that it is measured. Evaluations are measured
twice: each in a fresh process (warm=false), and forked from one that has imported everything (the default).
Prints a table and writes JSON. Wall time: nothing else should run on the machine.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.load import from_command_line, user_errors
from conf.sweep_bench import SweepBenchConfig

Phases = dict[str, float]  # what -> seconds, in their order
IMPORTS = {
    "torch": "import torch",
    "Lightning": "import torch, lightning.pytorch",
    "the whole of train": "import lightning_modules.fit",
    "MLflow's client and its SQL store": "import mlflow.store.tracking.sqlalchemy_store",
}
POINT_KEYS = 10


def main(argv: list[str] | None = None) -> int:
    config = from_command_line(SweepBenchConfig, __doc__ or "", argv)
    with user_errors(), tempfile.TemporaryDirectory() as folder:
        numbers = measure(config, Path(folder))
    output = Path(config.output or f"runs/overhead-{time.strftime('%Y%m%d-%H%M%S')}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(numbers, indent=2) + "\n")
    show(numbers)
    print(output)
    return 0


def measure(config: SweepBenchConfig, folder: Path) -> dict[str, Any]:
    study_dir, database = folder / "study", f"sqlite:///{folder}/mlflow.db"
    settings = [f"study_dir={study_dir}", f"tracking.uri={database}", "workers=0", "threads=1"]
    settings += ["train.space.model.d_state=[8]", "train.overrides.trainer.log_every=1"]
    # An evaluation of each kind more than is counted: the first pays for the server and for cold caches.
    count = 2 * (config.trials + 1)
    factors = [round(0.999 - 0.001 * i, 3) for i in range(count - 1)]  # and the baseline
    settings.append(f"mitigation.space.forget_more.alpha_scale=[{','.join(map(str, factors))}]")
    imports = {name: _time_import(code) for name, code in IMPORTS.items()}
    _queue(config.sweep, settings)
    (trained,) = _run_all(study_dir, "train", [False])
    _queue(config.sweep, settings)
    kinds = [False] * (count // 2) + [True] * (count // 2)
    evaluated = _run_all(study_dir, "mitigation", kinds)
    fresh, warm = evaluated[: count // 2], evaluated[count // 2 :]
    logged = _log_points(config.points, database, folder) if config.points else None
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "imports": imports,
        "training": trained,
        "evaluation, fresh process": _medians(fresh[1:]),
        "evaluation, warm": _medians(warm[1:]),
        "evaluation, warm, the worker's first": warm[0],
        "logging": logged,
    }


def _queue(sweep: str, settings: list[str]) -> None:
    """Let the sweep queue the trials of its next stage; it runs none itself."""
    command = [sys.executable, "-m", "sweeps.run", sweep, *settings]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode not in (0, os.EX_TEMPFAIL):
        raise ValueError(f"sweep={sweep}: {done.stdout.strip()}")


def _run_all(study_dir: Path, stage: str, warm: list[bool]) -> list[Phases]:
    """Run the waiting trials of a stage as a worker does, and time them."""
    from sweeps.stores.store import Store
    from sweeps.stores.study_dir import load
    from sweeps.trials.claims import claim, finish
    from sweeps.trials.trial import run_trial

    config = load(study_dir)
    measured = []
    for is_warm in warm:
        store = Store(study_dir, replace(config, warm=is_warm))
        began = time.time()
        taken = claim(store, store.load_studies())
        if taken is None or taken.stage != stage:
            raise ValueError(f"{study_dir}: the sweep has no further {stage} trial to measure")
        asked = time.time()
        outcome = run_trial(taken, stop=lambda: False)
        ran = time.time()
        finish(taken, outcome.values, outcome.seconds, outcome.known, outcome.excesses)
        taken.lock.release()
        told = time.time()
        phases = _phases_of_training if stage == "train" else _phases_of_evaluation
        measured.append(phases(taken.run_dir, began, asked, ran, told))
    return measured


def _phases_of_training(run_dir: Path, began: float, asked: float, ran: float, told: float) -> Phases:
    points = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((run_dir / "result.json").read_text())
    first = points[0]["time"] / 1000
    started, opened = _written(run_dir / "lock"), _written(run_dir / "tracking.json")
    return {
        "ask": asked - began,
        "start to locked run directory": started - asked,
        "imports, model, MLflow's start": opened - started,
        "to the end of the first step": first - opened,
        "further steps and validation": points[-1]["time"] / 1000 - first,
        "result, end of the process, its evaluation": ran - points[-1]["time"] / 1000,
        "tell": told - ran,
        "start to the end of the first step": first - asked,
        "training steps alone": result["seconds"],
    }


def _phases_of_evaluation(run_dir: Path, began: float, asked: float, ran: float, told: float) -> Phases:
    planned, opened = _written(run_dir / "config.yaml"), _written(run_dir / "tracking.json")
    read, drawn = _written(run_dir / "evaluation.json"), max(map(_written, run_dir.glob("figures/*.png")))
    phases = {
        "ask": asked - began,
        "start, imports, model": planned - asked,
        "MLflow's start": opened - planned,
        "own work: reading": read - opened,
        "own work: figures": drawn - read,
        "MLflow's record, end of the process": ran - drawn,
        "tell": told - ran,
    }
    return phases | {"overhead": sum(value for name, value in phases.items() if "own work" not in name)}


def _written(file: Path) -> float:
    return file.stat().st_mtime


def _medians(measured: list[Phases]) -> Phases:
    medians = {name: statistics.median(one[name] for one in measured) for name in measured[0]}
    return medians | {"overhead, least": min(one["overhead"] for one in measured)}


def _time_import(code: str) -> float:
    """Seconds of an import in a process of its own, the second time: its files are in the page cache then."""
    program = (
        "import time; begin = time.perf_counter()\n"
        "from lightning_modules.imports import *\n"
        f"with heavy_imports(UNUSED_BY_LIGHTNING + UNUSED_BY_MLFLOW): {code}\n"
        "print(time.perf_counter() - begin)"
    )
    command = [sys.executable, "-c", program]
    for _ in range(2):
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(printed)


def _log_points(count: int, uri: str, folder: Path) -> dict[str, float]:
    """What logging takes from the thread that trains, with MLflow and without, and what the end takes."""
    from conf.schema import TrackingConfig
    from lightning_modules.tracking import Tracker

    numbers: dict[str, float] = {"points": count}
    for name, enabled in (("metrics.jsonl alone", False), ("with MLflow", True)):
        run_dir = folder / name.replace(" ", "-")
        run_dir.mkdir()
        calls = []
        with Tracker(TrackingConfig(enabled=enabled, uri=uri), run_dir, name=name) as tracker:
            for step in range(count // POINT_KEYS):
                began = time.perf_counter()
                tracker.log_metrics({f"key{key}": step + key for key in range(POINT_KEYS)}, step)
                calls.append(time.perf_counter() - began)
            left = time.perf_counter()
        numbers[f"{name}: ms a call of {POINT_KEYS} points"] = 1000 * statistics.mean(calls)
        numbers[f"{name}: longest call, ms"] = 1000 * max(calls)
        numbers[f"{name}: seconds in all"] = sum(calls)
        numbers[f"{name}: seconds at the end"] = time.perf_counter() - left
    return numbers


def show(numbers: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, values in numbers.items():
        if not isinstance(values, dict):
            console.print(f"{title}: {values}", highlight=False)
            continue
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for name, value in values.items():
            table.add_row(name, f"{value:,.3f}")
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
