"""How the processes of a sweep end: exit statuses, and the error that a store without an answer is."""

import os
import signal

TOO_MANY_FAILURES = 3  # a worker: trials failed in a row
STOPPED = 128 + signal.SIGTERM  # a worker that was told to
GOES_ON = os.EX_TEMPFAIL  # sweeps.run: later, by the same command or by workers elsewhere


class DatabaseGone(Exception):
    """The database has not answered, or the journal's disk was full, for as long as storage.patience allows;
    the message says which."""
