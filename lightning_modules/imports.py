"""Importing torch, Lightning and MLflow, faster."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution, PackageNotFoundError

# Lightning imports all of torchmetrics, which imports these for metrics and plots that nothing here uses.
UNUSED_BY_LIGHTNING = ("matplotlib", "scipy", "transformers")
# MLflow's client works without it, as mlflow-skinny does; tables import it when one is logged.
UNUSED_BY_MLFLOW = ("pandas",)


@contextmanager
def heavy_imports(unused: tuple[str, ...] = ()) -> Iterator[None]:
    """Around imports of large packages: no garbage collection among objects that stay.

    Saves 2 of 9 seconds of `train`'s imports. What was made stays out of later collections too.

    unused: optional packages that are not there for what is imported now; afterwards they are.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        with _hidden(unused):
            yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


@contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    """Make packages that are not yet imported look as if they were not installed."""
    hidden = [name for name in names if name not in sys.modules]
    find, original = Distribution.from_name, Distribution.__dict__["from_name"]

    def from_name(name: str) -> Distribution:
        if name in hidden:
            raise PackageNotFoundError(name)
        return find(name)

    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: `import name` fails
    Distribution.from_name = staticmethod(from_name)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Distribution.from_name = original  # type: ignore[method-assign]
        for name in hidden:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)
