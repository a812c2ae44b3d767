"""Real training processes for tests, forked from one that has made the slow imports already.

`python -m lightning_modules.train` spends its first seconds importing; a test that kills and restarts it many
times starts it from here instead: same entry point, own process, own output file, killed by real signals.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["lightning_modules.fit", "mlflow.tracking.client", "mlflow.store.tracking.sqlalchemy_store"]
)


def start(function: Callable[..., Any], *arguments: Any, output: Path) -> BaseProcess:
    """Run `function(*arguments)` in a process of its own; its stdout and stderr go to the file `output`."""
    process = _CONTEXT.Process(target=_run, args=(function, arguments, str(output)))
    process.start()
    return process


def start_train(argv: list[str], output: Path, **environment: str) -> BaseProcess:
    return start(_main, environment, argv, output=output)


def train(argv: list[str], output: Path) -> int:
    """Run a training to its end; returns its exit status."""
    process = start_train(argv, output)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def run_python(command: list[str], folder: Path, output: Path) -> int:
    """Run `python -m MODULE ...` or `python -c CODE ...` in `folder`; returns its exit status."""
    python, option, *argv = command
    assert python == "python"
    assert option in ("-m", "-c")
    process = start(_python, option, argv, str(folder), output=output)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def train_on_ranks(
    ranks: int, argv: list[str], output: Path, own: list[list[str]] | None = None
) -> list[int | None]:
    """Run a training on `ranks` gloo processes, as a cluster starts them; returns their exit statuses.

    own: further settings of each rank.
    """
    argv = [*argv, f"trainer.devices={ranks}", "trainer.accelerator=cpu"]
    meeting = rendezvous()
    processes = [
        start_train([*argv, *(own[rank] if own else [])], output, LOCAL_RANK=str(rank), **meeting)
        for rank in range(ranks)
    ]
    return join(processes)


def call_on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any, output: Path) -> None:
    """`function(*arguments)` on `ranks` gloo processes, their group initialised. It raises where it fails."""
    meeting = rendezvous()
    processes = [
        start(_in_group, rank, ranks, meeting, function, arguments, output=output) for rank in range(ranks)
    ]
    assert join(processes) == [0] * ranks, output.read_text()


def join(processes: list[BaseProcess]) -> list[int | None]:
    """Exit statuses, once all have ended; none outlives one that failed."""
    while alive := [process for process in processes if process.is_alive()]:
        if any(process.exitcode for process in processes):  # the others would wait for it
            for process in alive:
                process.kill()
        alive[0].join(0.1)
    return [process.exitcode for process in processes]


def rendezvous() -> dict[str, str]:
    """Where ranks meet: a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def wait_until(condition: Callable[[], bool], process: BaseProcess, seconds: float = 120) -> bool:
    """Poll until `condition()`; False if the process ended first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        if not process.is_alive():
            return condition()
        time.sleep(0.002)
    raise TimeoutError(f"nothing within {seconds} s")


def _in_group(
    rank: int,
    ranks: int,
    meeting: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ |= meeting
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()


def _python(option: str, argv: list[str], folder: str) -> None:
    os.chdir(folder)
    sys.argv = argv if option == "-m" else ["-c", *argv[1:]]
    if option == "-m":
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    else:
        exec(argv[0], {"__name__": "__main__"})


def _main(environment: dict[str, str], argv: list[str]) -> int:
    from lightning_modules.train import main

    os.environ |= environment
    return main(argv)


def _run(function: Callable[..., Any], arguments: tuple[Any, ...], output: str) -> None:
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # As in a process started from a shell: data workers are forked, not fetched from another server.
    multiprocessing.set_start_method("fork", force=True)
    result = function(*arguments)
    sys.stdout.flush()
    sys.exit(result if isinstance(result, int) else 0)
