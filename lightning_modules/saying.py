"""Standard output that may be closed before the work is done: `command | head`."""

import os
import sys


def say(text: str) -> None:
    """Print a line; where nobody reads any more the work goes on in silence."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard_output()


def discard_output() -> None:
    """Nothing more is written to standard output, nor when Python ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
