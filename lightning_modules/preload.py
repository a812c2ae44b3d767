"""What an evaluation needs besides its own settings, for a process that forks evaluations (sweeps.warm).

Importing this computes nothing and opens nothing: a process with threads of its own must not fork.
"""

from lightning_modules.imports import heavy_imports
from lightning_modules.mlflow_store import quieten

quieten()
with heavy_imports():
    import matplotlib.backends.backend_agg
    import matplotlib.font_manager
    import mlflow.store.tracking.sqlalchemy_store
    import mlflow.tracking.client
    import pandas  # MLflow's tables

    import lightning_modules.evaluation.bench
    import lightning_modules.evaluation.run
    from lightning_modules.checkpoints import keep_loaded

__all__ = ["keep_loaded"]
