"""The calibration that a measuring command is to use: found, made where it is missing, seen to fit."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.calibrate_schema import CalibrateConfig
from conf.load import parse
from conf.measure_schema import MeasureConfig
from conf.mitigation import MitigationConfig
from conf.schema import TrainConfig
from lightning_modules.backbone import Mamba2LM
from lightning_modules.calibration.file import beside, read_calibration
from lightning_modules.calibration.run import calibrate
from lightning_modules.guests.guest import Guest


def settle_calibration(
    config: MitigationConfig, measured: MeasureConfig, trained: TrainConfig, model: Mamba2LM | Guest
) -> MitigationConfig:
    """The mitigation with its calibration's file named and seen to be this checkpoint's.

    `auto` is the file next to the checkpoint, made where there is none of these weights. A model that was
    trained under a calibration may be measured under it, though its weights have changed since.

    Raises:
        ValueError: the file cannot be read or made, or belongs to another mitigation or model.
    """
    if config.calibration is None:
        return config
    assert isinstance(model, Mamba2LM), "a guest runs without mitigations"
    path = Path(config.calibration)
    if config.calibration == "auto":
        path = beside(measured.checkpoint, config.name)
        with _alone_in(path.parent):
            if not holds(measured.checkpoint, config.name, model):
                shared = ("checkpoint", "device", "threads", "segment", "data")
                own: dict[str, Any] = {name: getattr(measured, name) for name in shared}
                own["mitigation.name"] = config.name
                calibrate(parse(CalibrateConfig, [own]))
    calibration = read_calibration(path, config.name)
    calibration.require_model(path, trained.model)
    trained_under = trained.mitigation.calibration
    if trained_under is None or Path(trained_under).resolve() != path.resolve():
        calibration.require_weights(path, model)
    return replace(config, calibration=str(path))


def holds(checkpoint: str, mitigation: str, model: Mamba2LM) -> bool:
    """Whether there is a calibration next to a checkpoint, and of these very weights."""
    path = beside(checkpoint, mitigation)
    if not path.is_file():
        return False
    try:
        read_calibration(path, mitigation).require_weights(path, model)
    except ValueError:
        return False
    return True


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process makes a calibration in this folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
