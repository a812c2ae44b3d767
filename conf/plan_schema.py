"""Settings of the planner: those of the training it plans, and where that would run."""

from dataclasses import dataclass
from typing import Literal, get_args

from conf.schema import TrainConfig, option, require

DeviceName = Literal["auto", "cpu", "a100-80", "h100", "h200"]
DEVICE_NAMES: tuple[DeviceName, ...] = get_args(DeviceName)


@dataclass(kw_only=True)
class PlanConfig(TrainConfig):
    """A training, and the device that it is planned for."""

    measure: bool = option(False, "run three steps here and print measured beside predicted")
    device: DeviceName = option("auto", "what it would run on; auto: what is here")
    memory_gib: float | None = option(None, "memory of a device that a run may use; none: the device's own")

    def __post_init__(self) -> None:
        super().__post_init__()
        memory = self.memory_gib
        require(memory is None or memory > 0, "memory_gib", memory, "must be above 0")
        require(
            not self.measure or self.device == "auto",
            "measure",
            self.measure,
            f"means this machine, not device={self.device}: leave device out",
        )
