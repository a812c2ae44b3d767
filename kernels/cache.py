"""Where kernels keep what they measured or compiled on this machine."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """LONGSTATE_CACHE, else `longstate` in the user's cache directory."""
    root = os.environ.get("LONGSTATE_CACHE")
    return Path(root or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "longstate")).expanduser()
