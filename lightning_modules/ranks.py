"""The processes of one run: as many as the config says, and what to say when one of them is gone."""

import os

from conf.schema import TrainConfig
from lightning_modules.run_dir import RunError
from lightning_modules.slurm import is_rank

# How gloo, NCCL and PyTorch's store put it.
GONE = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed"),
    *(
        "Timed out waiting",
        "NCCL error",
        "ncclRemoteError",
        "collective operation timeout",
        "Connection refused",
    ),
    *("failed to recv", "Connection was likely closed", "Application timeout caused pair closure"),
)


def require_world_size(config: TrainConfig) -> None:
    """Raise ValueError (one line) if a launcher has started another number of ranks than the config says."""
    asked = config.trainer.devices * config.trainer.num_nodes
    if is_rank():
        launcher, started = "srun", os.environ.get("SLURM_NTASKS")
    else:
        launcher = "torchrun"
        started = os.environ.get("WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else None
    if started is not None and int(started) != asked:
        devices, nodes = config.trainer.devices, config.trainer.num_nodes
        raise ValueError(
            f"trainer.devices={devices}: with trainer.num_nodes={nodes} asks for {asked} ranks, but "
            f"{launcher} started {started}: make them equal; a run continues on any number"
        )


def lost_rank(error: BaseException, step: int) -> RunError | None:
    """The one line for an error that says that another rank ended; None for any other."""
    message = str(error)
    said = next((words for words in GONE if words in message), None)
    if said is None or not isinstance(error, RuntimeError):
        return None
    return RunError(
        f"after step {step}: another rank has ended ({said}): its own output says why; the same command "
        "continues from the last checkpoint, on any number of ranks"
    )
