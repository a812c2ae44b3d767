"""A run imports what it needs, and what it hides from others' imports is there for its own."""

import subprocess
import sys

PROGRAM = """
import sys
from lightning_modules.imports import UNUSED_BY_LIGHTNING, heavy_imports

with heavy_imports(UNUSED_BY_LIGHTNING):
    import lightning_modules.fit
unwanted = {"datasets", "matplotlib", "mlflow", "optuna", "pandas", "scipy", "sklearn", "transformers"}
print(sorted(unwanted & sys.modules.keys()))

import importlib.metadata
import matplotlib.figure
import scipy.signal
import torchmetrics
from transformers import AutoTokenizer

print(importlib.metadata.version("scipy") == scipy.__version__)
print(torchmetrics.MeanMetric()(3.0).item())

import torch
import lightning_modules.preload

wanted = {"lightning_modules.evaluation.run", "matplotlib.backends.backend_agg", "pandas"}
wanted |= {"mlflow.tracking.client", "mlflow.store.tracking.sqlalchemy_store"}
print(wanted <= sys.modules.keys(), torch.cuda.is_initialized())
"""


def test_training_imports_no_package_that_it_does_not_use() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "True", "3.0", "True False"], done.stderr
