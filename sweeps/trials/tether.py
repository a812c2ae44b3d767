"""Run a command that dies with its parent: `tether.py PARENT_PID SIGNAL COMMAND ...`.

A process cannot tie itself to its parent from outside, and doing it between fork and exec in a process with
threads may deadlock; so this small script does it and then becomes the command, under the same process id.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def tethered(command: list[str], signal_name: str) -> list[str]:
    """The command line that runs `command` and sends it `signal_name` when the calling process dies."""
    if sys.platform != "linux":
        raise ValueError(f"sys.platform={sys.platform}: tying trials to their worker (prctl) needs Linux")
    own_path = str(Path(__file__).resolve())
    return [sys.executable, "-I", "-S", own_path, str(os.getpid()), signal_name, *command]


def main() -> None:
    parent, signal_name, *command = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.Signals[signal_name].value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != int(parent):  # it died before the tie was made
        raise SystemExit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
