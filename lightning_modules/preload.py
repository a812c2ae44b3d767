"""What an evaluation needs besides its own settings, for a process that forks evaluations (sweeps.warm).

Importing this computes nothing and opens nothing: a process with threads of its own must not fork.
"""

from lightning_modules.imports import heavy_imports
from lightning_modules.mlflow_store import quieten

quieten()
with heavy_imports():
    from lightning_modules.checkpoints import keep_loaded

__all__ = ["keep_loaded"]
