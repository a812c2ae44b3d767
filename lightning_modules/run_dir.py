"""The directory of one training run: whose it is, who writes it, what it left.

    run_dir/
      config.yaml      the resolved config; `train run_dir/config.yaml` continues or verifies this run
      checkpoints/     step=0000100.ckpt ..., last.ckpt
      metrics.jsonl    every metric point, whatever happens to the tracking store
      tracking.json    the MLflow run
      result.json      written once the run is complete
      lock             held by the process that writes here

Nothing here imports torch: a run that is complete, foreign or busy answers in milliseconds.
"""

import fcntl
import hashlib
import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.load import flatten, parse, to_yaml
from conf.schema import TrainConfig

# Settings that may change between two starts of one run: they say where and how fast it runs, or what is
# kept of it, and leave weights and metrics as they are (rounding aside, for threads, devices and graphs).
FREE_SETTINGS = (
    "run_dir",
    "print_config",
    "continue_from",
    "tracking.",
    "data.num_workers",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.context_parallel",
    "trainer.strategy",
    "trainer.cuda_graphs",
    "deepspeed.",
    "trainer.threads",
    "trainer.progress_bar",
    "trainer.checkpoint_every",
    "trainer.async_checkpoints",
    "trainer.keep_last",
    "trainer.keep_stable",
)


class RunError(RuntimeError):
    """A run that cannot go on, for a reason that one line tells the user in full."""


class RunDir:
    """A run directory opened for writing by this process; the lock goes when the process does."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path = path
        self.config = config
        self._lock = _take_lock(path) if is_rank_zero() else None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def write_result(self, result: dict[str, Any]) -> None:
        write_json(self.path / "result.json", result)

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            _HELD_LOCKS.discard(self._lock)
            os.close(self._lock)
            self._lock = None


def locate(config: TrainConfig, argv: list[str]) -> Path:
    """Where this run lives: `run_dir`, else the run directory whose config.yaml was named, else
    runs/<name of the first YAML file>-<hash of the config>: the same command finds its own run again."""
    if config.run_dir is not None:
        return Path(config.run_dir)
    files = [Path(argument) for argument in argv if "=" not in argument]
    for file in files:
        if file.name == "config.yaml" and (file.parent / "lock").is_file():
            return file.parent
    stem = files[0].stem if files else "train"
    return Path("runs") / f"{stem}-{config_hash(config)}"


def config_hash(config: TrainConfig) -> str:
    """Eight hex digits of every setting that decides the result."""
    text = json.dumps(_identity(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_result(path: Path) -> dict[str, Any] | None:
    """The result of a completed run, or None."""
    file = path / "result.json"
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON ({error}): delete it to finish the run again") from None


def require_same_config(path: Path, config: TrainConfig) -> None:
    """Refuse a directory that holds a run of another config, naming the first setting that differs.

    A run that never began, refused over a setting, say, left nothing to keep: its directory is free.
    """
    file = path / "config.yaml"
    left = [path / name for name in ("tracking.json", "metrics.jsonl", "result.json")]
    began = any(f.exists() for f in left) or any((path / "checkpoints").glob("*.ckpt"))
    if not file.is_file() or not began:
        return
    require_same_settings(path, parse(TrainConfig, [str(file)]), config)


def require_same_settings(source: Path, theirs: TrainConfig, ours: TrainConfig, besides: str = "") -> None:
    """Raise ValueError naming the first setting, `besides` one, in which two configs make different runs."""
    held = _identity(theirs)
    for name, value in _identity(ours).items():
        if held[name] != value and name != besides:
            raise ValueError(
                f"{source}: belongs to a run with {name}={held[name]}, this one has {name}={value}: "
                "choose another run_dir"
            )


def open_run_dir(path: Path, config: TrainConfig) -> RunDir:
    """Create the directory where needed, lock it, write config.yaml.

    Raises ValueError (one line) if it cannot be written, is another config's, or another process writes it.
    """
    require_same_config(path, config)
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        for folder in (path, path / "checkpoints"):
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied or read-only", str(folder))
        run = RunDir(path, config)
        if is_rank_zero():
            # run_dir is left out, so that the directory may move and still replays.
            write_text(path / "config.yaml", to_yaml(replace(config, run_dir=None)))
    except OSError as error:
        raise ValueError(
            f"run_dir={path}: cannot be written ({error.strerror or error}): choose another"
        ) from None
    return run


def is_rank_zero() -> bool:
    """Whether this process writes: true unless a launcher says that it is another rank."""
    ranks = [os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ]
    return not ranks or int(ranks[0]) == 0


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: a reader, or a process killed here, never leaves or sees half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide a run's result."""
    return {name: value for name, value in flatten(config).items() if not name.startswith(FREE_SETTINGS)}


def _take_lock(path: Path) -> int:
    """Lock run_dir/lock until this process closes it or dies, by whatever signal."""
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise ValueError(
            f"run_dir={path}: another process ({holder}) is writing it: wait, stop it, or choose another"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _HELD_LOCKS.add(descriptor)
    return descriptor


# A forked data worker that outlives its killed parent by seconds must not keep the lock.
_HELD_LOCKS: set[int] = set()


def _drop_locks_in_child() -> None:
    while _HELD_LOCKS:
        os.close(_HELD_LOCKS.pop())


os.register_at_fork(after_in_child=_drop_locks_in_child)
