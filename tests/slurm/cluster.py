"""A real SLURM on this machine, for tests: munged, slurmctld and a slurmd for each pretend node.

Nothing of the system is touched: own key, ports, spool and state, and each node has its host name in a
namespace of its own. The daemons stay in the foreground and are tied to the process that starts them, so that
they cannot outlive it, however it ends.

The pretend GPUs are null devices: SLURM counts them and sets CUDA_VISIBLE_DEVICES; torch finds none.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from sweeps.trials.tether import tethered

PACKAGES = "munge slurmctld slurmd slurm-client"
INSTALL = f"apt-get install -y --no-install-recommends {PACKAGES}"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo")

CONFIG = """\
ClusterName=pretend
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# More CPUs than the machine has: nodes are pretended.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
# Finished jobs stay visible; what is asked to end gets {kill_wait} seconds.
MinJobAge=3600
KillWait={kill_wait}
SlurmdTimeout=10
MessageTimeout=20
BatchStartTimeout=20
NodeName=n[0-{last}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first_port}-{last_port}] \
CPUs=8 Sockets=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=16000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefMemPerCPU=100 PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefMemPerCPU=100 PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """Pretend nodes with 8 CPUs and 2 pretend GPUs each, a partition `main`, and `urgent`, which preempts it.

    kill_wait: seconds from scancel to the kill. grace: from preemption to the kill.
    """

    def __init__(self, folder: Path, nodes: int = 2, kill_wait: int = 20, grace: int = 40) -> None:
        self.folder, self.nodes = folder, [f"n{i}" for i in range(nodes)]
        self._kill_wait, self._grace = kill_wait, grace
        self.daemons: dict[str, subprocess.Popen] = {}
        self.job_logs = Path()  # a folder, for what a failing test says
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        self._configure()
        self._daemon(
            "munged",
            "--foreground",
            "--force",  # folders of tests are private, which munged would refuse
            f"--key-file={self.folder}/munge.key",
            f"--socket={self.folder}/munge.socket",
            f"--pid-file={self.folder}/munged.pid",
            f"--log-file={self.folder}/munged.log",
            f"--seed-file={self.folder}/munged.seed",
        )
        self.wait_for((self.folder / "munge.socket").exists, 20, "munged does not answer")
        self._daemon("slurmctld", "-D", "-c", "-f", str(self.folder / "slurm.conf"))
        for node in self.nodes:
            self.start_node(node)
        self.wait_for(self.is_idle, 60, "the nodes do not come up")

    def start_node(self, node: str) -> None:
        """Start slurmd as `node`, under that host name, which every node can resolve."""
        script = 'mount --bind "$1" /etc/hosts && hostname "$2" && exec slurmd -D -c -N "$2" -f "$3"'
        arguments = [str(self.folder / "hosts"), node, str(self.folder / "slurm.conf")]
        self._daemon("unshare", "--mount", "--uts", "bash", "-c", script, "bash", *arguments, name=node)

    def kill_node(self, node: str) -> None:
        """What a power cut does: the node's daemon and everything it runs, gone at once."""
        daemon = self.daemons.pop(node)
        victims = [daemon, *self._processes_of(node)]
        for process in victims:
            process.kill()
        daemon.wait()

    def stop(self) -> None:
        """End everything that this cluster has started, at once: nobody needs its state any more."""
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
        while processes := self._processes_of():
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=5)

    def run(self, *command: str, **environment: str) -> str:
        """A client command; returns what it printed."""
        done = subprocess.run(
            command, env=self.environment | environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What the controller knows of a job or an element of an array, named as in `scontrol show job`."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait_for(self, condition: Callable[[], object], seconds: float, otherwise: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{otherwise}\n{self.logs()}"
            time.sleep(0.1)

    def wait_for_state(self, job: str, *states: str, seconds: float = 120) -> str:
        self.wait_for(lambda: self.state(job) in states, seconds, f"job {job} does not become {states}")
        return self.state(job)

    def start_requeued(self, job: str, **changes: str) -> None:
        """Let a requeued job start now: SLURM holds it back for two minutes."""
        self.wait_for_state(job, "PENDING")
        time.sleep(2)  # a node refuses what is started in the second in which it was killed
        settings = [f"{name}={value}" for name, value in changes.items()]
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now", *settings)

    def logs(self) -> str:
        """The last lines of every daemon's log, and of every log of a job in the jobs' folder."""
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted([*self.folder.glob("*.log"), *self.job_logs.glob("*.out")])
        )

    def _configure(self) -> None:
        folder = self.folder
        (folder / "state").mkdir(parents=True)
        folder.chmod(0o755)  # munge insists
        for node in self.nodes:
            (folder / f"spool-{node}").mkdir()
        (folder / "munge.key").touch(mode=0o600)
        (folder / "munge.key").write_bytes(os.urandom(1024))
        controller_port = free_ports(1 + len(self.nodes))
        first_port = controller_port + 1
        config = CONFIG.format(
            folder=folder,
            controller_port=controller_port,
            first_port=first_port,
            last_port=first_port + len(self.nodes) - 1,
            last=len(self.nodes) - 1,
            kill_wait=self._kill_wait,
            grace=self._grace,
        )
        (folder / "slurm.conf").write_text(config)
        (folder / "cgroup.conf").write_text("IgnoreSystemd=yes\nConstrainCores=no\nConstrainDevices=no\n")
        for i in range(2):
            # gres.conf wants a file that exists: a count alone registers none
            os.mknod(folder / f"gpu{i}", 0o666 | 0o020000, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu[0-1]\n")
        hosts = Path("/etc/hosts").read_text() + "".join(f"127.0.0.1 {node}\n" for node in self.nodes)
        (folder / "hosts").write_text(hosts)

    def _daemon(self, program: str, *arguments: str, name: str | None = None) -> None:
        path = shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
        assert path is not None, program
        with (self.folder / f"{name or program}.out").open("a") as output:
            self.daemons[name or program] = subprocess.Popen(
                tethered([path, *arguments], "SIGKILL"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment | {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"},
                start_new_session=True,
            )

    def is_idle(self) -> bool:
        for name, daemon in self.daemons.items():
            assert daemon.poll() is None, f"{name} has ended\n{self.logs()}"
        command = ["sinfo", "--noheader", "--partition=main", "--states=idle", "--format=%D"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30)
        return done.stdout.strip() == str(len(self.nodes))

    def _processes_of(self, node: str | None = None) -> list[psutil.Process]:
        """What runs under this cluster, daemons of steps included: on one node, or on all."""
        nodes = self.nodes if node is None else [node]
        logs = {str(self.folder / f"slurmd-{name}.log") for name in nodes}
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                theirs = process.environ()
                runs_here = theirs.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                is_job = runs_here and theirs.get("SLURMD_NODENAME") in nodes
                # the daemon of a step inherits its node's log, and little else that tells
                is_step = process.name() == "slurmstepd" and logs & {
                    file.path for file in process.open_files()
                }
                if is_job or is_step:
                    found.append(process)
        return found


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row, below those that the kernel hands out."""
    for first in range(17_000 + os.getpid() % 2000 * 5, 32_000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


def why_not() -> str | None:
    """Why no cluster can be started here, with the line that mends it; None if one can."""
    if os.geteuid() != 0:
        return "a pretend SLURM is started as root only"
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        return f"no {', '.join(missing)} here: {INSTALL}"
    if subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True).returncode != 0:
        return "not allowed to unshare namespaces here"
    return None
