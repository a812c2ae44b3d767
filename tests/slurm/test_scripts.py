"""The shell of slurm/: what can be seen without a cluster, with stand-ins for the commands that it calls."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("slurm/*.sh"), *ROOT.glob("slurm/*.sbatch")])


def bash(
    script: str, *arguments: str, folder: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script as the templates do, after env.sh and functions.sh."""
    head = "set -euo pipefail\nsource slurm/env.sh\nsource slurm/functions.sh\n"
    return subprocess.run(
        ["bash", "-c", head + script, "bash", *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def stand_in(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def commands(tmp_path: Path) -> tuple[Path, str]:
    """A folder of stand-ins, and the PATH that finds them first."""
    stand_in(
        tmp_path,
        "scontrol",
        f'if [[ $1 == show ]]; then echo localhost; else echo "$@" >>{tmp_path}/said; fi',
    )
    stand_in(tmp_path, "squeue", f'cat {tmp_path}/state; echo "$@" >{tmp_path}/asked')
    return tmp_path, f"{tmp_path}:{os.environ['PATH']}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if script.suffix == ".sbatch":
        text = script.read_text()
        assert text.startswith("#!/usr/bin/env bash\n")
        assert "set -euo pipefail" in text
        assert "#SBATCH --requeue" in text
        assert "#SBATCH --open-mode=append" in text
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "-x", str(script)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_every_variable_of_env_sh_is_in_the_readme_and_the_environment_wins() -> None:
    names = re.findall(r'^: "\$\{(\w+)=', (ROOT / "slurm" / "env.sh").read_text(), flags=re.MULTILINE)
    assert len(names) > 10
    readme = (ROOT / "slurm" / "README.md").read_text()
    for name in names:
        assert f"`{name}`" in readme, name
        done = bash(f'echo "${name}"', **{name: "mine"})
        assert done.stdout.strip() == "mine", name


def test_a_port_is_free_below_the_ephemeral_ones_and_nobody_elses(commands: tuple[Path, str]) -> None:
    folder, path = commands
    job = {"PATH": path, "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "localhost"}
    choose = 'choose_rendezvous; echo "$MASTER_ADDR $MASTER_PORT"'
    first = bash(choose, **job).stdout.split()
    assert first[0] == "localhost"
    lowest_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert int(first[1]) < max(lowest_ephemeral, 28192)
    assert bash(choose, **job).stdout.split() == first  # the lock went with its shell
    # Held by another job that has not bound it yet.
    script = folder / "other.sh"
    script.write_text(f"set -eu\nsource slurm/env.sh\nsource slurm/functions.sh\n{choose}\n")
    both = bash(f"{choose}\nbash {script} {{port_lock}}>&-", **job).stdout.splitlines()
    assert both[0].split() == first
    assert int(both[1].split()[1]) == int(first[1]) + 1
    # Bound by somebody who knows nothing of our locks.
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(first[1])))
        other.listen()
        assert int(bash(choose, **job).stdout.split()[1]) == int(first[1]) + 1


@pytest.mark.parametrize(
    ("state", "restarts", "array", "said"),
    [
        pytest.param("RUNNING", "", "", "requeue 7", id="running"),
        pytest.param("RUNNING", "3", "5", "requeue 5_2", id="array"),
        pytest.param("COMPLETING", "", "", "job 7 is COMPLETING: not requeued", id="cancelled"),
        pytest.param("RUNNING", "100", "", "job 7 has been restarted MAX_RESTARTS=100 times", id="endless"),
    ],
)
def test_a_job_is_requeued_unless_cancelled_or_endless(
    commands: tuple[Path, str], state: str, restarts: str, array: str, said: str
) -> None:
    folder, path = commands
    (folder / "state").write_text(f"{state}\n")
    job = {"PATH": path, "SLURM_JOB_ID": "7"}
    job |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    job |= {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": "2"} if array else {}
    done = bash("requeue", **job)
    asked = (folder / "said").read_text() if (folder / "said").exists() else ""
    assert said in asked + done.stderr
    assert (done.returncode == 0) == bool(asked)
    assert f"--jobs={array or 7}" in (folder / "asked").read_text()


def test_a_container_stands_in_for_the_virtual_environment(commands: tuple[Path, str]) -> None:
    """The command line for apptainer, run with a stand-in for it: no container engine is needed or tested."""
    folder, path = commands
    stand_in(
        folder,
        "apptainer",
        f'echo "$@" >{folder}/apptainer-said; while [[ $1 != *.sif ]]; do shift; done; shift; "$@"',
    )
    stand_in(folder, "python", f'exec {sys.executable} "$@"')
    settings = {"PATH": path, "CONTAINER": "image.sif", "CONTAINER_OPTIONS": "--nv --cleanenv"}
    settings |= {"LOCAL_SCRATCH": "/scratch"}
    done = bash('set_up_python; "${python[@]}" -c "import conf; print(conf.__file__)"', **settings)
    assert done.stdout.strip() == str(ROOT / "conf" / "__init__.py"), done.stderr
    said = (folder / "apptainer-said").read_text()
    assert said.startswith(
        f"exec --nv --cleanenv --bind {ROOT} --bind /scratch --pwd {ROOT} image.sif python -u"
    )


def test_a_virtual_environment_that_is_not_there_is_named() -> None:
    done = bash("set_up_python", VENV="/nowhere")
    assert done.returncode == 1
    assert done.stderr == "error: VENV=/nowhere: no Python there: make setup, or edit slurm/env.sh\n"


def test_a_sweep_that_does_not_hold_is_refused_before_it_is_submitted(commands: tuple[Path, str]) -> None:
    _, path = commands
    done = subprocess.run(
        ["slurm/submit_sweep.sh", "conf/sweep/smoke.yaml", "train.seed=[0]"],
        cwd=ROOT,
        env=os.environ | {"PATH": path, "VENV": sys.prefix},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: train.seed: ")


@pytest.mark.parametrize("preflight", [0, 1], ids=["passes", "fails"])
def test_a_training_starts_after_its_preflight_with_its_arguments_intact(
    commands: tuple[Path, str], preflight: int
) -> None:
    folder, path = commands
    for part in ("slurm", "sweeps", "conf"):
        (folder / part).symlink_to(ROOT / part)
    (folder / "logs").mkdir()
    srun = (
        f'printf "%s\\n" "$@" "--" >>{folder}/srun-said; [[ "$*" != *sweeps.preflight* ]] || exit {preflight}'
    )
    stand_in(folder, "srun", srun)
    job = {"SLURM_JOB_ID": "8", "SLURM_JOB_NAME": "train", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
    job |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_SUBMIT_DIR": str(folder), "SLURM_CPUS_PER_TASK": "3"}
    done = subprocess.run(
        ["bash", "slurm/train.sbatch", "CONFIG.yaml", "run_dir=a b", "data.documents.source=*"],
        cwd=folder,
        env=os.environ | job | {"PATH": path, "VENV": sys.prefix, "TRACKING_URI": "http://host:5000"},
        capture_output=True,
        text=True,
    )
    calls = [call.split("\n") for call in (folder / "srun-said").read_text().split("--\n") if call]
    assert done.returncode == preflight, done.stderr
    assert "sweeps.preflight" in calls[0]
    assert len(calls) == 2 - preflight
    if preflight:
        assert done.stderr == "error: the preflight has failed: see logs/train-8-0.out\n"
    expected = ["CONFIG.yaml", "run_dir=a b", "data.documents.source=*", "tracking.uri=http://host:5000"]
    for call in calls:
        assert call[-7:-1] == [*expected, "trainer.num_nodes=2", "trainer.devices=4"]
