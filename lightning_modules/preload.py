"""What an evaluation needs besides its settings, for a process that forks evaluations (sweeps.trials.warm).

Importing this computes nothing and opens nothing: a process with threads of its own must not fork.
"""

from importlib import import_module

from lightning_modules.imports import heavy_imports
from lightning_modules.mlflow_store import quieten

IMPORTED = (
    "lightning_modules.evaluation.bench",
    "lightning_modules.evaluation.run",
    "matplotlib.backends.backend_agg",
    "matplotlib.font_manager",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.tracking.client",
    "pandas",  # MLflow's tables
)

quieten()
with heavy_imports():
    for name in IMPORTED:
        import_module(name)
    from lightning_modules.checkpoints import keep_loaded

__all__ = ["keep_loaded"]
