"""The checks of a preflight. Each returns what it found, or raises ValueError with one sentence."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from conf.preflight import PreflightConfig
from conf.schema import TrackingConfig, TrainerConfig
from conf.sweep_schema import SweepConfig
from lightning_modules.mlflow_store import open_store, sqlite_path
from lightning_modules.run_dir import is_rank_zero
from lightning_modules.slurm import environment_for_child, is_rank
from sweeps.readiness.rank import RankReport
from sweeps.stores.locks import ProcessLock

ROOT = Path(__file__).parents[2]
# On these, SQLite loses its locks and compilers' caches race.
NETWORK_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "afs", "fuse", "9p")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is about to be started."""

    directory: str
    tracking: TrackingConfig
    trainer: TrainerConfig
    sweep: SweepConfig | None = None


def checks_of(subject: Subject, settings: PreflightConfig) -> dict[str, Callable[[], str]]:
    """The checks by name, in order. Of several ranks the first looks at what all of them share."""
    directory = Path(subject.directory)
    shared = {
        "versions": check_versions,
        "directory": lambda: check_directory(directory, settings.free_gib),
        "locks": lambda: check_locks(directory),
        "tracking": lambda: check_tracking(subject.tracking),
    }
    sweep = subject.sweep
    if sweep is not None:
        shared["study"] = lambda: check_study(directory, sweep)
    every = {
        "caches": check_caches,
        "ranks": lambda: check_ranks(subject.trainer),
        "port": check_port,
        "all-reduce": lambda: check_all_reduce(subject, settings.timeout_seconds),
    }
    return shared | every if is_rank_zero() else every


def check_versions() -> str:
    """Every requirement of pyproject.toml, against what is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(text) for text in project["dependencies"]]
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            raise ValueError(f"{requirement.name} is not installed: make setup") from None
        if not requirement.specifier.contains(version, prereleases=True):
            raise ValueError(f"{requirement.name} {version}: needs {requirement.specifier}: make setup")
    python = ".".join(map(str, sys.version_info[:3]))
    shown = [f"{name} {metadata.version(name)}" for name in ("torch", "lightning", "optuna", "mlflow")]
    return f"python {python}, {', '.join(shown)}; {len(requirements)} requirements hold"


def check_directory(directory: Path, free_gib: float) -> str:
    """It can be made and written, renames replace, and there is room."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".preflight-", dir=directory) as folder:
            for name in ("old", "new"):
                with Path(folder, name).open("w") as file:
                    file.write(name)
                    os.fsync(file.fileno())
            os.replace(Path(folder, "new"), Path(folder, "old"))
    except OSError as error:
        raise ValueError(f"{directory}: cannot be written ({error.strerror}): choose another") from None
    free = shutil.disk_usage(directory).free / 2**30
    if free < free_gib:
        raise ValueError(
            f"{directory}: {free:.1f} GiB free, free_gib={free_gib:g} asked for: make room there"
        )
    return f"{directory}: {free:,.0f} GiB free on {file_system(directory)}"


def check_locks(directory: Path) -> str:
    """What one process has locked another one cannot lock, until it lets go or dies."""
    path = directory / f".preflight-{socket.gethostname()}-{os.getpid()}.lock"
    lock = ProcessLock(path)
    try:
        lock.acquire()
        held = _try_lock_elsewhere(path)
        lock.release()
        freed = _try_lock_elsewhere(path)
    except OSError as error:
        remedy = "trials and runs rely on it: mount it with locks (Lustre: -o flock), or choose another"
        raise ValueError(f"{directory}: no flock there ({error.strerror}); {remedy}") from None
    finally:
        path.unlink(missing_ok=True)
    if held or not freed:
        raise ValueError(f"{directory}: its file locks do not exclude other processes: choose another")
    return "flock excludes other processes"


def check_tracking(config: TrackingConfig) -> str:
    if not config.enabled:
        return "off"
    database = sqlite_path(config.uri)
    if database is not None and is_network(database):
        raise ValueError(
            f"tracking.uri={config.uri}: SQLite corrupts on {file_system(database)}: "
            "use a local disk, or an MLflow server, tracking.uri=http://HOST:5000"
        )
    open_store(config)
    return f"{config.uri}: experiment {config.experiment} opens"


def check_study(directory: Path, config: SweepConfig) -> str:
    """The journal takes a study and a trial and gives them back; a database answers."""
    from sweeps.stores.store import Store

    if config.storage.uri is not None:
        from sweeps.stores.postgres import require_reachable

        require_reachable(config.storage.uri)
        return "the database answers"
    with tempfile.TemporaryDirectory(prefix=".preflight-", dir=directory) as folder:
        study = Store(Path(folder), config, create=True).make_study("preflight", ["maximize"])
        study.set_user_attr("stage", "train")  # without one it counts as half made
        study.tell(study.ask(), 1.0)
        (found,) = Store(Path(folder), config).load_studies()
        if [trial.value for trial in found.get_trials()] != [1.0]:
            raise ValueError(f"{directory}: an Optuna journal there loses what is written: choose another")
    studies = Store(directory, config).load_studies()
    trials = sum(len(study.get_trials(deepcopy=False)) for study in studies)
    return f"the journal answers; {len(studies)} studies, {trials} trials so far"


def check_caches() -> str:
    """Compiled kernels need a compiler, and a folder that is not on the network."""
    compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")
    if compiler is None:
        raise ValueError("no C compiler: kernels are compiled with gcc: load its module, or set CC")
    cache = Path(os.environ.get("TRITON_CACHE_DIR", "~/.triton/cache")).expanduser()
    if is_network(cache) and is_rank():
        raise ValueError(
            f"TRITON_CACHE_DIR={cache}: on {file_system(cache)} the caches of several processes race: "
            "set it to a disk of the node's own"
        )
    return f"{compiler}; Triton's in {cache}, on {file_system(cache)}"


def check_ranks(trainer: TrainerConfig) -> str:
    """srun's tasks are the ranks that the config counts on."""
    if not is_rank():
        return f"{trainer.devices} on this node, started here"
    tasks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NNODES"])
    expected = trainer.num_nodes * trainer.devices
    if (tasks, nodes) != (expected, trainer.num_nodes):
        raise ValueError(
            f"srun has started {tasks} tasks on {nodes} nodes, the config counts on trainer.num_nodes="
            f"{trainer.num_nodes} x trainer.devices={trainer.devices}: start one task a device"
        )
    return f"{tasks} tasks of srun on {nodes} nodes"


def check_port() -> str:
    """The rendezvous can be made: its host has a name, its port is free."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if host is None or port is None:
        if is_rank() and int(os.environ["SLURM_NTASKS"]) > 1:
            raise ValueError("MASTER_ADDR, MASTER_PORT: not set: slurm/train.sbatch shows how")
        return "any"
    try:
        address = socket.gethostbyname(host)
    except OSError:
        raise ValueError(f"MASTER_ADDR={host}: {socket.gethostname()} cannot resolve it") from None
    if is_rank_zero():
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", int(port)))
        except OSError as error:
            raise ValueError(f"MASTER_PORT={port}: {error.strerror} on {socket.gethostname()}") from None
    return f"{host} is {address}, {port} is free"


def check_all_reduce(subject: Subject, timeout: float) -> str:
    """Every rank computes on its device and takes part in an all-reduce, within `timeout` seconds."""
    trainer = subject.trainer
    if is_rank():
        names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
        ranks = [{name: os.environ[theirs] for name, theirs in names.items()}]
        if ranks[0]["WORLD_SIZE"] == "1":
            ranks[0] |= _own_rendezvous()
    else:
        world = {"WORLD_SIZE": str(trainer.devices)} | _own_rendezvous()
        ranks = [{"RANK": str(i), "LOCAL_RANK": str(i)} | world for i in range(trainer.devices)]
    line = [sys.executable, "-m", "sweeps.readiness.rank", trainer.accelerator, subject.directory]
    processes = [
        subprocess.Popen(
            line,
            env=environment_for_child() | rank | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]
    deadline = time.monotonic() + timeout
    try:
        outputs = [
            process.communicate(timeout=max(0.1, deadline - time.monotonic())) for process in processes
        ]
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"all-reduce over {ranks[0]['WORLD_SIZE']} ranks: nothing within timeout_seconds={timeout:g} on "
            f"{socket.gethostname()}: a rank is missing or the fabric does not connect: look at the "
            "logs of the other ranks, and name the interface in NCCL_SOCKET_IFNAME"
        ) from None
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode != 0:
            lines = [line for line in errors.splitlines() if line.strip()]
            raise ValueError(f"on {socket.gethostname()}: {lines[-1] if lines else 'no word'}")
    return RankReport(**json.loads(outputs[0][0].splitlines()[-1])).describe()


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`, or would."""
    path = path.absolute()
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(point, kind) for point, kind in mounts if path.is_relative_to(point)]
    return max(holding, key=lambda mount: len(mount[0]), default=("", "an unknown file system"))[1]


def is_network(path: Path) -> bool:
    return file_system(path).startswith(NETWORK_FILE_SYSTEMS)


def _own_rendezvous() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def _try_lock_elsewhere(path: Path) -> bool:
    """Whether another process could take the lock."""
    code = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    line = [sys.executable, "-I", "-S", "-c", code, str(path)]
    return subprocess.run(line, capture_output=True, timeout=30).returncode == 0
