"""Evaluations without a fresh interpreter each: a worker's server imports and loads once, and forks for each.

An evaluation keeps what a process of its own gives: it fails, hangs, is killed and writes its log alone, and
begins with random numbers and threads that nobody has used, so its results are those of a fresh process to
the last bit. It is a session of its own, dies with the server, and the server dies with its worker.

The server never computes: a process that has started PyTorch's threads, or CUDA, must not fork. (Those of
OpenBLAS and jemalloc, which importing starts, take care of forks themselves.)

    worker -> server   {"line": ["lightning_modules.evaluate", ...], "log": FILE, "checkpoint": PATH}
    server -> worker   {"pid": 123}, then {"status": 0}, negative for a signal
"""

import atexit
import ctypes
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sweeps.trials.tether import PR_SET_PDEATHSIG, tethered


class Evaluation:
    """A forked evaluation, with what steps.py asks of a `Popen`. Until it runs, its pid is the server's."""

    def __init__(self, server: subprocess.Popen[bytes]) -> None:
        self._server, self._said = server, b""
        self.pid = server.pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status, once it has one; the server's, if that has died."""
        while self.returncode is None and self._hears(0):
            pass
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired("evaluation", timeout or 0.0)
            self._hears(left)
        return self.returncode

    def _hears(self, seconds: float | None) -> bool:
        """Wait for the server's next words; False if there were none."""
        assert self._server.stdout is not None
        if not select.select([self._server.stdout], [], [], seconds)[0]:
            return False
        piece = os.read(self._server.stdout.fileno(), 4096)
        if not piece:
            self.returncode = self._server.wait() or 1
        *lines, self._said = (self._said + piece).split(b"\n")
        for line in lines:
            said = json.loads(line)
            self.pid, self.returncode = said.get("pid", self.pid), said.get("status")
        return True


class EvaluationServer:
    """Starts the server when it is first needed, and again when it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(
        self, line: list[str], log: Path, checkpoint: str, environment: Mapping[str, str]
    ) -> Evaluation:
        """Run `python -m LINE` there, its output behind that of `log`. environment: that of a new server."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            with log.open("a") as output:
                self._process = subprocess.Popen(
                    tethered([sys.executable, "-m", "sweeps.trials.warm"], "SIGKILL"),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,  # why it could not start
                    env=environment,
                    start_new_session=True,
                )
        assert self._process.stdin is not None
        request = {"line": line, "log": str(log.absolute()), "checkpoint": checkpoint}
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # it has just died: the evaluation finds that out
            pass
        return Evaluation(self._process)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


@cache
def evaluation_server() -> EvaluationServer:
    """This process's."""
    server = EvaluationServer()
    atexit.register(server.close)
    return server


def serve() -> None:
    """Answer the requests on standard input until it ends."""
    requests, replies = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w", buffering=1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    warnings.filterwarnings("ignore", message="This process .* is multi-threaded")  # Python 3.12; see above
    from lightning_modules.preload import keep_loaded

    while text := requests.readline():
        request = json.loads(text)
        keep_loaded(request["checkpoint"])
        ready, begun = os.pipe()
        pid = os.fork()
        if pid == 0:
            for end in (requests.fileno(), replies.fileno(), ready):
                os.close(end)
            _become(request, begun)
        os.close(begun)
        os.read(ready, 1)  # it is a session now: its group can be killed
        os.close(ready)
        print(json.dumps({"pid": pid}), file=replies)
        # Not reaped until the worker knows: it would signal a number that may be another's.
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        print(json.dumps({"status": status}), file=replies)
        select.select([requests], [], [])
        os.waitpid(pid, 0)


def _become(request: dict[str, Any], begun: int) -> None:
    """In the child: turn into the process that `python -m LINE` would be, and end."""
    server = os.getppid()
    status = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != server:
            os._exit(1)
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.write(begun, b".")
        os.close(begun)
        sys.argv = [request["line"][0], *request["line"][1:]]
        runpy.run_module(request["line"][0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            status = (end.code or 0) & 0xFF
        else:
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the server's own end is not this one's


if __name__ == "__main__":
    serve()
